"""The stream as a dataset of PyTorch, for training loops that know nothing of Ray: see `torch_dataset`."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from streaming.catalog import Catalog
from streaming.delivery import node_ray
from streaming.delivery.failures import MAX_FAILED_SHARE, FailureBudget
from streaming.delivery.stream import BatchShape, TileStream
from streaming.errors import ConfigError, StreamError
from streaming.plan import TilePlan
from streaming.reading.batch import tile_columns

# Two plans that give the same for so many indices are taken for the same.
_COMPARED = 64


def torch_dataset(
    catalog: Catalog,
    plan: TilePlan,
    *,
    batch: int,
    rank: int | None = None,
    ranks: int | None = None,
    start: int = 0,
    stop: int | None = None,
    max_failed_share: float = MAX_FAILED_SHARE,
    **options: Any,
) -> TileDataset:
    """The batches of one rank, for a training loop of PyTorch, Lightning, …, started by `torchrun` or by itself.

    It joins the Ray of this process or of RAY_ADDRESS, else the ranks of a machine share one, which ends with them.

    A rank gets `batch / ranks` tiles of a global batch, of the steps [start, stop), or without an end. rank and ranks
    are by default those of `torch.distributed`, else those that `torchrun` tells, else it is the only one. Past
    max_failed_share of tiles that could not be read it stops. The options are `TileStream`'s: readers (of all ranks
    together), reader, reader_cpus, reader_labels, stall_s, …

    Raises:
        ConfigError: the ranks don't divide the batch, the rank is none of them, or there is no step.
    """
    if rank is None or ranks is None:
        if rank is not None or ranks is not None:
            raise ConfigError(f"rank is {rank} and ranks {ranks}; give both or neither")
        rank, ranks = _place()
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank {rank} of {ranks} ranks; they are numbered from 0")
    stream = TileStream(catalog, plan, BatchShape(batch, ranks), **options)
    return TileDataset(stream, rank, start, stop, max_failed_share)


def _place() -> tuple[int, int]:
    """Rank and ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class TileDataset(IterableDataset[Any]):
    """A rank's batches: uint8 (batch / ranks, size, size, 3), step after step; with views so many of them.

    Row j of step s is the tile of index `s·batch + rank·batch/ranks + j`. An iterator begins where the last one was
    left, so that a loop that pauses (to validate, or between Lightning's epochs) repeats nothing; after the last step
    nothing comes. `budget` counts what was replaced.
    """

    def __init__(self, stream: TileStream, rank: int, start: int, stop: int | None, max_failed_share: float) -> None:
        most = sys.maxsize // stream.shape.batch
        end = most if stop is None else stop
        if not 0 <= start < end <= most:
            raise ConfigError(f"steps {start}:{stop}; give a first step of at least 0 and a later end, or none")
        self.budget = FailureBudget(max_failed_share)
        self._stream, self._rank = stream, rank
        self._stop, self._next = end, start
        self._plan = _mark(stream.plan)

    def __iter__(self) -> Iterator[Any]:
        """The batches from the next step on; each is a copy, to be written to. Of a plan with views a tuple, one each.

        Raises:
            ConfigError: in a worker of a DataLoader.
            NodeError: Ray does not start.
            StreamError: the stream stands still, gives other indices than the step's, or too many tiles failed.
        """
        if get_worker_info():
            # Each worker would start readers of its own, and begin anew with each epoch.
            raise ConfigError(
                "a DataLoader of tilestream's tiles takes num_workers=0 and batch_size=None: the reading is done by "
                "Ray's processes, for which give `torch_dataset(…, readers=(least, most))`"
            )
        stream, shape = self._stream, self._stream.shape
        if self._next >= self._stop:
            return
        node_ray.join(stream.slots)
        for batch in stream.rank_batches(self._rank, self._next, self._stop):
            first = self._next * shape.batch + self._rank * shape.micro
            if not np.array_equal(batch["index"], np.arange(first, first + shape.micro)):
                raise StreamError(
                    f"step {self._next} gave rank {self._rank} the indices {batch['index'].tolist()}, not "
                    f"{shape.micro} from {first} on; please report this"
                )
            self.budget.add(batch)
            self._next += 1
            first, *others = (batch[name].clone() for name in tile_columns(batch))
            yield (first, *others) if others else first

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: the next step, the same for all ranks, and for other numbers of them."""
        return {"step": self._next, "batch": self._stream.shape.batch, "plan": self._plan}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next iterator begins where that stood.

        Raises:
            ConfigError: it is of another batch, catalog or plan, so that its steps are other tiles.
        """
        for name, mine in self.state_dict().items():
            if name != "step" and state_dict[name] != mine:
                raise ConfigError(
                    f"a state of step {state_dict['step']} with {name} {state_dict[name]}, where this dataset's is "
                    f"{mine}: its steps are other tiles; go on with the same, or begin anew without the state"
                )
        self._next = int(state_dict["step"])


def _mark(plan: TilePlan) -> str:
    """What tells plans, and so catalogs, apart: the first tiles, and the views."""
    tiles = [plan[index] for index in range(_COMPARED)]
    return hashlib.sha256(repr((tiles, plan.views) if plan.views else tiles).encode()).hexdigest()[:16]
