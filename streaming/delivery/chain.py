"""An endless stream as a chain of segments, and the actor that makes them.

Ray Data plans all blocks of a dataset before the first (1 ms each), so a run is cut into segments: datasets that last
some minutes each, the next one opened before one ends. One small actor, the `Chain`, makes them and says how long they
are; it outlives the trainer's workers, hears the readers' pulse, and says why a stream stands still.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.data import DataIterator

from streaming import cluster
from streaming.delivery.pulses import Pulse, Pulses
from streaming.delivery.segments import Source
from streaming.errors import StreamError


@dataclass
class _Segment:
    stop: int
    """the step after its last one"""
    splits: list[DataIterator]
    present: set[int] = field(default_factory=set[int])
    """ranks that have asked for it"""
    left: set[int] = field(default_factory=set[int])

    def kill(self) -> None:
        """Ends the segment's dataset and its readers."""
        # All shares come from one actor of Ray's, which runs the dataset and owns its readers. Ray has no public way to
        # end it: it goes when nobody holds a share any more, but a rank that hangs in one holds it for ever. Hence the
        # private `_coord_actor`, of Ray 2.60.
        ray.kill(cast(Any, self.splits[0])._coord_actor)


class Chain:
    """The actor that makes segments when ranks ask for them, and drops those that all ranks have left.

    A generation is a set of ranks that started together, by a rising number; a new one (Ray Train started its workers
    again) drops what the one before had, and calls of older ones that come late are refused.
    """

    def __init__(self, source: Source) -> None:
        cluster.quiet()
        self._source, self._lock = source, threading.Lock()
        self._generation, self._segments = 0, dict[int, _Segment]()
        self._stalled: str | None = None
        self._pulses = Pulses()

    def new_generation(self) -> int:
        """Begins one; its number."""
        with self._lock:
            for segment in self._segments.values():
                segment.kill()
            self._generation, self._segments, self._stalled = self._generation + 1, {}, None
            return self._generation

    def segment(
        self, generation: int, rank: int, steps: tuple[int, int], steps_s: float | None, before: int
    ) -> tuple[int, DataIterator]:
        """A rank's share of the segment that begins with the first of some steps [start, stop), and where that ends.

        steps_s is the rate at which the segment before, of `before` steps, went; None: there is none. Of all ranks' the
        first one's counts.

        Raises:
            StreamError: the generation is not the newest one.
        """
        start, stop = steps
        with self._lock:
            if generation != self._generation:
                raise StreamError(f"generation {generation} of ranks asks for step {start}; {self._generation} runs")
            if start not in self._segments:
                stop = min(stop, start + self._source.segment_steps(steps_s, before))
                me = ray.get_runtime_context().current_actor
                dataset = self._source.dataset(start, stop, me)
                self._segments[start] = _Segment(stop, dataset.streaming_split(self._source.ranks, equal=True))
            segment = self._segments[start]
            segment.present.add(rank)
            return segment.stop, segment.splits[rank]

    def leave(self, generation: int, start: int, rank: int) -> None:
        """Notes that a rank has taken all of a segment."""
        with self._lock:
            if generation != self._generation or start not in self._segments:
                return
            segment = self._segments[start]
            segment.left.add(rank)
            if len(segment.left) == self._source.ranks:
                segment.kill()
                del self._segments[start]

    def stall(self, generation: int, rank: int, start: int, waited_s: float) -> None:
        """Ends the stream, because a rank waits for too long for a batch of the segment from step `start` on.

        `stalled` then tells all ranks why.
        """
        with self._lock:
            if generation != self._generation or self._stalled:
                return
            readers = self._source.readers
            why = self._late_rank(start) or self._pulses.diagnosis(readers.cpus, readers.labels, waited_s)
            self._stalled = f"rank {rank} waited {waited_s:,.0f} s for a batch: {why}"
            for segment in self._segments.values():
                segment.kill()

    def _late_rank(self, start: int) -> str | None:
        """Ray gives nothing of a segment before all ranks have asked for it."""
        segment = self._segments.get(start)
        absent = set(range(self._source.ranks)) - segment.present if segment else set[int]()
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


def start_chain(source: Source) -> ActorHandle[Any]:
    """The chain of a stream, on the driver's node. Its end is `ray.kill`."""
    actor: Any = ray.remote(Chain)
    return actor.options(max_concurrency=8, **cluster.beside_this()).remote(source)
