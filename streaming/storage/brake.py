"""One brake for all processes of a node: they ask a storage that throttles more slowly, and faster again, together.

What a storage limits is a rate, so a rate is what the brake holds (a number of requests under way would follow from it,
but would have to be counted, and a reader that is killed takes its count along). While nobody throttles, requests are
only counted. A throttled answer (429, 503) sets the rate to a part of what the storage was seen to answer in a second,
and each further one leaves that part of it (multiplicative decrease); then it grows by as much every second (additive
increase), as TCP's congestion avoidance does (RFC 5681). Of all answers to what was sent before the rate was lowered,
none lowers it again.

The state lies in a small file that all processes of a node map. It is locked for some microseconds, and the kernel lets
go of the locks of a process that dies. But to lock it for each request and each answer took as much of the processor as
the request itself: so while there is no rate nobody locks it to send, and a process tells what was answered in lumps.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Generator
from dataclasses import astuple, dataclass
from pathlib import Path

from streaming.errors import NodeError
from streaming.storage.private_folder import make_private

# The part that is left of the rate where a storage throttles.
_LEFT = 0.8
# Of what the storage answered in a second before, the rate grows by so much a second.
_GROWTH = 0.1
# Requests a second and node that are sent whatever is answered, and the least that growth is reckoned from.
_LEAST, _LEAST_FULL = 10.0, 40.0
# The rate is lowered once in so long: answers of a storage whose limit is one a second come in one lump.
_PATIENT_S = 0.2
# Answers are counted over a second, and a process tells the others of its own so often.
_WINDOW_S, _TELL_S = 1.0, 0.05
# What was waited too long in one place may be caught up with.
_SLACK_S = 0.05
# Nobody's request is due so late: the file is of before the machine was started.
_STALE_S = 600.0


@dataclass(slots=True)
class BrakeState:
    """What the processes of a node share; times as time.monotonic, which all of them have in common."""

    rate: float = 0.0
    """requests a second; 0: as many as are wanted"""
    due: float = 0.0
    """when the next one may be sent"""
    raised_at: float = 0.0
    """when the rate was last made to grow"""
    lowered_at: float = 0.0
    full: float = 0.0
    """answers a second when the storage began to throttle"""
    window_at: float = 0.0
    """since when answers are counted"""
    answers: float = 0.0
    """since then"""
    before: float = 0.0
    """in the second before"""

    def answered(self, now: float, count: int = 1) -> None:
        """Counts answers."""
        self._turn(now)
        self.answers += count

    def answers_a_second(self, now: float) -> float:
        """Over the last second, as far as there were any before."""
        self._turn(now)
        passed = now - self.window_at
        if self.before:
            return self.before * (1 - passed / _WINDOW_S) + self.answers
        return self.answers / max(passed, _PATIENT_S)

    def _turn(self, now: float) -> None:
        late = now - self.window_at
        if not 0 <= late < 2 * _WINDOW_S:
            self.window_at, self.answers, self.before = now, 0.0, 0.0
        elif late >= _WINDOW_S:
            self.window_at, self.answers, self.before = self.window_at + _WINDOW_S, 0.0, self.answers

    def throttled(self, now: float, sent_at: float) -> None:
        """Lowers the rate for an answer to what was sent then, unless it was lowered for it already."""
        if self.rate and (sent_at < self.lowered_at or now - self.lowered_at < _PATIENT_S):
            return
        seen = self.answers_a_second(now)
        if not self.rate:
            self.full, self.due = max(seen, _LEAST_FULL), now
        self.rate = max(_LEAST, _LEFT * (min(1.2 * seen, self.rate) if self.rate else seen))
        self.lowered_at = self.raised_at = now

    def next_at(self, now: float) -> float:
        """When a request may be sent, which then counts as sent."""
        if not self.rate:
            return now
        if abs(now - self.raised_at) > _STALE_S:
            self.rate = 0.0
            return now
        self.rate += _GROWTH * self.full * (now - self.raised_at)
        self.raised_at = now
        if self.rate > 2 * self.full:  # far beyond where it was throttled
            self.rate = 0.0
            return now
        at = max(self.due, now - _SLACK_S)
        self.due = at + 1 / self.rate
        return at


_LAYOUT, _RATE = struct.Struct("8d"), struct.Struct("d")


class Brake:
    """The brake of this node for one storage. Safe to use from several threads and processes."""

    def __init__(self, storage: str) -> None:
        """Storage is what tells it from others: those with the same name brake together."""
        self._name = hashlib.sha256(storage.encode()).hexdigest()[:32]
        self._memory: mmap.mmap | None = None
        self._file = -1
        self._queue, self._lock = threading.Lock(), threading.Lock()
        self._untold, self._told_at = 0, 0.0
        """answers of this process that the others were not told of, and when they last were"""

    def wait(self) -> float:
        """Waits until a request may be sent; how many seconds."""
        if self._memory and not _RATE.unpack_from(self._memory)[0]:
            return 0.0
        began = time.monotonic()
        # One thread of a process has its turn fixed at a time: were all of them, they would not notice a lower rate.
        with self._queue:
            with self._shared() as state:
                at = state.next_at(began)
            if (pause := at - time.monotonic()) > 0:
                time.sleep(pause)
        return time.monotonic() - began

    def answered(self) -> None:
        """Counts what the storage has answered."""
        with self._lock:
            self._untold += 1
            if time.monotonic() - self._told_at < _TELL_S:
                return
        with self._shared() as state:
            self._tell(state)

    def throttled(self, sent_at: float) -> None:
        """Slows down, because what was sent then (as time.monotonic) was answered by 429 or 503."""
        with self._shared() as state:
            now = self._tell(state)
            state.throttled(now, sent_at)

    def _tell(self, state: BrakeState) -> float:
        """Has the others count what was answered here; when that was."""
        now = time.monotonic()
        state.answered(now, self._untold)
        self._untold, self._told_at = 0, now
        return now

    @contextlib.contextmanager
    def _shared(self) -> Generator[BrakeState]:
        """The state, which nobody else sees or changes meanwhile."""
        with self._lock:
            memory = self._memory or self._mapped()
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                state = BrakeState(*_LAYOUT.unpack_from(memory))
                yield state
                _LAYOUT.pack_into(memory, 0, *astuple(state))
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _mapped(self) -> mmap.mmap:
        folder = Path(tempfile.gettempdir(), f"tilestream-brakes-{os.geteuid()}")
        remedy = "readers agree there how fast to ask; set TMPDIR"
        make_private(folder, remedy)
        try:
            # Kept open: to close any descriptor of it would let go of this process's locks.
            self._file = os.open(folder / self._name, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(self._file, _LAYOUT.size)
            self._memory = mmap.mmap(self._file, _LAYOUT.size)
        except OSError as error:
            raise NodeError(f"{folder}: {error.strerror or error}; {remedy}") from error
        return self._memory
