"""An endless stream as a chain of segments, and the actor that makes them.

Ray Data plans all blocks of a dataset before the first (1 ms each), so a run is cut into segments: datasets of a
bounded number of blocks, the next one opened while one runs. One small actor, the `Chain`, makes them; it outlives the
trainer's workers, hears the readers' pulse, and says why a stream stands still.
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


@dataclass
class _Segment:
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
            readers = self._source.readers
            why = self._late_rank() or self._pulses.diagnosis(readers.cpus, readers.labels, waited_s)
            self._stalled = f"rank {rank} waited {waited_s:,.0f} s for a batch: {why}"
            for segment in self._segments.values():
                segment.kill()

    def _late_rank(self) -> str | None:
        for start, segment in self._segments.items():
            for rank in range(self._source.ranks):
                if rank not in segment.present:
                    return f"rank {rank} has not asked for step {start}"
        return None

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
