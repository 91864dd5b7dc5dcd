"""What this machine lets a process have: its part of the CPUs and of the memory, a home, a folder for Ray's sockets.

A container's cgroup, the affinity that `taskset` or a scheduler sets, and SLURM's allotment may each be smaller than
the node; Ray 2.60 looks at the cgroup of a container alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from streaming.errors import NodeError

MACHINE = "the machine"
# A Unix socket's address has 107 bytes, of which Ray takes `/ray/session_2026-01-01_00-00-00_123456_4194304/sockets/`
# and `plasma_store.1`; two more are kept.
_FOLDER_NBYTES = 107 - 72
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class Allotted(NamedTuple):
    """How much this process may use of something, and what says so."""

    amount: int
    by: str


def cpus() -> Allotted:
    """CPUs, one at least; parts of one are rounded up."""
    found = [Allotted(os.cpu_count() or 1, MACHINE), Allotted(len(os.sched_getaffinity(0)), "the affinity")]
    for group in _cgroups("cpu"):
        text = _content(group / "cpu.max") or " ".join(
            _content(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")
        )
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal():
            found.append(Allotted(-(-int(quota) // int(period)), "the cgroup"))
    if slurm := _number("SLURM_CPUS_ON_NODE"):
        found.append(Allotted(slurm, "SLURM_CPUS_ON_NODE"))
    return _least(found)


def memory() -> Allotted:
    """Bytes of memory."""
    found = [Allotted(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), MACHINE)]
    for group in _cgroups("memory"):
        limit = _content(group / "memory.max") or _content(group / "memory.limit_in_bytes")
        if limit.isdecimal():
            found.append(Allotted(int(limit), "the cgroup"))
    # In MiB; none, or 0, where a job has all of its node.
    if slurm := _number("SLURM_MEM_PER_NODE") or _number("SLURM_MEM_PER_CPU") * _number("SLURM_CPUS_ON_NODE"):
        found.append(Allotted(slurm << 20, "SLURM"))
    return _least(found)


def has_home() -> bool:
    """Whether there is a home that files can be written to."""
    try:
        return is_writable(str(Path.home()))
    except RuntimeError:  # no HOME, and no entry of this user's among the machine's
        return False


def temporary_folder() -> str:
    """Where a Ray that is started here keeps its files: what RAY_TMPDIR or TMPDIR names, else /tmp."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def short_temporary_folder() -> str:
    """The same by a name so short that Ray's sockets have room behind it: if need be, a link.

    Raises:
        NodeError: there is no such folder, or none for the link.
    """
    folder = os.path.abspath(temporary_folder())
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise NodeError(
            f"{folder}: {error.strerror}; let RAY_TMPDIR or TMPDIR name a folder on a local disk"
        ) from error
    if not is_writable(folder):
        raise NodeError(f"{folder}: not writable; let RAY_TMPDIR or TMPDIR name a folder on a local disk")
    if len(os.fsencode(folder)) <= _FOLDER_NBYTES:
        return folder
    for short in filter(is_writable, _SHORT_FOLDERS):
        if link := _link_to(folder, os.path.join(short, f"ts-ray-{os.getuid()}")):
            return link
    raise NodeError(
        f"{folder}: too long for Ray's sockets, and {', '.join(_SHORT_FOLDERS)} are not writable; let RAY_TMPDIR name "
        f"a local folder of up to {_FOLDER_NBYTES} bytes"
    )


def _link_to(folder: str, place: str) -> str | None:
    """A link to a folder in a place of our own, where those whose folders are gone are removed; None: it is not ours.

    It stays: what is left of a Ray writes its logs after the process that started it is gone.
    """
    os.makedirs(place, mode=0o700, exist_ok=True)
    found = os.lstat(place)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        return None
    link = os.path.join(place, hashlib.sha256(os.fsencode(folder)).hexdigest()[:6])
    for entry in os.scandir(place):
        if not os.path.exists(entry.path) or (entry.path == link and os.readlink(link) != folder):
            with contextlib.suppress(FileNotFoundError):
                os.remove(entry.path)
    with contextlib.suppress(FileExistsError):  # of another process, just now
        os.symlink(folder, link)
    return link


def is_writable(folder: str) -> bool:
    """Whether a file can be made in a folder; leaves none."""
    # To root, of some folders access says what is not so.
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _least(found: list[Allotted]) -> Allotted:
    """The smallest, at least 1; of equals the first."""
    least = min(found, key=lambda one: one.amount)
    return Allotted(max(least.amount, 1), least.by)


def _number(variable: str) -> int:
    """0 where it is not set, or none."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


def _cgroups(controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of those above it, of either version."""
    root = Path("/sys/fs/cgroup")
    for line in _content(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            top, below = root / controller if controllers else root, Path(path.lstrip("/"))
            # In a container the path may be the host's; the top is always ours.
            yield from (top / group for group in dict.fromkeys((below, *below.parents)))


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
