"""The way into Ray: the cluster that RAY_ADDRESS names (`ray job submit` sets it), else a small one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray
from ray._private import ray_constants
from ray._private.services import canonicalize_bootstrap_address
from ray.data import DataContext
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from streaming import machine
from streaming.errors import ConfigError, NodeError, TilestreamError
from streaming.secrets import without_values

Result = TypeVar("Result")

# What Ray says without need: token authentication is on, its own progress bars are off; what fails raises anyhow.
_QUIET_LOGGERS = ("ray._private.authentication.authentication_token_setup", "ray.data", "ray.data._internal.progress")

GCS_NOTES = {
    "RAY_maximum_gcs_destroyed_actor_cached_count": 2000,
    "RAY_maximum_gcs_dead_worker_cached_count": 2000,
    "RAY_task_events_max_num_task_in_gcs": 10_000,
}
"""So many ended actors, workers and tasks the head keeps notes of: of Ray's 100,000, some 20 kB each, a long stream of
many segments would fill its memory. A head that others start has them in its environment (`deploy/`)."""

# The object store's share of the memory: Ray's default.
_STORE_SHARE = 0.3
_ANSWERS_S = 10.0
_HERE = "`tilestream doctor` tells what is missing here; Ray's own logs are in {folder}/ray/session_*/logs"
_IN_A_CLUSTER = "is this machine a node of that cluster? For a Ray on this machine unset RAY_ADDRESS"
_REMEDIES = (
    (r"[Vv]ersion mismatch", "take the cluster's versions of Ray and Python"),
    (r"Authentication|Unauthenticated|RAY_AUTH", "set RAY_AUTH_MODE and RAY_AUTH_TOKEN as the cluster has them"),
    (r"PermissionError|Permission denied", "let RAY_TMPDIR name a folder of your own on a local disk"),
    (r"timed out during startup", "is this machine overloaded? Try again"),
    (r"No space left", "make room, or let RAY_TMPDIR name a folder on another local disk"),
)


def connect(num_cpus: int, *, verbose: bool = False, ignore_sigterm: bool = False) -> None:
    """Joins Ray unless this process has already.

    num_cpus is how many CPU slots the work wants at least. On one machine that many are promised, even over the cores
    there are: readers mostly wait for storage, and a laptop must be able to run everything. With `verbose`, what
    workers print comes to this terminal; it lies in Ray's session folder anyhow. With `ignore_sigterm`, the processes
    of a Ray that is started here do so: SLURM and systemd send it to all that belong to a job, and a training needs
    Ray until it has saved. They take four seconds longer to end.
    """
    if not verbose:
        quiet()
    if ray.is_initialized():
        return
    _hide_secrets()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    level = logging.INFO if verbose else logging.WARNING
    if where := address():
        check_address(where)
        with _one_line(f"RAY_ADDRESS={where}", _IN_A_CLUSTER):
            ray.init(logging_level=level, log_to_driver=verbose)
    else:
        folder = machine.short_temporary_folder()
        with _one_line("a Ray on this machine", _HERE.format(folder=machine.temporary_folder())):
            _start(num_cpus, folder, ignore_sigterm=ignore_sigterm, logging_level=level, log_to_driver=verbose)


def _start(num_cpus: int, folder: str, *, ignore_sigterm: bool, **options: Any) -> None:
    """Starts a Ray on this machine that keeps its files in a folder."""
    # Eight at least: the next job of this process may need more than the first, and would wait forever.
    cores = max(num_cpus, machine.cpus().amount, 8)
    memory = machine.memory()
    if memory.by != machine.MACHINE:
        # As Ray's own, of the machine's memory; where that is more than /dev/shm has, it knows better.
        store_nbytes = int(_STORE_SHARE * memory.amount)
        if os.path.isdir("/dev/shm") and store_nbytes < shutil.disk_usage("/dev/shm").free:
            options["object_store_memory"] = store_nbytes
    # A training has a dozen actors that hold no CPU slot; on two cores Ray would warn of them, on stdout.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(cores, 8)))
    for name, most in GCS_NOTES.items():
        os.environ.setdefault(name, str(most))
    # Ray would write it to the home.
    if not machine.has_home() and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Under `uv run` Ray would ship the folder that one is in to workers on this same machine, and make an environment
    # for each. It reads the variable when it is imported.
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    # A signal that this process blocks is blocked in the processes that it starts: so Ray's go on at a SIGTERM.
    # (Ray itself keeps SIGINT from them in the same way.)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if ignore_sigterm else ())
    try:
        ray.init(
            address="local", num_cpus=cores, include_dashboard=False, _temp_dir=os.path.join(folder, "ray"), **options
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _one_line(where: str, remedy: str) -> Generator[None]:
    """Makes whatever Ray raises while it starts an error of one line."""
    try:
        yield
    except TilestreamError:
        raise
    except Exception as error:  # Ray raises what it likes
        text = " ".join(str(error).split())[:300]
        known = next(
            (said for pattern, said in _REMEDIES if re.search(pattern, f"{type(error).__name__} {text}")), remedy
        )
        raise NodeError(f"{where}: {text or type(error).__name__}; {known}") from error


def _hide_secrets() -> None:
    """Takes secrets out of this process's command line: Ray notes it among its jobs, in its logs and its events."""
    shown = without_values(sys.orig_argv)
    if shown != sys.orig_argv:
        cast(Any, ray)._raylet.setproctitle(subprocess.list2cmdline(shown))


def address() -> str | None:
    """The cluster that RAY_ADDRESS names, if it names one."""
    named = os.environ.get("RAY_ADDRESS")
    return None if named == "local" else named or None


def check_address(where: str) -> None:
    """Refuses an address at which no Ray answers: Ray itself would ask it for a quarter of an hour.

    Raises:
        ConfigError: it is none, or nobody answers there.
    """
    what = f"RAY_ADDRESS={where}"
    scheme, separator, rest = where.partition("://")
    if scheme in ("http", "https"):
        raise ConfigError(
            f"{what}: is where `ray job submit` sends jobs; submit this one, or unset it for a Ray on this machine"
        )
    if separator and scheme != "ray":
        return  # of a package of its own
    try:
        found = canonicalize_bootstrap_address(rest or where)
    except ConnectionError:
        raise ConfigError(f"{what}: no Ray runs here; `ray start --head`, or unset it") from None
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{what}: {error}; it is the HOST:PORT of a cluster; for a Ray on this machine unset it"
        ) from None
    host, _, port = (found or "").rpartition(":")
    if trouble := _silent(host.strip("[]"), int(port)):
        raise ConfigError(
            f"{what}: no Ray answers there ({trouble}); is the cluster up? For a Ray on this machine unset it"
        )


def _silent(host: str, port: int) -> str:
    """Why no gRPC server answers at an address within some seconds; empty: one does."""
    until, trouble = time.monotonic() + _ANSWERS_S, ""
    while True:
        try:
            with socket.create_connection((host, port), timeout=_ANSWERS_S) as connection:
                if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                    return ""
                # RFC 9113, 3.4: each side begins with its settings. The frame's type is its fourth byte.
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
                head = connection.recv(9)
                return "" if head[3:4] == b"\4" else "another program does"
        except OSError as error:
            trouble = str(error.strerror or error)
        if time.monotonic() > until:
            return trouble
        time.sleep(0.5)


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


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """Living nodes that are alike: of the same labels, and with as many GPUs."""

    labels: dict[str, str]
    """without those that only one node has"""
    gpus: float
    nodes: list[tuple[str, str]]
    """the id and the address of each"""


def other_nodes() -> list[NodeKind]:
    """The cluster's nodes but this process's own, by kind."""
    here, kinds = ray.get_runtime_context().get_node_id(), dict[tuple[float, str], NodeKind]()
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here:
            labels = {name: value for name, value in sorted(node["Labels"].items()) if name != "ray.io/node-id"}
            gpus = node["Resources"].get("GPU", 0)
            kind = kinds.setdefault((gpus, str(labels)), NodeKind(labels=labels, gpus=gpus, nodes=[]))
            kind.nodes.append((node["NodeID"], node["NodeManagerAddress"]))
    return [kinds[known] for known in sorted(kinds)]


def run_on(node: str, work: Callable[[], Result], timeout_s: float) -> Result:
    """What a function gives that runs on a node, whatever else runs there.

    Raises:
        NodeError: it is not done in time, or its process died.
    """
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    task = cast(Any, ray.remote(work)).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0).remote()
    try:
        return ray.get(task, timeout=timeout_s)
    except GetTimeoutError:
        ray.cancel(task, force=True)
        raise NodeError(
            f"no answer within {timeout_s:.0f} s; is it overloaded? `ray status` and its logs tell"
        ) from None
    except RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except RayError as error:
        raise NodeError(f"{' '.join(str(error).split())[:300]}; `ray status` and its logs tell more") from error


def quiet() -> None:
    """Turns off Ray's own progress bars and start-up notes in this process."""
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    DataContext.get_current().enable_progress_bars = False
    # Ray Data would wrap what a reader raises, and the wrapper loses its cause on the way between processes: then
    # nobody could tell whose fault it is.
    DataContext.get_current().raise_original_map_exception = True
