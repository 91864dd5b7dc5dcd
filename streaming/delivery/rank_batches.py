"""A rank's side of the chain: its micro-batches, segment after segment, and a watchdog over its waiting."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.data import DataIterator
from ray.exceptions import OutOfDiskError, RayError

from streaming.delivery.segments import Source
from streaming.errors import NodeError, StreamError

T = TypeVar("T")

# The next segment is opened when the running one lasts for so many times as long as the last opening took: that may
# take longer this time, while readers of both are at work.
_MARGIN = 2.0
# But not before this share of it: where its readers hold all slots, the next one's begin when they end, which counts as
# a long opening.
_EARLIEST = 0.75
# An answer of the chain, which does nothing that takes time; past this its node is lost or overrun.
_ANSWER_S = 300.0


def rank_batches(
    chain: ActorHandle[Any],
    source: Source,
    generation: int,
    rank: int,
    steps: tuple[int, int],
    read: Callable[[DataIterator], Iterator[T]],
) -> Iterator[T]:
    """A rank's micro-batches of the steps [first, last), segment after segment; `read` turns a share into batches.

    Raises:
        StreamError: it waited for longer than `stall_s`; names the stage that stands still.
        NodeError: a node's object store is full, and so is the disk that it spills to.
    """
    start, stop = steps

    def open_segment(first: int, steps_s: float | None, before: int) -> _Opened[T]:
        asked = time.monotonic()
        answer: Any = ray.get(chain.segment.remote(generation, rank, (first, stop), steps_s, before))
        end, share = answer
        batches = read(share)
        return _Opened(end, itertools.chain([next(batches)], batches), time.monotonic() - asked)

    watchdog = _Watchdog(chain, generation, rank, source.readers.stall_s)
    try:
        opening = _in_background(open_segment, start, None, 0)
        while opening:
            with watchdog.waiting(start):
                opened = opening.result()
            pace, opening = Pace(source.rank_blocks(opened.stop - start), opened.took_s), None
            for num_done in itertools.count():
                if not opening and opened.stop < stop and pace.is_time(num_done):
                    steps_s = pace.segments_s(num_done) * (opened.stop - start)
                    opening = _in_background(open_segment, opened.stop, steps_s, opened.stop - start)
                with watchdog.waiting(start):
                    batch = next(opened.batches, None)
                if batch is None:
                    break
                yield batch
            chain.leave.remote(generation, start, rank)
            start = opened.stop
    finally:
        watchdog.done.set()


@dataclass(frozen=True)
class _Opened(Generic[T]):
    """A segment that has begun: the step after its last one, a rank's batches, and what its opening took."""

    stop: int
    batches: Iterator[T]
    took_s: float


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

    def __init__(self, chain: ActorHandle[Any], generation: int, rank: int, stall_s: float | None) -> None:
        self._chain, self._generation, self._rank = chain, generation, rank
        self._since: tuple[float, int] | None = None
        """since when it waits, and for which segment, by its first step"""
        self.done = threading.Event()
        if stall_s is not None:
            threading.Thread(target=self._watch, args=(stall_s,), daemon=True, name="watchdog").start()

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
            if (since := self._since) is None or (waited_s := time.monotonic() - since[0]) < stall_s:
                continue
            try:
                told = self._chain.stall.remote(self._generation, self._rank, since[1], waited_s)
                ray.get(told, timeout=_ANSWER_S)
            except RayError:
                ray.kill(self._chain)  # it does not answer: whoever waits for it gets an error
            return
