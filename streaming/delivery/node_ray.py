"""One Ray for the ranks of a machine that nobody started Ray for, as under `torchrun`.

The first rank starts a process that keeps it, the others join. No rank owns it, so it outlives the first one to end;
what holds it is a lock that the kernel takes from a process when it is gone, however it went: when the last one is, the
keeper ends Ray and itself.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from streaming import cluster
from streaming.errors import NodeError
from streaming.storage.private_folder import make_private

_MEMBERS, _ADDRESS, _LOG = "members", "address", "log"
# Ray gives itself half a minute to start, which is too short on a busy machine.
_TRIES = 4
# What must stay open while this process lives: the lock, and the keeper's process.
_held = list[object]()


def join(num_cpus: int) -> None:
    """Joins Ray unless this process has already: the cluster of RAY_ADDRESS, else the one of this machine's ranks.

    A rank that is alone has a Ray of its own. num_cpus is how many CPU slots the work of all ranks here wants.

    Raises:
        NodeError: Ray does not start, or the folder to meet in belongs to somebody else.
    """
    if ray.is_initialized() or cluster.address() or (folder := _meeting_place(os.environ)) is None:
        cluster.connect(num_cpus)
        return
    # Locks of the kind that a process has, not a file: those that it forks do not have them.
    with _open(folder / "turn") as turn:
        fcntl.lockf(turn, fcntl.LOCK_EX)
        members = _open(folder / _MEMBERS)
        fcntl.lockf(members, fcntl.LOCK_SH)  # where a keeper is just ending, when it has
        _held.append(members)
        os.environ["RAY_ADDRESS"] = _kept(folder) or _started(folder, num_cpus)
        # The keeper's Ray asks for its token, as one that is started here does by itself; one that is joined by a
        # variable is taken for another's, which may want none.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        cluster.connect(num_cpus)


def _meeting_place(environment: Mapping[str, str]) -> Path | None:
    """A folder of the ranks of one run on this machine, by what torchrun and all others tell them; None: there is one.

    Raises:
        NodeError: it belongs to somebody else.
    """
    port = environment.get("MASTER_PORT")
    if not port or environment.get("LOCAL_WORLD_SIZE") == "1":
        return None
    mine = Path(tempfile.gettempdir()) / f"tilestream-ray-{os.getuid()}"
    make_private(mine, "set TMPDIR to a folder of your own")
    folder = mine / f"{environment.get('MASTER_ADDR', 'localhost')}-{port}"
    folder.mkdir(exist_ok=True)
    return folder


def _open(path: Path) -> IO[str]:
    return path.open("a+")


def _kept(folder: Path) -> str | None:
    """The address of the Ray that lives, as its keeper wrote it, who has that file locked."""
    with _open(folder / _ADDRESS) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            return file.read()
    return None


def _started(folder: Path, num_cpus: int) -> str:
    """Starts a keeper; the address of its Ray.

    Raises:
        NodeError: it does not start.
    """
    command, said = [sys.executable, "-m", "streaming.delivery.node_ray", str(folder), str(num_cpus)], ""
    for _ in range(_TRIES):
        with (folder / _LOG).open("w") as log:
            # In a session of its own: a Ctrl-C is for the ranks.
            keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        _held.append(keeper)
        while keeper.poll() is None:
            if address := _kept(folder):
                return address
            time.sleep(0.1)
        said = next(reversed((folder / _LOG).read_text().splitlines()), f"it ended with status {keeper.returncode}")
        if "timed out" not in said:
            break
    raise NodeError(
        f"Ray does not start on this machine: {said}; where a path is too long, set RAY_TMPDIR to a short one; "
        f"{folder / _LOG} has the whole, and `tilestream doctor` looks for the reason"
    )


def _keep(folder: Path, num_cpus: int) -> None:
    """Starts Ray, and ends it when no rank is left."""
    cluster.connect(num_cpus, ignore_sigterm=True)
    # SLURM sends it to all that belong to a job; its ranks may need Ray until they have saved.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with _open(folder / _ADDRESS) as address, _open(folder / _MEMBERS) as members:
        fcntl.lockf(address, fcntl.LOCK_EX)
        address.truncate(0)
        address.write(ray.get_runtime_context().gcs_address)
        address.flush()
        fcntl.lockf(members, fcntl.LOCK_EX)
        # A rank that comes now waits until this process is gone, and must not find what it was.
        ray.shutdown()
        address.truncate(0)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]), int(sys.argv[2]))
