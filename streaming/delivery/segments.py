"""A segment of the stream: a Ray Data dataset of some steps, and where its tiles are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, Dataset

from streaming.catalog import Catalog
from streaming.delivery.reader_actor import ReaderActor
from streaming.errors import ConfigError
from streaming.plan import TilePlan
from streaming.reading.batch_reading import batches_at_once
from streaming.reading.reader import ReaderOptions

# Before the rate is known: planned in 2 s, and with 64 ranks that take a block each in 1.6 s, 50 s long.
_FIRST_BLOCKS = 2000
# So that the next segment is planned, 1 ms a block, while the last quarter of this one lasts.
_GROWTH = 4
# What Ray Data takes of the cluster's object store for blocks, where it has it alone.
_STORE_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Readers:
    """Where tiles are read, and how a stream waits for them."""

    count: tuple[int, int] = (1, 2)
    """least and most reader actors; Ray Data adds them as the consumers ask for more"""
    cpus: float = 1.0
    """CPU slots of each"""
    labels: dict[str, str] = field(default_factory=dict)
    """labels of the nodes that they run on; empty: any node"""
    segment_minutes: float = 10.0
    """how long a segment lasts, at the rate of the one before"""
    segment_blocks: int = 20_000
    """micro-batches that a segment has at most: Ray Data plans them all, 1 ms each, before the first one comes"""
    stall_s: float | None = 900.0
    """seconds that a rank waits for a batch before the run stops and says why; none: for ever"""

    def __post_init__(self) -> None:
        if not 1 <= self.count[0] <= self.count[1]:
            raise ConfigError(f"readers {self.count}: give the least and the most, the least at least 1")
        if not self.segment_minutes > 0:
            raise ConfigError(f"segment_minutes is {self.segment_minutes}; it must be above 0")
        if self.segment_blocks < 1:
            raise ConfigError(f"segment_blocks is {self.segment_blocks}; it must be at least 1")
        if self.stall_s is not None and not self.stall_s > 0:
            raise ConfigError(f"stall_s is {self.stall_s}; it must be above 0, or none for no limit")

    def part(self, first: int, stop: int, of: int) -> Readers:
        """The share of the parts [first, stop) of so many: one reader at least.

        Where the most are fewer than the shares, it takes a part of a CPU slot: all shares together must find the slots
        that the whole finds, or the last ones would wait for those that the first ones hold until their segments end.
        """

        def share(number: int) -> int:
            return number * stop // of - number * first // of

        if (most := self.count[1] * (stop - first) / of) < 1:
            return replace(self, count=(1, 1), cpus=_slots(self.cpus * most))
        return replace(self, count=(min(max(1, share(self.count[0])), share(self.count[1])), share(self.count[1])))

    def divided(self, parts: int) -> Readers:
        """One of so many equal shares, which together find room where no more than the least of the whole do."""
        least, most = self.count
        return replace(
            self,
            count=(max(1, least // parts), max(1, most // parts)),
            cpus=_slots(self.cpus * min(1.0, least / parts)),
        )


def _slots(cpus: float) -> float:
    """As Ray counts them, in ten-thousandths."""
    return max(1, math.floor(cpus * 10_000 + 1e-6)) / 10_000


def groups_of(ranks: int, ranks_per_stream: int | None) -> list[range]:
    """The ranks that share a dataset: so many each, the last ones may be fewer; none: all.

    Raises:
        ConfigError: there can't be so many.
    """
    if ranks_per_stream is not None and ranks_per_stream < 1:
        raise ConfigError(f"ranks_per_stream is {ranks_per_stream}; it must be at least 1")
    each = ranks_per_stream or ranks
    return [range(first, min(first + each, ranks)) for first in range(0, ranks, each)]


@dataclass(frozen=True)
class Source:
    """All that a segment's dataset is made of; plan and catalog are one copy a node, in shared memory.

    It is of the blocks of a group of ranks, of all or some. Which rank gets a block does not depend on the groups.
    """

    plan: ray.ObjectRef[TilePlan]
    catalog: ray.ObjectRef[Catalog]
    options: ReaderOptions
    readers: Readers
    """of the group"""
    batch: int
    micro: int
    ranks: int
    requests_per_tile: float
    """about how many requests a tile takes, where they are counted"""
    group: range
    """the ranks whose blocks these are"""

    @property
    def batches_at_once(self) -> int:
        """Batches that a reader works on."""
        return batches_at_once(self.options.requests_in_flight, self.micro, self.requests_per_tile)

    def over(self, ranks: int, micro: int) -> Source:
        """The same global batches, cut for another number of ranks."""
        return replace(self, ranks=ranks, micro=micro, group=range(ranks))

    def part(self, group: range) -> Source:
        """Of one of all ranks, that of some, with their share of the readers and of the object store."""
        return replace(self, group=group, readers=self.readers.part(group.start, group.stop, self.ranks))

    def alone(self, rank: int) -> Source:
        """Of one of a group, that of one of its ranks, beside those of the others."""
        return replace(self, group=range(rank, rank + 1), readers=self.readers.divided(len(self.group)))

    def segment_steps(self, steps_s: float | None, before: int) -> int:
        """Steps of a segment, after one of so many steps that went at that rate; None: it is the first."""
        most, blocks_a_step = self.readers.segment_blocks, self.rank_blocks(1) * len(self.group)
        if steps_s is None:
            return max(1, min(most, _FIRST_BLOCKS) // blocks_a_step)
        wanted = min(round(self.readers.segment_minutes * 60 * steps_s), _GROWTH * before)
        return max(1, min(most // blocks_a_step, wanted))

    def rank_blocks(self, num_steps: int) -> int:
        """Micro-batches that one rank gets of so many steps."""
        return num_steps * self.batch // (self.micro * self.ranks)

    def dataset(self, start: int, stop: int, chain: ActorHandle[Any] | None = None, skip: int = 0) -> Dataset:
        """The group's micro-batches of steps [start, stop), in order, one a block, with `TileReader`'s columns.

        The first ones are left out: `skip` of each rank.
        """
        least, most = self.readers.count
        # A step's blocks go round the ranks, one after the other.
        rounds = np.arange(start * self.batch, stop * self.batch, dtype=np.int64).reshape(-1, self.ranks, self.micro)
        indices = rounds[skip:, self.group.start : self.group.stop].reshape(-1, self.micro)
        # The indices are put into the object store here: `ray.data.range` would make them in tasks of its own, each of
        # which costs Ray as much as a task that reads tiles.
        blocks: list[Any] = [pa.table({"index": pa.array(row)}) for row in indices]
        dataset = ray.data.from_blocks(blocks).map_batches(
            ReaderActor,
            fn_constructor_args=(self.plan, self.catalog, self.options, chain),
            batch_size=self.micro,
            compute=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                # While one batch is decoded, the others' bytes are on their way.
                max_concurrent_calls_per_actor=self.batches_at_once,
                enable_true_multi_threading=True,
                # Two more lie ready: what a lost reader was given must be given to another one.
                max_tasks_in_flight_per_actor=self.batches_at_once + 2,
            ),
            num_cpus=self.readers.cpus,
        )
        context = dataset.context
        context.execution_options.preserve_order = True
        context.execution_options.label_selector = dict(self.readers.labels)
        # A micro-batch is a block whatever its size: Ray would cut those over 128 MiB.
        context.target_max_block_size = None
        # Ray would end a stream that nobody took from for half an hour, which is no fault: a trainer may validate.
        context.execution_no_progress_timeout_s = -1
        if len(self.group) < self.ranks:
            # Each dataset takes the object store for its own. A share of it grows with the cluster, where a number of
            # bytes (`ExecutionOptions.resource_limits`) would be that of the nodes that there were at its start.
            context.override_object_store_memory_limit_fraction = _STORE_SHARE * len(self.group) / self.ranks
        return dataset
