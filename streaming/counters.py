"""Where a reader's time goes: seconds by stage, and what was asked of the storage.

Counting must cost nothing: each thread adds to counters of its own, without locks, and whoever began them adds them up.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from dataclasses import asdict, dataclass, fields


@dataclass(slots=True, kw_only=True)
class Counters:
    """What reading some tiles took; the stages' seconds lie one after the other and within `total_s`."""

    plan_s: float = 0.0
    """seconds from indices to places on slides"""
    open_s: float = 0.0
    """seconds in opening slides and their block indices, staged copies included"""
    request_s: float = 0.0
    """seconds in finding the blocks' places and asking for them"""
    fetch_s: float = 0.0
    """seconds in waiting for bytes"""
    decode_s: float = 0.0
    """seconds from compressed blocks to pixels; where OpenSlide serves, all of its reading"""
    assemble_s: float = 0.0
    """seconds in putting blocks together into tiles"""
    resample_s: float = 0.0
    """seconds in resizing"""
    filter_s: float = 0.0
    """seconds in the HSV rule"""
    total_s: float = 0.0
    """seconds of whole batches, wall clock, summed over threads"""
    tiles: float = 0.0
    """tiles handed out"""
    blocks: float = 0.0
    """compressed blocks decoded"""
    requests: float = 0.0
    """byte ranges asked for"""
    retries: float = 0.0
    """how often one of them was sent again: throttled, broken off, refused by a server in trouble"""
    nbytes: float = 0.0
    """bytes of those ranges"""
    staged_hits: float = 0.0
    """copies of remote files found on local disk"""
    staged_misses: float = 0.0
    """copies that had to be downloaded"""

    def add(self, other: Counters) -> None:
        """Adds another's numbers to these."""
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)


_NAMES = [entry.name for entry in fields(Counters)]


class _Mine(threading.local):
    def __init__(self) -> None:
        self.counters = Counters()


_mine = _Mine()


def mine() -> Counters:
    """What this thread counts into at the moment."""
    return _mine.counters


@contextlib.contextmanager
def counting() -> Generator[Counters]:
    """Lets this thread count into fresh counters until the block ends."""
    before, _mine.counters = _mine.counters, Counters()
    try:
        yield _mine.counters
    finally:
        _mine.counters = before
