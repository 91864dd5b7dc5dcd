"""An endless stream as a chain of segments, and the actor that makes them.

Ray Data plans all blocks of a dataset before the first (1 ms each), so a run is cut into segments: datasets that last
some minutes each, the next one opened before one ends. One small actor, the `Chain`, makes them for a group of ranks
and says how long they are, hears the readers' pulse, and says why a stream stands still. Each group has its own, beside
its ranks: nothing is central.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.data import DataIterator

from streaming import cluster
from streaming.delivery.pulses import Pulse, Pulses
from streaming.delivery.segments import Readers, Source
from streaming.errors import StreamError

# More than there are at a time: one that ends, one that runs, and one that begins.
_NAMES = 4


@dataclass
class _Segment:
    stop: int
    """the step after its last one"""
    group: range
    """its ranks"""
    shares: dict[int, DataIterator]
    """by rank"""
    is_lost: bool = False
    """whether each rank has a dataset of its own for the rest of it"""
    left: set[int] = field(default_factory=set[int])

    def kill(self) -> None:
        """Ends the segment's datasets and their readers."""
        # Shares come from an actor of Ray's, which runs the dataset and owns its readers. Ray has no public way to end
        # it: it goes when nobody holds a share any more, but a rank that hangs in one holds it for ever. Hence the
        # private `_coord_actor`, of Ray 2.60.
        for coordinator in {cast(Any, share)._coord_actor for share in self.shares.values()}:
            ray.kill(coordinator)


class Chain:
    """The actor that makes a group's segments when its ranks ask for them, and drops those that all of them have left.

    Nothing that it knows is needed to go on: where it dies, its segments' datasets end with it, Ray starts it again,
    and each rank tells how far it has come (`again`). So the source comes with each call, too: Ray does not keep the
    plan and the catalog, which are objects in its memory, for a constructor that it may have to call again (ray#53727).
    """

    def __init__(self) -> None:
        cluster.quiet()
        self._lock = threading.Lock()
        self._segments = dict[int, _Segment]()
        self._asked = defaultdict[int, set[int]](set)
        """the ranks that have asked for a segment, by its first step: also those whose call waits for its making"""
        self._made = Counter[range]()
        """datasets so far, by the ranks that they are for"""
        self._stalled: str | None = None
        self._pulses = Pulses()

    def segment(
        self, source: Source, rank: int, steps: tuple[int, int], steps_s: float | None, before: int
    ) -> tuple[int, DataIterator]:
        """A rank's share of the segment that begins with the first of some steps [start, stop), and where that ends.

        steps_s is the rate at which the segment before, of `before` steps, went; None: there is none. Of all ranks' the
        first one's counts.
        """
        start, stop = steps
        self._asked[start].add(rank)
        with self._lock:
            if start not in self._segments:
                stop = min(stop, start + source.segment_steps(steps_s, before))
                shares = self._split(source, start, stop, len(source.group))
                self._segments[start] = _Segment(stop, source.group, dict(zip(source.group, shares, strict=True)))
            segment = self._segments[start]
            if segment.is_lost:
                segment.shares[rank] = self._rest(source, start, segment.stop, rank, 0)
            return segment.stop, segment.shares[rank]

    def again(self, source: Source, rank: int, steps: tuple[int, int], num_done: int) -> tuple[int, DataIterator]:
        """A rank's share of a segment [start, stop) whose dataset was lost, without the batches that it has.

        A dataset of all ranks would begin when all have asked for it; but one that still has a batch may wait, in the
        middle of a step, for another one that has none. So each gets its own for the rest of the segment.

        Raises:
            StreamError: the stream was ended, because it stood still.
        """
        start, stop = steps
        with self._lock:
            if self._stalled:
                raise StreamError(self._stalled)
            # Where nobody has begun with it, one that this chain made since it was started again may be shorter.
            segment = self._segments.setdefault(start, _Segment(stop, source.group, {}, is_lost=True))
            if not segment.is_lost:
                # The others', if they have asked, are lost, too, or would wait for this rank for ever.
                segment.kill()
                segment.is_lost, segment.shares = True, {}
            segment.shares[rank] = self._rest(source, start, segment.stop, rank, num_done)
            return segment.stop, segment.shares[rank]

    def _rest(self, source: Source, start: int, stop: int, rank: int, num_done: int) -> DataIterator:
        return self._split(source.alone(rank), start, stop, 1, num_done)[0]

    def _split(self, source: Source, start: int, stop: int, shares: int, skip: int = 0) -> list[DataIterator]:
        """A dataset's shares, by one of a few names that come again and again.

        Ray (2.60) shows some hundred series of metrics of each dataset, for ever, and keeps a log of each.
        """
        dataset, number = source.dataset(start, stop, _this(), skip), self._made[source.group]
        self._made[source.group] += 1
        dataset.set_name("tilestream")
        name = f"{ray.get_runtime_context().get_actor_id()}_{source.group.start}_{len(source.group)}_{number % _NAMES}"
        cast(Any, dataset)._set_uuid(name)  # there is no public way
        dataset.context.use_legacy_dataset_ids = True  # or the actor that runs it makes one up
        return dataset.streaming_split(shares, equal=True)

    def leave(self, start: int, rank: int) -> None:
        """Notes that a rank has taken all of a segment."""
        with self._lock:
            if start not in self._segments:
                return
            segment = self._segments[start]
            segment.left.add(rank)
            if len(segment.left) == len(segment.group):
                segment.kill()
                del self._segments[start]
                self._asked.pop(start, None)

    def stall(self, readers: Readers, rank: int, start: int, waited_s: float) -> None:
        """Ends the stream, because a rank waits for too long for a batch of the segment from step `start` on.

        `stalled` then tells all ranks why.
        """
        with self._lock:
            if self._stalled:
                return
            why = self._late_rank(rank, start) or self._pulses.diagnosis(readers.cpus, readers.labels, waited_s)
            self._stalled = f"rank {rank} waited {waited_s:,.0f} s for a batch: {why}"
            for segment in self._segments.values():
                segment.kill()

    def _late_rank(self, rank: int, start: int) -> str | None:
        """The one that a rank waits for: Ray gives nothing of a segment before all have asked for it."""
        segment = self._segments.get(start)
        if segment is None or segment.is_lost:
            return None
        absent = set(segment.group) - self._asked[start] - {rank}
        return f"rank {min(absent)} has not asked for step {start}" if absent else None

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


def start_chain(name: str | None = None) -> ActorHandle[Any]:
    """A chain on this process's node; by a name, all that ask for it get the same one.

    It ends with the process that asked first, or by `ray.kill`; else it is started again.
    """
    actor: Any = ray.remote(Chain)
    named = {"name": name, "get_if_exists": True} if name else {}
    lasting = {"max_restarts": -1, "max_task_retries": -1}
    return actor.options(max_concurrency=8, **lasting, **named, **cluster.beside_this()).remote()


def _this() -> ActorHandle[Any]:
    return ray.get_runtime_context().current_actor
