"""From the bytes of slides to batches of tiles."""

from streaming.catalog import Catalog
from streaming.delivery.stream import TileStream
from streaming.plan import TilePlan, TileSpec
from streaming.slide import open_slide

__all__ = ["Catalog", "TilePlan", "TileSpec", "TileStream", "open_slide"]
