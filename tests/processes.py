"""Commands that run in processes of their own: waited for, and killed with all they have started."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import psutil

T = TypeVar("T")

TILESTREAM = (sys.executable, "-m", "trainer.cli")
# timm's smallest, and small heads: where it counts what is stored and started, not what is learnt.
SMALL = ("--model.backbone", "test_vit", "--model.head_hidden", "64", "--model.num_prototypes", "128")


def wait_for(what: Callable[[], T], running: subprocess.Popen[bytes] | None = None, *, timeout_s: float = 480) -> T:
    """What it returns, once that is true; a command that must run meanwhile is watched."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert running is None or running.poll() is None, "the command ended before it happened"
        assert time.monotonic() < deadline, f"it did not happen within {timeout_s:.0f} s"
        time.sleep(0.2)  # each look at a checkpoint costs the S3 server some requests
    return found


def signal_tree(running: subprocess.Popen[bytes], number: signal.Signals) -> list[psutil.Process]:
    """Sends a signal to a process and all below it; which they are."""
    # Ray gives its processes groups of their own: a kill of the driver's group would leave ranks a moment to train.
    everything = list[psutil.Process]()
    with contextlib.suppress(psutil.NoSuchProcess):
        everything += [*psutil.Process(running.pid).children(recursive=True), psutil.Process(running.pid)]
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return everything


def kill_tree(running: subprocess.Popen[bytes]) -> None:
    """A process and all below it, at once; none of them does anything any more when this returns."""
    everything = signal_tree(running, signal.SIGKILL)
    running.wait()
    psutil.wait_procs(everything, timeout=30)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """A server's process, once it listens."""

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(listens, server, timeout_s=60)
        yield
    finally:
        server.terminate()
        server.wait()
