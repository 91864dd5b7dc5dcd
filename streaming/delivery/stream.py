"""The stream: Ray Data carries the plan's tiles, step by step, to every rank.

`indices → reader actors → streaming_split over the ranks`, in order and in blocks of one
micro-batch, so that step s is the indices [s·G, (s+1)·G) of global batch G, whatever the number of ranks and readers,
and however the run is cut into segments (`streaming/delivery/chain.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, cast

import numpy as np
import ray
from ray.data import DataIterator, Dataset
from ray.data.collate_fn import NumpyBatchCollateFn

from streaming.catalog import Catalog
from streaming.delivery.chain import start_chain
from streaming.delivery.rank_batches import rank_batches
from streaming.delivery.segments import Readers, Source, groups_of
from streaming.errors import ConfigError, StreamError
from streaming.plan import TilePlan
from streaming.reading.batch import Batch, tile_columns
from streaming.reading.filters import TileRules
from streaming.reading.reader import ReaderOptions, TileReader


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

    readers is the least and the most reader actors; Ray Data adds them as the consumers ask for more. So many ranks as
    ranks_per_stream says share a dataset, by default all; the steps are the same. For the rest see `segments.Readers`.
    """

    def __init__(
        self,
        catalog: Catalog,
        plan: TilePlan,
        shape: BatchShape,
        *,
        reader: ReaderOptions | None = None,
        readers: tuple[int, int] = Readers.count,
        reader_cpus: float = Readers.cpus,
        reader_labels: Mapping[str, str] | None = None,
        segment_minutes: float = Readers.segment_minutes,
        segment_blocks: int = Readers.segment_blocks,
        stall_s: float | None = Readers.stall_s,
        ranks_per_stream: int | None = None,
    ) -> None:
        self.catalog, self.plan, self.shape = catalog, plan, shape
        self._groups = groups_of(shape.ranks, ranks_per_stream)
        self.reader = reader or ReaderOptions()
        TileRules(plan, self.reader.hsv_rule, self.reader.filters)  # what makes no sense is told here
        self._readers = Readers(
            count=readers,
            cpus=reader_cpus,
            labels=dict(reader_labels or {}),
            segment_minutes=segment_minutes,
            segment_blocks=segment_blocks,
            stall_s=stall_s,
        )

    @property
    def slots(self) -> int:
        """CPU slots that the stream takes at most."""
        return math.ceil(self._readers.count[1] * self._readers.cpus) + 1

    @cached_property
    def source(self) -> Source:
        """The stream's parts in Ray's shared memory, one copy a node for all readers."""
        plan, catalog, shape = ray.put(self.plan), ray.put(self.catalog.for_readers()), self.shape
        # Of a tile as large as a scanner's blocks; larger ones have more.
        requests_per_tile = (1 if self.plan.corners == "blocks" else 2) * self.plan.num_views
        return Source(
            plan,
            catalog,
            self.reader,
            self._readers,
            shape.batch,
            shape.micro,
            shape.ranks,
            requests_per_tile,
            group=range(shape.ranks),
        )

    def dataset(self, start: int, stop: int) -> Dataset:
        """The micro-batches of steps [start, stop), all planned at once; `steps` plans them in segments.

        Raises:
            ConfigError: no step lies between start and stop.
        """
        check_steps(start, stop)
        return self.source.dataset(start, stop)

    def local_batches(self, start: int, stop: int, rank: int | None = None) -> Iterator[dict[str, Any]]:
        """The same micro-batches read in this process, without Ray, in order: those of a rank, or of all."""
        reader = TileReader(self.plan, self.catalog, self.reader)
        micro, ranks = self.shape.micro, self.shape.ranks
        every, offset = (1, 0) if rank is None else (ranks, rank)
        for first in range(start * self.shape.batch + offset * micro, stop * self.shape.batch, every * micro):
            yield TorchCollate()(reader({"index": np.arange(first, first + micro, dtype=np.int64)}))

    def rank_batches(self, rank: int, start: int, stop: int) -> Generator[dict[str, Any]]:
        """The same of one rank, as tensors, through a chain of its own: it waits for no other rank.

        Raises:
            ConfigError: no step lies between start and stop.
            StreamError: the stream stands still (see `segments.Readers.stall_s`).
        """
        check_steps(start, stop)
        part = self.source.part(range(rank, rank + 1))
        chain = start_chain()
        read = partial(torch_batches, micro=self.shape.micro)
        try:
            # Counted, so that it does not tell the chain of its end, which would be under way when that is killed.
            yield from islice(rank_batches(chain, part, rank, (start, stop), read), part.rank_blocks(stop - start))
        finally:
            ray.kill(chain)

    def steps(self, start: int, stop: int) -> Generator[list[Batch]]:
        """Each step's micro-batches, pulled over all ranks at once by this process; every rank has its own iterator.

        Raises:
            ConfigError: no step lies between start and stop.
            StreamError: the stream stands still (see `segments.Readers.stall_s`), or hardly any tile passes.
        """
        check_steps(start, stop)
        shape, source = self.shape, self.source
        parts = [source.part(group) for group in self._groups]
        chains = [start_chain() for _ in parts]
        read = partial(_numpy_batches, micro=shape.micro)
        ranks = [
            rank_batches(chain, part, rank, (start, stop), read)
            for chain, part in zip(chains, parts, strict=True)
            for rank in part.group
        ]
        try:
            with ThreadPoolExecutor(shape.ranks) as pool:
                for step in range(start, stop):
                    batches: list[Batch] = []
                    for _ in range(shape.accumulate):
                        # All ranks ask at once: Ray starts a segment when the last one has asked.
                        batches += list(pool.map(_next, ranks))
                    check_step(step, shape.batch, np.concatenate([batch["index"] for batch in batches]))
                    yield batches
        finally:
            for rank in ranks:
                rank.close()
            for chain in chains:
                ray.kill(chain)


def check_steps(start: int, stop: int) -> None:
    """Refuses a span without a step.

    Raises:
        ConfigError: no step lies between start and stop.
    """
    if not 0 <= start < stop:
        raise ConfigError(f"steps {start}:{stop}; give a first step of at least 0 and a later end")


def _numpy_batches(shard: DataIterator, micro: int) -> Iterator[Batch]:
    return iter(cast("Iterable[Batch]", shard.iter_batches(batch_size=micro, batch_format="numpy")))


def _next(batches: Iterator[Batch]) -> Batch:
    return next(batches)


class TorchCollate(NumpyBatchCollateFn):
    """A reader's batch with tensors for columns of numbers, without a copy."""

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Numbers as tensors, `failures` and `counters` as they are."""
        # Reader actors import this module too: without torch they start two seconds earlier and are 200 MB smaller.
        from ray.data.util.torch_utils import convert_ndarray_to_torch_tensor

        return {
            name: convert_ndarray_to_torch_tensor(column) if column.dtype.kind in "buif" else column
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
    """SHA-256 of a step's tiles in the order of their indices: the same for any number of ranks and readers.

    Of an index all views, one after another.
    """
    index = np.concatenate([batch["index"] for batch in batches])
    columns = tile_columns(batches[0])
    samples = [tiles for batch in batches for tiles in zip(*(batch[name] for name in columns), strict=True)]
    digest = hashlib.sha256()
    for at in np.argsort(index):
        for tile in samples[at]:
            digest.update(np.ascontiguousarray(tile).data)
    return digest.hexdigest()
