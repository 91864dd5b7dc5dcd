"""From a sample index to a tile: a pure function, without state, I/O or pass over the data."""

from streaming.plan.plan import TilePlan, TileSpec

__all__ = ["TilePlan", "TileSpec"]
