"""A rank's side of the chain: its micro-batches, segment after segment, and a watchdog over its waiting."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.data import DataIterator
from ray.exceptions import OutOfDiskError, RayError

from streaming.delivery.segments import Source
from streaming.errors import NodeError, StreamError

T = TypeVar("T")

# The next segment is opened when the running one should last this long or less (`_seconds_left` says how that is
# estimated): to plan 2,000 blocks, start readers and read the first batches took 6 s on two cores, and nodes may have
# to be waited for.
_WARM_S = 30.0
# An answer of the chain, which does nothing that takes time; past this its node is lost or overrun.
_ANSWER_S = 300.0


def rank_batches(
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
        NodeError: a node's object store is full, and so is the disk that it spills to.
    """
    start, stop = steps
    segments = list(itertools.pairwise([*range(start, stop, source.segment_steps), stop]))
    # After the last segment no other is opened.
    following = [*segments[1:], None]

    def open_segment(first: int, last: int) -> Iterator[T]:
        share: Any = ray.get(chain.segment.remote(generation, first, last, rank))
        batches = read(share)
        return itertools.chain([next(batches)], batches)

    watchdog = _Watchdog(chain, generation, rank, source.readers.stall_s)
    try:
        opening = _in_background(open_segment, *segments[0])
        for (first, _), upcoming in zip(segments, following, strict=True):
            with watchdog.waiting():
                batches = opening.result()
            began = time.monotonic()
            for num_taken in itertools.count(1):
                if upcoming and _seconds_left(began, num_taken, source.segment_blocks) <= _WARM_S:
                    opening, upcoming = _in_background(open_segment, *upcoming), None
                with watchdog.waiting():
                    batch = next(batches, None)
                if batch is None:
                    break
                yield batch
            chain.leave.remote(generation, first, rank)
    finally:
        watchdog.done.set()


def _seconds_left(began: float, num_taken: int, num_batches: int) -> float:
    """How long a segment will last that began at that time, of so many batches, the num_taken-th being asked for.

    Each rank estimates this for itself; a segment's dataset runs when the last rank has asked for it. Before the first
    batch hardly any time has passed, so the estimate is about 0: as it stands, the next segment is opened together
    with the first batch of the running one.
    """
    return (time.monotonic() - began) / num_taken * (num_batches - num_taken)


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
