"""The requests that a process has under way to all its object stores, and the threads that wait for their answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Connections:
    """A bounded number of requests under way, to all stores together.

    A process has one, `CONNECTIONS`, from its start to its end: all slides that it reads share the bound. Safe to use
    from several threads.
    """

    def __init__(self, in_flight: int = 32) -> None:
        self._in_flight = in_flight
        # A thread a request: obstore lets go of the interpreter while it waits.
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="ranges")
        self._under_way: dict[int, tuple[str, float]] = {}
        """by the thread that waits: address, and start as time.monotonic"""
        self._urgent, self._others = deque[Callable[[], None]](), deque[Callable[[], None]]()
        """requests for which no thread was free yet"""
        self._asking = threading.local()

    def keep_in_flight(self, requests: int) -> None:
        """Sets how many requests are kept under way at once."""
        if requests != self._in_flight:
            self._in_flight = requests
            # Not shut down: what was handed to the former threads comes to its end there.
            self._threads = ThreadPoolExecutor(requests, thread_name_prefix="ranges")

    @contextlib.contextmanager
    def urgently(self) -> Generator[None]:
        """What the calling thread submits meanwhile goes before all that no thread was free for yet."""
        self._asking.urgently = True
        try:
            yield
        finally:
            self._asking.urgently = False

    def submit(self, uri: str, send: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Calls `send`, which asks for something at that address, as soon as one of the threads is free."""
        answer = Future[T]()
        waiting = self._urgent if getattr(self._asking, "urgently", False) else self._others
        waiting.append(partial(self._run, answer, uri, send, *args, **kwargs))
        self._threads.submit(self._run_next)
        return answer

    def _run_next(self) -> None:
        # Each call finds one: it was put there before the call was asked for.
        try:
            run = self._urgent.popleft()
        except IndexError:
            run = self._others.popleft()
        run()

    def _run(self, answer: Future[T], uri: str, send: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        thread = threading.get_ident()
        self._under_way[thread] = uri, time.monotonic()
        try:
            result = send(*args, **kwargs)
        except BaseException as error:
            del self._under_way[thread]
            answer.set_exception(error)
        else:
            del self._under_way[thread]
            answer.set_result(result)

    def oldest_request(self) -> tuple[str, float] | None:
        """Address and start (as time.monotonic) of the request that has been under way for longest."""
        return min(list(self._under_way.values()), key=lambda entry: entry[1], default=None)


CONNECTIONS = Connections()
"""This process's."""
