"""What readers tell of themselves while they work: signs of life, and batches that may have killed their process."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

PULSE_S = 2.0
# Whoever was not heard for so long is gone, and what takes so long is why a stream stands still.
_LATE_S = 15.0
# Readers end with their segment: an endless run must not remember them all.
_FORGOTTEN_S = 3600.0


@dataclass(frozen=True)
class Pulse:
    """A reader's sign of life; durations, not times, because clocks differ from node to node."""

    node: str
    """Ray's id of its node"""
    index: int | None = None
    """first index of the batch that it has worked on for longest; none: it is idle"""
    busy_s: float = 0.0
    """for how long"""
    request: str | None = None
    """address of the request to the storage that has been under way for longest"""
    request_s: float = 0.0
    """for how long"""


class Pulses:
    """Each reader's last pulse, and how often a batch was begun and not ended; safe to use from several threads."""

    def __init__(self) -> None:
        self._heard: OrderedDict[str, tuple[float, Pulse]] = OrderedDict()
        """the one that was heard last at the end"""
        self._begun: Counter[int] = Counter()
        self._lock = threading.Lock()

    def add(self, reader: str, pulse: Pulse) -> None:
        """Takes a reader's pulse; takes as long for a thousand readers as for one."""
        with self._lock:
            now = time.monotonic()
            self._heard[reader] = now, pulse
            self._heard.move_to_end(reader)
            while now - next(iter(self._heard.values()))[0] > _FORGOTTEN_S:
                self._heard.popitem(last=False)

    def begin(self, index: int) -> int:
        """How often the batch at an index was begun before and has not come to its end."""
        with self._lock:
            self._begun[index] += 1
            return self._begun[index] - 1

    def end(self, index: int) -> None:
        """Forgets a batch."""
        with self._lock:
            del self._begun[index]

    def diagnosis(self, cpus: float, labels: Mapping[str, str], waited_s: float) -> str:
        """Why no batch has come for a time, in half a sentence with the next action.

        cpus and labels are what a reader needs of a node.
        """
        now, late_s = time.monotonic(), min(_LATE_S, max(waited_s / 2, 2 * PULSE_S))
        with self._lock:
            alive = [pulse for heard, pulse in self._heard.values() if now - heard < late_s]
            last = next(reversed(self._heard.values()), None)
        if not alive:
            return _why_none_is_alive(last, now, cpus, labels)
        requesting = [pulse for pulse in alive if pulse.request and pulse.request_s > late_s]
        if requesting:
            worst = max(requesting, key=lambda pulse: pulse.request_s)
            return (
                f"{len(requesting)} of {len(alive)} readers wait for storage, since {worst.request_s:.0f} s for "
                f"{worst.request}; check that the storage answers"
            )
        working = [pulse for pulse in alive if pulse.index is not None]
        if working:
            worst = max(working, key=lambda pulse: pulse.busy_s)
            return (
                f"{len(working)} of {len(alive)} readers are at work, since {worst.busy_s:.0f} s on the batch from "
                f"index {worst.index}; add readers, or raise data.stall_s of a training"
            )
        free, total = (
            found.get("object_store_memory", 0) for found in (ray.available_resources(), ray.cluster_resources())
        )
        return (
            f"all {len(alive)} readers are idle: the object store is full ({free / 2**20:,.0f} of {total / 2**20:,.0f} "
            "MiB free), or another rank does not take its batches"
        )


def _why_none_is_alive(last: tuple[float, Pulse] | None, now: float, cpus: float, labels: Mapping[str, str]) -> str:
    """The same where there is none; `last` is when the last pulse of all was heard, and that."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    fitting = [node for node in nodes if _has_labels(node, labels)]
    if not fitting:
        wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
        return f"no reader can start: none of {len(nodes)} nodes has the labels {wanted} (data.reader_labels)"
    most = max(node["Resources"].get("CPU", 0) for node in fitting)
    if most < cpus:
        return f"no reader can start: it needs {cpus:g} CPU slots, a node has {most:g} at most; add nodes"
    if last is None:
        free = ray.available_resources().get("CPU", 0)
        return (
            f"no reader has started on {len(fitting)} nodes ({free:g} CPU slots are free, each takes {cpus:g}); "
            "add nodes, or see Ray's logs"
        )
    heard, pulse = last
    lost = "" if any(node["NodeID"] == pulse.node for node in nodes) else ", which is lost"
    return (
        f"no reader is alive: the last was heard {now - heard:.0f} s ago on node {pulse.node[:8]}{lost}; "
        "add nodes, or see Ray's logs"
    )


def _has_labels(node: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Whether a node has labels; what is more than an equation (`in(…)`, `!…`) is taken as met."""
    labels: Mapping[str, str] = node.get("Labels") or {}
    return all(labels.get(key) == value for key, value in wanted.items() if not value.startswith(("in(", "!")))
