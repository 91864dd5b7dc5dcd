"""The way into Ray: the cluster that RAY_ADDRESS names (`ray job submit` sets it), else a small one on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# What Ray says without need: token authentication is on, its own progress bars are off; what fails raises anyhow.
_QUIET_LOGGERS = ("ray._private.authentication.authentication_token_setup", "ray.data", "ray.data._internal.progress")


def connect(num_cpus: int, *, verbose: bool = False, ignore_sigterm: bool = False) -> None:
    """Joins Ray unless this process has already.

    num_cpus is how many CPU slots the work wants at least. On one machine that many are promised, even over the cores
    there are: readers mostly wait for storage, and a laptop must be able to run everything. With `verbose`, what
    workers print comes to this terminal; it lies in Ray's session folder anyhow. With `ignore_sigterm`, the processes
    of a Ray that is started here do so: SLURM and systemd send it to all that belong to a job, and a training needs
    Ray until it has saved. They take four seconds longer to end.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not verbose:
        quiet()
    if not ray.is_initialized():
        level = logging.INFO if verbose else logging.WARNING
        if address():
            ray.init(logging_level=level, log_to_driver=verbose)
        else:
            # Eight at least: the next job of this process may need more than the first, and would wait forever.
            cores = max(num_cpus, usable_cores(), 8)
            # A training has a dozen actors that hold no CPU slot; on two cores Ray would warn of them, on stdout.
            os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(cores, 8)))
            # A signal that this process blocks is blocked in the processes that it starts: so Ray's go on at a SIGTERM.
            # (Ray itself keeps SIGINT from them in the same way.)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if ignore_sigterm else ())
            try:
                ray.init(
                    address="local",
                    num_cpus=cores,
                    include_dashboard=False,
                    logging_level=level,
                    log_to_driver=verbose,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def usable_cores() -> int:
    """Cores that this process may use: SLURM, a container's quota or taskset may leave it few of the machine's."""
    allowed = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))  # "max": no quota, which is no number
    return allowed


def address() -> str | None:
    """The cluster that RAY_ADDRESS names, if it names one."""
    return os.environ.get("RAY_ADDRESS") or None


def gpus() -> int:
    """GPUs of the Ray that this process has joined."""
    return round(ray.cluster_resources().get("GPU", 0))


def beside_this() -> dict[str, Any]:
    """Options of an actor that only passes things on: on this process's node, so that no other node's loss ends it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the cluster has: nodes that live, slots, and the object store of the node with the smallest, in bytes."""

    version: str
    nodes: int
    cpus: float
    gpus: float
    least_store_nbytes: int


def survey() -> Survey:
    """Joins Ray, as `connect` does, and looks at it."""
    connect(1)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Survey(
        version=ray.__version__,
        nodes=len(nodes),
        cpus=sum(node.get("CPU", 0) for node in nodes),
        gpus=sum(node.get("GPU", 0) for node in nodes),
        least_store_nbytes=int(min(node.get("object_store_memory", 0) for node in nodes)),
    )


def quiet() -> None:
    """Turns off Ray's own progress bars and start-up notes in this process."""
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    DataContext.get_current().enable_progress_bars = False
    # Ray Data would wrap what a reader raises, and the wrapper loses its cause on the way between processes: then
    # nobody could tell whose fault it is.
    DataContext.get_current().raise_original_map_exception = True
