"""Commands that run in processes of their own, killed with all they have started."""

import contextlib
import subprocess

import psutil


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
