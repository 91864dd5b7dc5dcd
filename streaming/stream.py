"""The stream: Ray Data carries the plan's tiles, step by step, to every rank.

`range(first index, last index) → reader actors → streaming_split over the ranks`, in order and in blocks of one
micro-batch, so that step s is the indices [s·G, (s+1)·G) of global batch G, whatever the number of ranks and readers.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataIterator, Dataset
from ray.data.collate_fn import NumpyBatchCollateFn

from streaming.catalog import Catalog
from streaming.errors import ConfigError, StreamError
from streaming.plan import TilePlan
from streaming.reader import Batch, ReaderOptions, TileReader


@dataclass(frozen=True)
class BatchShape:
    """How a global batch of tiles is cut: into `accumulate` rounds of one micro-batch a rank.

    Raises:
        ConfigError: the ranks and rounds don't divide the batch; names the nearest batches that they do.
    """

    batch: int
    ranks: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if min(self.batch, self.ranks, self.accumulate) < 1:
            raise ConfigError(f"batch {self.batch}, ranks {self.ranks}, accumulate {self.accumulate}: all must be ≥ 1")
        parts = self.ranks * self.accumulate
        if self.batch % parts:
            below = self.batch // parts * parts
            near = f"{below} or {below + parts}" if below else f"{parts}"
            raise ConfigError(
                f"batch {self.batch} can't be divided over {self.ranks} ranks × {self.accumulate} accumulation rounds; "
                f"take {near}"
            )

    @property
    def micro(self) -> int:
        """Tiles that a rank gets at once."""
        return self.batch // (self.ranks * self.accumulate)


class TileStream:
    """The tiles of a plan, in steps of a global batch, through Ray Data.

    readers is the least and the most reader actors; Ray Data adds them as the consumers ask for more. Each takes
    `reader_cpus` CPU slots.
    """

    def __init__(
        self,
        catalog: Catalog,
        plan: TilePlan,
        shape: BatchShape,
        *,
        reader: ReaderOptions | None = None,
        readers: tuple[int, int] = (1, 2),
        reader_cpus: float = 1.0,
    ) -> None:
        if not 1 <= readers[0] <= readers[1]:
            raise ConfigError(f"readers {readers}: give the least and the most, the least at least 1")
        self.catalog, self.plan, self.shape = catalog, plan, shape
        self.reader = reader or ReaderOptions()
        self._readers, self._reader_cpus = readers, reader_cpus

    def dataset(self, start: int, stop: int) -> Dataset:
        """The micro-batches of steps [start, stop), in order, one a block, with `TileReader`'s columns.

        Raises:
            ConfigError: no step lies between start and stop.
        """
        if not 0 <= start < stop:
            raise ConfigError(f"steps {start}:{stop}; give a first step of at least 0 and a later end")
        first, count = start * self.shape.batch, (stop - start) * self.shape.batch
        dataset = ray.data.range(count, override_num_blocks=count // self.shape.micro).map_batches(
            _ReaderActor,
            fn_constructor_args=(first, ray.put(self.plan), ray.put(self.catalog), self.reader),
            batch_size=self.shape.micro,
            compute=ActorPoolStrategy(
                min_size=self._readers[0],
                max_size=self._readers[1],
                # While one batch is decoded, the other's bytes are on their way.
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
            num_cpus=self._reader_cpus,
        )
        dataset.context.execution_options.preserve_order = True
        # A micro-batch is a block whatever its size: Ray would cut those over 128 MiB.
        dataset.context.target_max_block_size = None
        return dataset

    def local_batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The same micro-batches read in this process, without Ray: for one rank, and for a debugger."""
        reader = TileReader(self.plan, self.catalog, self.reader)
        micro = self.shape.micro
        for first in range(start * self.shape.batch, stop * self.shape.batch, micro):
            yield TorchCollate()(reader({"index": np.arange(first, first + micro, dtype=np.int64)}))

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Each step's micro-batches, pulled over all ranks at once by this process; every rank has its own iterator."""
        splits = self.dataset(start, stop).streaming_split(self.shape.ranks, equal=True)
        with ThreadPoolExecutor(self.shape.ranks) as pool:
            rounds = [_numpy_batches(split, self.shape.micro) for split in splits]
            for step in range(start, stop):
                batches: list[Batch] = []
                for _ in range(self.shape.accumulate):
                    # The splits start together: asked for one after the other, the first would wait forever.
                    batches += list(pool.map(_next, rounds))
                check_step(step, self.shape.batch, np.concatenate([batch["index"] for batch in batches]))
                yield batches


def _numpy_batches(shard: DataIterator, micro: int) -> Iterator[Batch]:
    return iter(cast("Iterable[Batch]", shard.iter_batches(batch_size=micro, batch_format="numpy")))


def _next(batches: Iterator[Batch]) -> Batch:
    return next(batches)


class _ReaderActor:
    """A TileReader behind a range of Ray Data, whose ids count from the first index."""

    def __init__(
        self,
        first: int,
        plan: ray.ObjectRef[TilePlan],
        catalog: ray.ObjectRef[Catalog],
        options: ReaderOptions,
    ) -> None:
        self._first = first
        self._read = TileReader(plan, catalog, options)
        # What was imported stays: there is no use in looking through it again and again.
        gc.freeze()

    def __call__(self, batch: Batch) -> Batch:
        return self._read({"index": batch["id"] + self._first})


class TorchCollate(NumpyBatchCollateFn):
    """A reader's batch with tensors for numbers (no copy) and lists for texts."""

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Columns as tensors, `failures` and `stages` as lists of strings."""
        # Reader actors import this module too: without torch they start two seconds earlier and are 200 MB smaller.
        from ray.data.util.torch_utils import convert_ndarray_to_torch_tensor

        return {
            name: convert_ndarray_to_torch_tensor(column) if column.dtype.kind in "buif" else [str(x) for x in column]
            for name, column in batch.items()
        }


def torch_batches(shard: DataIterator, micro: int, prefetch: int = 2) -> Iterator[dict[str, Any]]:
    """A rank's micro-batches as tensors on the host, the next ones fetched meanwhile."""
    batches: Iterable[Any] = shard.iter_torch_batches(
        batch_size=micro, prefetch_batches=prefetch, collate_fn=TorchCollate(), device="cpu"
    )
    return iter(batches)


def check_step(step: int, batch: int, index: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """Makes sure that a step got exactly its indices [step·batch, (step+1)·batch), each once.

    Raises:
        StreamError: it did not; training on would break the promise that a run can be repeated.
    """
    wanted = np.arange(step * batch, (step + 1) * batch)
    got = np.sort(index)
    if not np.array_equal(got, wanted):
        raise StreamError(
            f"step {step} got {len(got)} indices from {got[:1]} to {got[-1:]}, not {wanted[0]} to {wanted[-1]}; "
            "the stream lost its order: please report this"
        )


def step_digest(batches: Sequence[Batch]) -> str:
    """SHA-256 of a step's tiles in the order of their indices: the same for any number of ranks and readers."""
    index = np.concatenate([batch["index"] for batch in batches])
    tiles = [tile for batch in batches for tile in batch["tile"]]
    digest = hashlib.sha256()
    for at in np.argsort(index):
        digest.update(np.ascontiguousarray(tiles[at]).data)
    return digest.hexdigest()
