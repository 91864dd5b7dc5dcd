"""How a run is told to save and stop: SIGTERM to the driver, passed on to rank 0; a machine that is about to go."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import ray.util.queue


@dataclass(frozen=True)
class Signals:
    """What reaches a rank from outside."""

    stop: Callable[[], bool] = lambda: False
    """whether this rank was told to save and leave"""
    leaving: Callable[[], bool] = lambda: False
    """whether a machine of the run is about to go; asked of all ranks at once"""
    begin: Callable[[], None] = lambda: None
    """called when training begins: Lightning has set handlers of its own by then, which would end it without saving"""


class Termination(threading.Event):
    """Set by SIGTERM (spot machines send it) from `listen` on; a second one kills the process."""

    def listen(self) -> None:
        """Takes the signal to itself, where this is the main thread: no other may listen to signals."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def terminated() -> Generator[Termination]:
    """Listens to SIGTERM while the block runs."""
    event, before = Termination(), signal.getsignal(signal.SIGTERM)
    event.listen()
    try:
        yield event
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def passing_on(stop: threading.Event, orders: ray.util.queue.Queue) -> Generator[None]:
    """Tells rank 0 of the event while the block runs."""
    done = threading.Event()

    def wait() -> None:
        while not done.is_set():
            if stop.wait(0.5):
                orders.put("stop")
                return

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        done.set()
        waiting.join()
