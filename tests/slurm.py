"""A SLURM of several nodes on this machine, for tests: its own munge, controller and daemons, all below one folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from tests.processes import free_ports, wait_for

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")

_CONF = """
ClusterName=here
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=30
"""


def missing() -> str | None:
    """Why there can be none here."""
    absent = [name for name in NEEDED if not shutil.which(name)]
    if absent:
        return f"SLURM is not installed: no {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    return None if os.getuid() == 0 else "slurmd starts jobs as their users, for which it must be root"


@contextlib.contextmanager
def slurm(folder: Path, partitions: Mapping[str, Sequence[str]], cpus: int) -> Generator[dict[str, str]]:
    """A cluster with these partitions of nodes, each with so many CPUs; the environment in which its commands find it.

    folder's path must be short.
    """
    nodes = [node for names in partitions.values() for node in names]
    port, *ports = free_ports(1 + len(nodes))
    host = socket.gethostname()
    text = _CONF.format(host=host, port=port, folder=folder, user="root")
    for node, its_port in zip(nodes, ports, strict=True):
        text += f"NodeName={node} NodeHostname={host} Port={its_port} CPUs={cpus} State=UNKNOWN\n"
    for number, (name, names) in enumerate(partitions.items()):
        default = "YES" if number == 0 else "NO"
        text += f"PartitionName={name} Nodes={','.join(names)} Default={default} MaxTime=INFINITE State=UP\n"
    conf = folder / "slurm.conf"
    conf.write_text(text)
    (folder / "state").mkdir()
    key = folder / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    folder.chmod(0o755)
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge", f"--key-file={key}"]
    munge += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    commands = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in nodes)]
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            log = stack.enter_context((folder / f"daemon-{number}.log").open("w"))
            running = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(_end, running)
            if number == 0:
                wait_for((folder / "munge").exists, running, timeout_s=60)
        stack.callback(_cancel_all, environment)
        wait_for(lambda: _idle(environment) == len(nodes), timeout_s=120)
        yield environment


def _cancel_all(environment: Mapping[str, str]) -> None:
    """Ends the jobs that are left, and waits for that: their processes outlive the daemons."""

    def left() -> str:
        command = ["squeue", "--noheader", "--format=%A"]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()

    # At once: a job's own trap would let it save first.
    if jobs := left().split():
        subprocess.run(["scancel", "--signal=KILL", "--full", *jobs], env=environment, capture_output=True)
        subprocess.run(["scancel", *jobs], env=environment, capture_output=True)
        wait_for(lambda: not left(), timeout_s=120)


def _idle(environment: Mapping[str, str]) -> int:
    said = subprocess.run(
        ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], env=environment, capture_output=True, text=True
    )
    return len(set(said.stdout.split()))


def _end(running: subprocess.Popen[bytes]) -> None:
    running.terminate()
    try:
        running.wait(timeout=30)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
