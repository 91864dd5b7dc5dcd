"""What others' loops tell of the tiles that they were given, on stdout."""

import hashlib
import sys

import torch.distributed as dist
from torch import Tensor

from streaming.delivery.tile_dataset import TileDataset


def digest(tiles: Tensor) -> str:
    """SHA-256 of their pixels."""
    return hashlib.sha256(tiles.numpy().tobytes()).hexdigest()


def tell_tiles(dataset: TileDataset, tiles: Tensor) -> None:
    """A line of a rank's batch: `tiles STEP RANK DIGEST`."""
    line = f"tiles {dataset.state_dict()['step']} {dist.get_rank()} {digest(tiles)}\n"
    sys.stdout.write(line)
    sys.stdout.flush()  # in one piece, among those of the other ranks
