"""What this machine, the storage and the cluster lack: findings, each with its remedy."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from streaming import cluster, machine, storage
from streaming.catalog import Catalog
from streaming.errors import ConfigError, NodeError, PlanError, SlideError, StorageError, TilestreamError
from streaming.plan import TilePlan
from streaming.plan.magnifications import DEFAULT_MPP
from streaming.storage.clock import clock_skew
from streaming.storage.node_cache import cache_at
from streaming.storage.ranges import open_ranges, read_range
from streaming.storage.staging import Staging

# One object store of Ray needs a descriptor a client and socket; a reader, one a connection. Ray asks for 65,536.
_OPEN_FILES, _FEW_OPEN_FILES = 65_536, 4_096
# Two micro-batches of 64 tiles for each of four readers are 100 MB; Ray itself warns below 2 GB of shared memory.
_SHM_NBYTES = 2 * 10**9
# S3 refuses requests that are signed 15 minutes off; tokens of workload identities are checked more narrowly.
_SKEW_S, _LARGE_SKEW_S = 5.0, 300.0
_GETS, _GET_NBYTES, _SLOW_GET_S = 8, 64 * 1024, 0.2
_TILES = 4
# For another node's answer, whose process has yet to start and to import.
_NODE_S = 120.0
_DEVICES = Path("/dev")

State = Literal["ok", "note", "mend"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found. `note`: works, but could be better; `mend`: something will fail."""

    check: str
    state: State
    what: str
    remedy: str = ""


def examine(catalog: str | None, options: storage.StorageOptions, *, ray: bool = True) -> Iterator[Finding]:
    """All checks, as they finish; those of the storage and the tiles need a catalog.

    Of a cluster, one node of each kind is examined like this one, and what it lacks is told.

    Raises:
        TilestreamError: the catalog can't be read: its message tells more than a finding would.
    """
    loaded = Catalog.load(catalog, options) if catalog else None
    yield from _machine()
    for check in (_home, _ray_files, _ray_address):
        yield from check()
    if ray:
        yield from _ray(catalog, options)
    if loaded is not None:
        yield from _data(loaded, options)


def _machine() -> Iterator[Finding]:
    """What any node must have."""
    for check in (_python, _libraries, _gpu, _allotted, _shared_memory, _open_files, _disk):
        yield from check()


def _data(catalog: Catalog, options: storage.StorageOptions) -> Iterator[Finding]:
    """What any node must reach."""
    yield from _clock(catalog.slides()[0], options)
    yield from _latency(catalog, options)
    yield from _tiles(catalog, options)


def _python() -> Iterator[Finding]:
    version, wanted = platform.python_version(), metadata.metadata("tilestream")["Requires-Python"]
    state: State = "ok" if SpecifierSet(wanted).contains(version) else "mend"
    yield Finding(check="python", state=state, what=version, remedy="" if state == "ok" else f"take Python {wanted}")


def _libraries() -> Iterator[Finding]:
    wrong: list[str] = []
    count = 0
    for text in metadata.requires("tilestream") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            found = ""
        if not found or not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found or 'is missing'} (wanted {wanted.specifier})")
    if wrong:
        remedy = "pip install -r requirements.lock, or: pip install -e ."
        yield Finding(check="libraries", state="mend", what="; ".join(wrong), remedy=remedy)
    else:
        yield Finding(check="libraries", state="ok", what=f"{count} direct dependencies within their bounds")


def _gpu() -> Iterator[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None and (devices := sorted(_DEVICES.glob("nvidia[0-9]*"))):
        what = f"{', '.join(path.name for path in devices)} in {_DEVICES}, but the driver's nvidia-smi is not in PATH"
        remedy = "GKE mounts the driver at /usr/local/nvidia: add its bin to PATH and its lib64 to LD_LIBRARY_PATH"
        yield Finding(check="gpu", state="mend", what=what, remedy=remedy)
        return
    if program is None:
        what, remedy = "none: no nvidia-smi here", "none needed to read or to try; to train, take a node with a GPU"
        yield Finding(check="gpu", state="note", what=what, remedy=remedy)
        return
    asked = subprocess.run([program, "-L"], capture_output=True, text=True)
    names = [line.split(" (UUID")[0] for line in asked.stdout.splitlines()]
    if asked.returncode or not names:
        what = " ".join((asked.stderr or asked.stdout).split()) or "nvidia-smi lists no GPU"
        yield Finding(check="gpu", state="mend", what=what, remedy="mend the driver; reboot after an update of it")
        return
    if find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            what = f"{len(names)} GPUs, but torch {torch.__version__} (CUDA {torch.version.cuda}) can't use them"
            remedy = "install requirements-cuda.lock, and a driver for that CUDA (for 13: 580 or newer)"
            yield Finding(check="gpu", state="mend", what=what, remedy=remedy)
            return
    yield Finding(check="gpu", state="ok", what=", ".join(names))


def _shared_memory() -> Iterator[Finding]:
    if not Path("/dev/shm").exists():
        yield Finding(check="/dev/shm", state="note", what="there is none; Ray's objects lie in a file instead")
        return
    free = shutil.disk_usage("/dev/shm").free
    small = free < _SHM_NBYTES
    remedy = "docker run --shm-size=4g; in Kubernetes an emptyDir with medium: Memory (see deploy/kuberay)"
    yield Finding(
        check="/dev/shm",
        state="mend" if small else "ok",
        what=f"{free / 1e9:.1f} GB free" + (f", less than {_SHM_NBYTES / 1e9:.0f} GB" if small else ""),
        remedy=remedy if small else "",
    )


def _open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    state: State = "ok" if soft == endless or soft >= _OPEN_FILES else "note"
    if hard != endless and hard < _FEW_OPEN_FILES:
        state = "mend"
    shown = "unlimited" if hard == endless else f"{hard:,}"
    what = f"{'unlimited' if soft == endless else f'{soft:,}'} (at most {shown})"
    remedy = f"ulimit -n {_OPEN_FILES}, or LimitNOFILE of the service; many readers on one node need it"
    yield Finding(check="open files", state=state, what=what, remedy="" if state == "ok" else remedy)


def _disk() -> Iterator[Finding]:
    staging = Path(Staging().path)
    place = next(path for path in (staging, *staging.parents) if path.exists())
    free, writable = shutil.disk_usage(place).free, machine.is_writable(str(place))
    state: State = "mend" if not writable or free < 2 * 10**9 else "note" if free < 50 * 10**9 else "ok"
    what = f"{staging}: {free / 1e9:.0f} GB free" + ("" if writable else ", not writable")
    if place == staging:
        try:
            cache_at(str(staging)).num_bytes()
        except NodeError as error:
            yield Finding(
                check="staging", state="mend", what=str(error), remedy="set TILESTREAM_STAGING to another folder"
            )
            return
    remedy = "set TILESTREAM_STAGING to a folder on a larger local disk; formats without a block index are copied there"
    yield Finding(check="staging", state=state, what=what, remedy="" if state == "ok" else remedy)


def _allotted() -> Iterator[Finding]:
    for check, (amount, by), unit in (("cpus", machine.cpus(), 1), ("memory", machine.memory(), 10**9)):
        shown = f"{amount / unit:,.0f}" + (" GB" if unit > 1 else "")
        yield Finding(check=check, state="ok", what=f"{shown}, by {by}")


def _home() -> Iterator[Finding]:
    if machine.has_home():
        yield Finding(check="home", state="ok", what=str(Path.home()))
        return
    what = "none that can be written to: a Ray that is started here has its token in RAY_AUTH_TOKEN"
    remedy = "set HOME to a folder of your own, where downloaded weights are kept, too"
    yield Finding(check="home", state="note", what=what, remedy=remedy)


def _ray_files() -> Iterator[Finding]:
    try:
        folder = machine.short_temporary_folder()
    except NodeError as error:
        yield _of_error("ray's files", error)
        return
    named = os.path.abspath(machine.temporary_folder())
    what = named if folder == named else f"{named}, by the short link {folder}"
    yield Finding(check="ray's files", state="ok", what=what)


def _ray_address() -> Iterator[Finding]:
    where = cluster.address()
    if where is None:
        return
    try:
        cluster.check_address(where)
    except ConfigError as error:
        yield _of_error("ray address", error)
    else:
        yield Finding(check="ray address", state="ok", what=f"RAY_ADDRESS={where}: answers")


def _of_error(check: str, error: TilestreamError) -> Finding:
    what, remedy_follows, remedy = str(error).rpartition("; ")
    return Finding(check=check, state="mend", what=what or remedy, remedy=remedy if remedy_follows else "")


def _ray(catalog: str | None, options: storage.StorageOptions) -> Iterator[Finding]:
    where = cluster.address() or "a Ray on this machine"
    try:
        seen = cluster.survey()
    except TilestreamError as error:
        yield _of_error("ray", error)
        return
    shape = f"{seen.nodes} nodes, {seen.cpus:g} CPUs, {seen.gpus:g} GPUs"
    yield Finding(check="ray", state="ok", what=f"{seen.version} on {where}: {shape}")
    small = seen.least_store_nbytes < _SHM_NBYTES / 2
    yield Finding(
        check="object store",
        state="note" if small else "ok",
        what=f"{seen.least_store_nbytes / 1e9:.1f} GB on the node with least",
        remedy="ray start --object-store-memory, and /dev/shm to match; `tilestream capacity` tells how much"
        if small
        else "",
    )
    for kind in cluster.other_nodes():
        yield from _node(kind, catalog, options)


def _node(kind: cluster.NodeKind, catalog: str | None, options: storage.StorageOptions) -> Iterator[Finding]:
    """Examines a node, the first of its kind, and tells what is not as it should be."""

    def examined() -> list[Finding]:
        return [*_machine(), *(_data(Catalog.load(catalog, options), options) if catalog else ())]

    (node, at), *more = kind.nodes
    told = [f"{name}={value}" for name, value in kind.labels.items()] + [f"{kind.gpus:g} GPUs"]
    which = f"{at} ({', '.join(told)}{f'; one of {len(more) + 1}' if more else ''})"
    try:
        found = cluster.run_on(node, examined, _NODE_S)
    except TilestreamError as error:
        told = _of_error("node", error)
        yield replace(told, what=f"{which}: {told.what}")
        return
    # Readers need none.
    wrong = [entry for entry in found if entry.state != "ok" and (entry.check, entry.state) != ("gpu", "note")]
    if kind.gpus and any((entry.check, entry.state) == ("gpu", "note") for entry in found):
        what, remedy = "Ray counts GPUs, but there is no nvidia-smi", "is the driver mounted, and in PATH?"
        wrong.append(Finding(check="gpu", state="mend", what=what, remedy=remedy))
    good = len({entry.check for entry in found} - {entry.check for entry in wrong})
    yield Finding(check="node", state="ok", what=f"{which}: {good} checks are ok")
    for entry in wrong:
        yield replace(entry, what=f"on {at}: {entry.what}")


def _clock(uri: str, options: storage.StorageOptions) -> Iterator[Finding]:
    if storage.is_local(uri):
        return
    try:
        skew = clock_skew(uri, options)
    except StorageError as error:
        yield Finding(check="clock", state="note", what=str(error), remedy="compare with `date -u` on another machine")
        return
    off = abs(skew)
    state: State = "mend" if off > _LARGE_SKEW_S else "note" if off > _SKEW_S else "ok"
    remedy = "" if state == "ok" else "run chrony or systemd-timesyncd; storage refuses signatures that are minutes off"
    what = f"{off:.0f} s {'ahead of' if skew > 0 else 'behind'} the storage's" if off >= 1 else "as the storage's"
    yield Finding(check="clock", state=state, what=what, remedy=remedy)


def _latency(catalog: Catalog, options: storage.StorageOptions) -> Iterator[Finding]:
    """Times a handful of GETs, one after the other, at random places of random slides."""
    draw = np.random.default_rng(0)
    seconds: list[float] = []
    slides = catalog.slides()
    for _ in range(_GETS):
        uri = str(slides[int(draw.integers(len(catalog)))])
        try:
            ranges = open_ranges(uri, options)
            if ranges is None:
                return  # only fsspec knows this storage: tiles are read from copies, which `_tiles` tries
            start = int(draw.integers(max(ranges.size - _GET_NBYTES, 1)))
            began = time.perf_counter()
            read_range(ranges, start, min(start + _GET_NBYTES, ranges.size))
            seconds.append(time.perf_counter() - began)
        except TilestreamError as error:
            remedy = "the message names it; without credentials of its own a node may lack its role"
            yield Finding(check="storage", state="mend", what=str(error), remedy=remedy)
            return
    middle, worst = float(np.median(seconds)), max(seconds)
    slow = middle > _SLOW_GET_S
    what = f"{_GETS} GETs of 64 KiB: median {middle * 1e3:.1f} ms, slowest {worst * 1e3:.1f} ms"
    remedy = "read in the storage's region, or give more readers (`tilestream capacity --latency-ms`)" if slow else ""
    yield Finding(check="storage", state="note" if slow else "ok", what=what, remedy=remedy)


def _tiles(catalog: Catalog, options: storage.StorageOptions) -> Iterator[Finding]:
    """Reads a sample of the tiles that a training would."""
    plan = _plan_of(catalog)
    failed: list[str] = []
    began = time.perf_counter()
    for index in range(_TILES):
        specs = plan.specs(np.array([index]))
        try:
            slide = catalog.open_slide(int(specs.slide[0]), options, Staging())
            slide.read_tile(int(specs.x[0]), int(specs.y[0]), float(specs.mpp[0]), specs.size)
        except (SlideError, StorageError) as error:
            failed.append(str(error))
    if failed:
        remedy = "`tilestream catalog` again takes changed slides in and bad ones out"
        yield Finding(check="tiles", state="mend", what=f"{len(failed)} of {_TILES}: {failed[0]}", remedy=remedy)
    else:
        took = (time.perf_counter() - began) / _TILES
        yield Finding(
            check="tiles", state="ok", what=f"{_TILES} tiles of {len(catalog)} slides, {took * 1e3:.0f} ms each"
        )


def _plan_of(catalog: Catalog) -> TilePlan:
    """A plan at the finest of the usual magnifications that the catalog has tiles for."""
    for mpp in sorted(DEFAULT_MPP)[:-1]:
        try:
            return TilePlan(catalog, 0, {mpp: 1.0}, 256)
        except PlanError:
            continue
    return TilePlan(catalog, 0, {max(DEFAULT_MPP): 1.0}, 256)
