"""From the bytes of slides to batches of tiles."""

from typing import TYPE_CHECKING, Any

from streaming.catalog import Catalog
from streaming.delivery.stream import TileStream
from streaming.plan import TilePlan, TileSpec
from streaming.slide import open_slide

if TYPE_CHECKING:
    from streaming.delivery.tile_dataset import torch_dataset

__all__ = ["Catalog", "TilePlan", "TileSpec", "TileStream", "open_slide", "torch_dataset"]


def __getattr__(name: str) -> Any:
    # Readers import this package, too, and need no torch.
    if name == "torch_dataset":
        from streaming.delivery.tile_dataset import torch_dataset

        return torch_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
