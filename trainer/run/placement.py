"""Whether GPUs and nodes are found: Ray waits for them without a word, and for ever."""

from __future__ import annotations

import _thread
import contextlib
import re
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from streaming import cluster
from streaming.errors import ConfigError
from trainer.run.execution import TrainConfig

_FIRST_S, _EVERY_S = 20.0, 60.0
_ONE_OF = re.compile(r"in\((.*)\)")


def check_gpus(option: str, needed: int, fewer: str, *, joins_ray: bool = True) -> None:
    """Refuses to wait for GPUs that will never come; a cluster may bring them.

    Args:
        option: what asks for them.
        needed: how many.
        fewer: how to do with less.
        joins_ray: whether what needs them is run by Ray, else by this process.

    Raises:
        ConfigError: this machine, where all of it is to run, has too few.
    """
    if joins_ray and cluster.address():
        return
    # A Ray that runs already was started here, or joined by hand: it knows of its GPUs.
    have = cluster.gpus() if joins_ray and ray.is_initialized() else torch.cuda.device_count()
    if have < needed:
        raise ConfigError(
            f"{option}: this machine has {have} of the {needed} GPUs that are needed; {fewer}, or name a cluster by "
            "RAY_ADDRESS"
        )


@dataclass
class Placement:
    """Where the ranks of a run are: set by what comes from them."""

    found: threading.Event = field(default_factory=threading.Event)
    """whether they run"""
    trouble: str = ""
    """why the run was ended for want of nodes"""


@contextlib.contextmanager
def watched(placement: Placement, train: TrainConfig, stall_s: float | None) -> Generator[None]:
    """Tells each minute what the ranks still need, and interrupts the main thread where that takes over `stall_s`."""
    done = threading.Event()

    def watch() -> None:
        waiting_since, told_at = time.monotonic(), time.monotonic() + _FIRST_S - _EVERY_S
        while not done.wait(0.5):
            now = time.monotonic()
            if placement.found.is_set():
                waiting_since, told_at = now, now + _FIRST_S - _EVERY_S
                continue
            is_over = stall_s is not None and now - waiting_since > stall_s
            if is_over or now - told_at >= _EVERY_S:
                why = lacking(ray.nodes(), train) or "their processes are starting, or others hold what they need"
                if is_over:
                    placement.trouble = f"the ranks found no nodes within data.stall_s, {stall_s:g} s: {why}"
                    _thread.interrupt_main()
                    return
                told_at = now
                sys.stderr.write(f"train: waiting for the ranks for {now - waiting_since:.0f} s: {why}\n")

    watching = threading.Thread(target=watch, daemon=True, name="placement")
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()


def lacking(nodes: Sequence[Mapping[str, Any]], train: TrainConfig) -> str:
    """Why so many ranks have no place on nodes, as `ray.nodes()` tells them; empty where all were free.

    The remedy is named, too.
    """
    alive, (least, _) = [node for node in nodes if node["Alive"]], train.ranks_range
    wanted = {"CPU": train.rank_cpus, **({"GPU": 1.0} if train.gpu else {}), **train.rank_resources}
    labels = ", ".join(f"{name}={value}" for name, value in train.rank_labels.items())
    fitting = [node for node in alive if _matches(node.get("Labels", {}), train.rank_labels)]
    if not fitting:
        return (
            f"none of the {len(alive)} nodes has the labels {labels} (train.rank_labels); start nodes with "
            f"`ray start --labels`, or change that field"
        )
    places = sum(_places(node["Resources"], wanted) for node in fitting)
    if places >= least:
        return ""
    each = ", ".join(f"{value:g} {name}" for name, value in wanted.items())
    largest = {name: max(float(node["Resources"].get(name, 0)) for node in fitting) for name in wanted}
    most = ", ".join(f"{value:g} {name}" for name, value in largest.items())
    of = f" with the labels {labels}" if labels else ""
    short = [name for name, value in wanted.items() if largest[name] < value]
    told = f"; the most of a node is {most}" if short else ""
    remedies = {"GPU": "add --train.gpu false", "CPU": "lower train.rank_cpus"}
    remedy = next((remedies.get(name, f"lower train.rank_resources.{name}") for name in short), "lower train.ranks")
    return (
        f"{least} ranks want {each} each; the {len(fitting)} nodes{of} have room for {places}{told}: add nodes, "
        f"or {remedy}"
    )


def _places(resources: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """Ranks that a node has room for, if nothing else runs there."""
    return int(min(resources.get(name, 0.0) // value for name, value in wanted.items() if value > 0))


def _matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node has the labels, by Ray's rules: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""

    def holds(name: str, rule: str) -> bool:
        plain = rule.removeprefix("!")
        several = _ONE_OF.fullmatch(plain)
        values = [value.strip() for value in several[1].split(",")] if several else [plain]
        return (labels.get(name) in values) != rule.startswith("!")

    return all(holds(name, rule) for name, rule in selector.items())
