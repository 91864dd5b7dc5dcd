"""Commands that run in processes of their own: waited for, and killed with all they have started."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
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


def kill_tree(running: subprocess.Popen[bytes]) -> None:
    """A process and all below it, at once; none of them does anything any more when this returns."""
    # Ray gives its processes groups of their own: a kill of the driver's group would leave ranks a moment to train.
    everything = list[psutil.Process]()
    with contextlib.suppress(psutil.NoSuchProcess):
        everything += [*psutil.Process(running.pid).children(recursive=True), psutil.Process(running.pid)]
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    running.wait()
    psutil.wait_procs(everything, timeout=30)
