"""An endless stream as a chain of Ray Data datasets, and its watchdog.

Ray Data plans all blocks of a dataset before the first (1 ms each), so a run is cut into segments: datasets of a
bounded number of blocks, the next one warm before the last one ends. One small actor, the `Chain`, makes them; it
outlives the trainer's workers, hears the readers' pulse, and says why a stream stands still.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataIterator, Dataset
from ray.exceptions import OutOfDiskError, RayError

from streaming import cluster
from streaming.catalog import Catalog
from streaming.delivery.pulses import Pulse, Pulses
from streaming.delivery.reader_actor import ReaderActor
from streaming.errors import ConfigError, NodeError, StreamError
from streaming.plan import TilePlan
from streaming.reading.reader import ReaderOptions

T = TypeVar("T")

# The next segment starts this long before the last one ends: to plan 2,000 blocks, start readers and read the first
# batches took 6 s on two cores, and nodes may have to be waited for.
_WARM_S = 30.0
# An answer of the chain, which does nothing that takes time; past this its node is lost or overrun.
_ANSWER_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Readers:
    """Where tiles are read, and how a stream waits for them."""

    count: tuple[int, int] = (1, 2)
    """least and most reader actors; Ray Data adds them as the consumers ask for more"""
    cpus: float = 1.0
    """CPU slots of each"""
    labels: dict[str, str] = field(default_factory=dict)
    """labels of the nodes that they run on; empty: any node"""
    segment_blocks: int = 2000
    """micro-batches that Ray Data plans at once"""
    stall_s: float | None = 900.0
    """seconds that a rank waits for a batch before the run stops and says why; none: for ever"""

    def __post_init__(self) -> None:
        if not 1 <= self.count[0] <= self.count[1]:
            raise ConfigError(f"readers {self.count}: give the least and the most, the least at least 1")
        if self.segment_blocks < 1:
            raise ConfigError(f"segment_blocks is {self.segment_blocks}; it must be at least 1")
        if self.stall_s is not None and not self.stall_s > 0:
            raise ConfigError(f"stall_s is {self.stall_s}; it must be above 0, or none for no limit")


@dataclass(frozen=True)
class Source:
    """All that a segment's dataset is made of; plan and catalog are one copy a node, in shared memory."""

    plan: ray.ObjectRef[TilePlan]
    catalog: ray.ObjectRef[Catalog]
    options: ReaderOptions
    readers: Readers
    batch: int
    micro: int
    ranks: int

    @property
    def segment_steps(self) -> int:
        """Steps of a segment."""
        return max(1, self.readers.segment_blocks * self.micro // self.batch)

    def dataset(self, start: int, stop: int, chain: ActorHandle[Any] | None = None) -> Dataset:
        """The micro-batches of steps [start, stop), in order, one a block, with `TileReader`'s columns."""
        least, most = self.readers.count
        indices = np.arange(start * self.batch, stop * self.batch, dtype=np.int64).reshape(-1, self.micro)
        # Put, not read: tasks of their own for a few bytes cost Ray as much as the readers' do.
        blocks: list[Any] = [pa.table({"index": pa.array(row)}) for row in indices]
        dataset = ray.data.from_blocks(blocks).map_batches(
            ReaderActor,
            fn_constructor_args=(self.plan, self.catalog, self.options, chain),
            batch_size=self.micro,
            compute=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                # While one batch is decoded, the other's bytes are on their way.
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
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
        return dataset


@dataclass
class _Segment:
    splits: list[DataIterator]
    present: set[int] = field(default_factory=set[int])
    """ranks that have asked for it"""
    left: set[int] = field(default_factory=set[int])

    def kill(self) -> None:
        # The actor behind the splits runs the dataset and owns its readers. Once it has no handle Ray ends it too, but
        # a rank that hangs in it has one.
        ray.kill(cast(Any, self.splits[0])._coord_actor)


class Chain:
    """The actor that makes segments when ranks ask for them, and drops those that all ranks have left.

    A generation is a set of ranks that started together; a new one (Ray Train started its workers again) drops what the
    one before had.
    """

    def __init__(self, source: Source) -> None:
        cluster.quiet()
        self._source, self._lock = source, threading.Lock()
        self._generation, self._segments = "", dict[int, _Segment]()
        self._stalled: str | None = None
        self._pulses = Pulses()

    def segment(self, generation: str, start: int, stop: int, rank: int) -> DataIterator:
        """A rank's share of the steps [start, stop)."""
        with self._lock:
            if generation != self._generation:
                for segment in self._segments.values():
                    segment.kill()
                self._generation, self._segments, self._stalled = generation, {}, None
            if start not in self._segments:
                me = ray.get_runtime_context().current_actor
                dataset = self._source.dataset(start, stop, me)
                self._segments[start] = _Segment(dataset.streaming_split(self._source.ranks, equal=True))
            segment = self._segments[start]
            segment.present.add(rank)
            return segment.splits[rank]

    def leave(self, generation: str, start: int, rank: int) -> None:
        """Notes that a rank has taken all of a segment."""
        with self._lock:
            if generation != self._generation or start not in self._segments:
                return
            segment = self._segments[start]
            segment.left.add(rank)
            if len(segment.left) == self._source.ranks:
                segment.kill()
                del self._segments[start]

    def stall(self, generation: str, rank: int, waited_s: float) -> None:
        """Ends the stream, because a rank waits for too long; `stalled` then tells all ranks why."""
        with self._lock:
            if generation != self._generation or self._stalled:
                return
            missing = {
                start: sorted(set(range(self._source.ranks)) - segment.present)
                for start, segment in self._segments.items()
            }
            late = [f"rank {ranks[0]} has not asked for step {start}" for start, ranks in missing.items() if ranks]
            why = (
                late[0]
                if late
                else self._pulses.diagnosis(self._source.readers.cpus, self._source.readers.labels, waited_s)
            )
            self._stalled = f"rank {rank} waited {waited_s:,.0f} s for a batch: {why}"
            for segment in self._segments.values():
                segment.kill()

    def stalled(self) -> str | None:
        """Why the stream was ended, if it was."""
        return self._stalled

    def pulse(self, reader: str, pulse: Pulse) -> None:
        """A reader's sign of life."""
        self._pulses.add(reader, pulse)

    def begin(self, index: int) -> int:
        """Notes that a reader that was started again begins the batch at an index; how often that was begun before."""
        return self._pulses.begin(index)

    def end(self, index: int) -> None:
        """Notes that it came to its end."""
        self._pulses.end(index)

    def live_segments(self) -> list[int]:
        """First steps of the segments that are not yet dropped."""
        return sorted(self._segments)


def start_chain(source: Source) -> ActorHandle[Any]:
    """The chain of a stream, on the driver's node. Its end is `ray.kill`."""
    actor: Any = ray.remote(Chain)
    return actor.options(max_concurrency=8, **cluster.beside_this()).remote(source)


def chained(
    chain: ActorHandle[Any],
    source: Source,
    generation: str,
    rank: int,
    steps: tuple[int, int],
    read: Callable[[DataIterator], Iterator[T]],
) -> Iterator[T]:
    """A rank's micro-batches of the steps [first, last), segment after segment; `read` turns a share into batches.

    Raises:
        StreamError: it waited for longer than `stall_s`; names the stage that stands still.
    """
    start, stop = steps
    bounds = list(itertools.pairwise([*range(start, stop, source.segment_steps), stop]))
    per_segment = source.segment_steps * source.batch // (source.micro * source.ranks)

    def open_segment(first: int, last: int) -> Iterator[T]:
        share: Any = ray.get(chain.segment.remote(generation, first, last, rank))
        batches = read(share)
        return itertools.chain([next(batches)], batches)

    watchdog = _Watchdog(chain, generation, rank, source.readers.stall_s)
    try:
        coming = _in_background(open_segment, *bounds[0])
        for number, (first, _) in enumerate(bounds):
            upcoming = bounds[number + 1] if number + 1 < len(bounds) else None
            with watchdog.waiting():
                batches = coming.result()
            began = time.monotonic()
            for taken in itertools.count(1):
                # Each rank does this by its own clock: the dataset starts when the last one has.
                if upcoming and (time.monotonic() - began) / taken * (per_segment - taken) <= _WARM_S:
                    coming, upcoming = _in_background(open_segment, *upcoming), None
                with watchdog.waiting():
                    batch = next(batches, None)
                if batch is None:
                    break
                yield batch
            chain.leave.remote(generation, first, rank)
    finally:
        watchdog.done.set()


def _in_background(work: Callable[..., T], *arguments: Any) -> Future[T]:
    """What an executor does, in a thread that the interpreter does not wait for when it leaves."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="next segment").start()
    return future


class _Watchdog:
    """Looks from a thread of its own whether its rank waits for too long; then the chain ends the stream."""

    def __init__(self, chain: ActorHandle[Any], generation: str, rank: int, stall_s: float | None) -> None:
        self._chain, self._generation, self._rank = chain, generation, rank
        self._since: float | None = None
        self.done = threading.Event()
        if stall_s is not None:
            threading.Thread(target=self._watch, args=(stall_s,), daemon=True, name="watchdog").start()

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """The block in which the rank waits.

        Raises:
            StreamError: the stream was ended meanwhile, because it stands still.
            NodeError: a node's object store is full, and so is the disk that it spills to.
        """
        self._since = time.monotonic()
        try:
            yield
        except OutOfDiskError as error:
            raise NodeError(
                "a node's object store is full, and so is the disk that it spills to; free some, give Ray more "
                "object_store_memory, or a larger disk by object_spilling_directory"
            ) from error
        except RayError as error:
            why = None
            with contextlib.suppress(RayError):
                why = ray.get(self._chain.stalled.remote(), timeout=_ANSWER_S)
            if why is None:
                raise
            raise StreamError(why) from error
        finally:
            self._since = None

    def _watch(self, stall_s: float) -> None:
        while not self.done.wait(min(1.0, stall_s / 4)):
            since = self._since
            if since is None or time.monotonic() - since < stall_s:
                continue
            try:
                waited_s = time.monotonic() - since
                ray.get(self._chain.stall.remote(self._generation, self._rank, waited_s), timeout=_ANSWER_S)
            except RayError:
                ray.kill(self._chain)  # it does not answer: whoever waits for it gets an error
            return
