"""A rank's side of the chain: its micro-batches, segment after segment, and a watchdog over its waiting."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.data import DataIterator
from ray.exceptions import ObjectLostError, OutOfDiskError, RayActorError, RayError

from streaming.delivery.segments import Readers, Source
from streaming.errors import NodeError, StreamError

T = TypeVar("T")

# The next segment is opened when the running one lasts for so many times as long as the last opening took: that may
# take longer this time, while readers of both are at work.
_MARGIN = 2.0
# But not before this share of it: where its readers hold all slots, the next one's begin when they end, which counts as
# a long opening.
_EARLIEST = 0.75
# How often in a row a segment's dataset may be lost before any batch of it has come.
_LOSSES = 5
# An answer of the chain, which does nothing that takes time; past this its node is lost or overrun.
_ANSWER_S = 300.0


def rank_batches(
    chain: ActorHandle[Any],
    source: Source,
    rank: int,
    steps: tuple[int, int],
    read: Callable[[DataIterator], Iterator[T]],
) -> Generator[T]:
    """A rank's micro-batches of the steps [first, last), segment after segment; `read` turns a share into batches.

    chain and source are its group's. Where the chain or a segment's dataset is lost, it goes on after the last batch.

    Raises:
        StreamError: it waited for longer than `stall_s`; names the stage that stands still.
        NodeError: a node's object store is full, and so is the disk that it spills to.
    """
    start, stop = steps

    def open_segment(first: int, steps_s: float | None, before: int) -> _Opened[T]:
        asked = time.monotonic()
        answer: Any = ray.get(chain.segment.remote(source, rank, (first, stop), steps_s, before))
        segment = _Segment(chain, source, rank, (first, answer[0]), answer[1], read)
        return _Opened(segment, segment.take(), time.monotonic() - asked)

    watchdog, segment = _Watchdog(chain, source.readers, rank), None
    opening = _in_background(open_segment, start, None, 0)
    try:
        while opening:
            with watchdog.waiting(start):
                opened = opening.result()
            segment, batch = opened.segment, opened.first
            num = source.rank_blocks(segment.stop - start)
            pace, opening = Pace(num, opened.took_s), None
            # Counted: the last rank to end would ask those who have gone already whether there is more.
            for num_done in range(num):
                if not opening and segment.stop < stop and pace.is_time(num_done):
                    steps_s = pace.segments_s(num_done) * (segment.stop - start)
                    opening = _in_background(open_segment, segment.stop, steps_s, segment.stop - start)
                if num_done:
                    with watchdog.waiting(start):
                        batch = segment.take()
                yield batch
            segment.close()
            chain.leave.remote(start, rank)
            start = segment.stop
    finally:
        watchdog.done.set()
        if segment:
            segment.close()
        if opening:
            opening.add_done_callback(_close)


class _Segment(Generic[T]):
    """A rank's batches of the steps [start, stop), which come from another dataset where theirs is lost."""

    def __init__(
        self,
        chain: ActorHandle[Any],
        source: Source,
        rank: int,
        steps: tuple[int, int],
        share: DataIterator,
        read: Callable[[DataIterator], Iterator[T]],
    ) -> None:
        self._chain, self._source, self._rank, self._read = chain, source, rank, read
        self._start, self.stop = steps
        self._batches, self._num_done, self._losses = read(share), 0, 0

    def close(self) -> None:
        """Ends the batches.

        Ray tells its actors when an iterator ends. One that is left to the garbage collector may do so when this
        process has joined another Ray, which knows no such actors.
        """
        if isinstance(self._batches, Generator):
            self._batches.close()

    def take(self) -> T:
        """The next batch.

        Raises:
            RayError: it can't be had.
        """
        while True:
            try:
                batch = next(self._batches)
            # The chain, or Ray's actor that runs the dataset; or the blocks that these made or held.
            except (RayActorError, ObjectLostError):
                self._losses += 1
                if self._losses > _LOSSES:
                    raise
                asked = self._chain.again.remote(self._source, self._rank, (self._start, self.stop), self._num_done)
                answer: Any = ray.get(asked)
                assert not self._num_done or answer[0] == self.stop, "who has begun with it knows its end"
                self.stop, self._batches = answer[0], self._read(answer[1])
            else:
                self._losses, self._num_done = 0, self._num_done + 1
                return batch


@dataclass(frozen=True)
class _Opened(Generic[T]):
    """A segment that has begun, its first batch, and what its opening took."""

    segment: _Segment[T]
    first: T
    took_s: float


def _close(opening: Future[_Opened[Any]]) -> None:
    """Ends a segment that nobody waits for any more."""
    if not opening.exception():
        opening.result().segment.close()


class Pace:
    """How fast a rank goes through its batches of a segment, from now on, and when it is time to open the next one.

    Each rank judges for itself: a segment's dataset runs when the last one has asked for it.
    """

    def __init__(self, num_batches: int, opening_s: float) -> None:
        """opening_s is what opening this segment took."""
        self._num, self._opening_s, self._began = num_batches, opening_s, time.monotonic()

    def is_time(self, num_done: int) -> bool:
        """Whether to open the next segment, so many batches being done with."""
        if num_done < _EARLIEST * self._num:
            return num_done >= self._num - 1
        left_s = (time.monotonic() - self._began) / num_done * (self._num - num_done)
        return left_s <= _MARGIN * self._opening_s or num_done >= self._num - 1

    def segments_s(self, num_done: int) -> float:
        """Such segments a second; of one batch, which is not done with, what its opening took tells."""
        took_s = time.monotonic() - self._began if num_done else self._opening_s
        return max(num_done, 1) / self._num / max(took_s, 1e-3)


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

    def __init__(self, chain: ActorHandle[Any], readers: Readers, rank: int) -> None:
        self._chain, self._readers, self._rank = chain, readers, rank
        self._since: tuple[float, int] | None = None
        """since when it waits, and for which segment, by its first step"""
        self.done = threading.Event()
        if readers.stall_s is not None:
            threading.Thread(target=self._watch, args=(readers.stall_s,), daemon=True, name="watchdog").start()

    @contextlib.contextmanager
    def waiting(self, start: int) -> Generator[None]:
        """The block in which the rank waits for a batch of the segment from step `start` on.

        Raises:
            StreamError: the stream was ended meanwhile, because it stands still.
            NodeError: a node's object store is full, and so is the disk that it spills to.
        """
        self._since = time.monotonic(), start
        try:
            yield
        except OutOfDiskError as error:
            raise NodeError(
                "a node's object store is full, and so is the disk that it spills to; free some, give Ray more "
                "object_store_memory, or a larger disk by object_spilling_directory"
            ) from error
        except RayError as error:
            why: str | None = None
            with contextlib.suppress(RayError):
                why = cast(Any, ray.get(self._chain.stalled.remote(), timeout=_ANSWER_S))
            if why is None:
                raise
            raise StreamError(why) from error
        finally:
            self._since = None

    def _watch(self, stall_s: float) -> None:
        while not self.done.wait(min(1.0, stall_s / 4)):
            if (since := self._since) is None or (waited_s := time.monotonic() - since[0]) < stall_s:
                continue
            try:
                told = self._chain.stall.remote(self._readers, self._rank, since[1], waited_s)
                ray.get(told, timeout=_ANSWER_S)
            except RayError:
                ray.kill(self._chain)  # it does not answer: whoever waits for it gets an error
            return
