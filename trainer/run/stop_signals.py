"""How a run is told to save and leave: SIGTERM to the driver, passed on to rank 0; a machine that goes, or has come."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import ray
from ray.actor import ActorHandle

from streaming import cluster


@dataclass(frozen=True)
class Signals:
    """What reaches a rank from outside."""

    stop: Callable[[], bool] = lambda: False
    """whether this rank was told to save and leave"""
    leaving: Callable[[], bool] = lambda: False
    """whether a machine of the run is about to go; asked of all ranks at once"""
    more: Callable[[], bool] = lambda: False
    """whether there is room for more ranks, which the run takes from its next checkpoint on"""
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


class Wanted(NamedTuple):
    """What the ranks are to do."""

    stop: bool = False
    ranks: int = 0
    """as many as there is room for"""


class Orders:
    """The actor that knows what driver and controller want of the ranks. Rank 0 asks it, whichever one it is."""

    def __init__(self) -> None:
        self._wanted = Wanted()

    def stop(self) -> None:
        """All are to save and leave."""
        self._wanted = self._wanted._replace(stop=True)

    def room_for(self, ranks: int) -> None:
        """So many find room."""
        self._wanted = self._wanted._replace(ranks=ranks)

    def wanted(self) -> Wanted:
        """What is wanted now."""
        return self._wanted


def start_orders() -> ActorHandle[Any]:
    """The actor, on this process's node."""
    actor: Any = ray.remote(Orders)
    return actor.options(**cluster.beside_this()).remote()


def asking(orders: Any) -> Callable[[], Wanted]:
    """What is wanted, asked without waiting: as the last answer has it."""
    asked, known = orders.wanted.remote(), Wanted()

    def ask() -> Wanted:
        nonlocal asked, known
        if ray.wait([asked], timeout=0)[0]:
            known, asked = cast(Wanted, ray.get(asked)), orders.wanted.remote()
        return known

    return ask


@contextlib.contextmanager
def passing_on(stop: threading.Event, orders: Any) -> Generator[None]:
    """Tells rank 0 of the event while the block runs."""
    done = threading.Event()

    def wait() -> None:
        while not done.is_set():
            if stop.wait(0.5):
                orders.stop.remote()
                return

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        done.set()
        waiting.join()
