"""Where a reader's time goes: seconds by stage, and what was asked of the storage.

Whoever does a piece of work is handed the counters that it counts into. Counting must cost nothing, so there are no
locks: counters belong to one thread, and whoever shares work out among threads adds theirs up.
"""

from __future__ import annotations

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
    """seconds in the HSV rule and other filters"""
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
    throttled: float = 0.0
    """how often of these because the storage throttled"""
    held_s: float = 0.0
    """seconds that requests were held back because it did, summed over them"""
    nbytes: float = 0.0
    """bytes of those ranges"""
    index_nbytes: float = 0.0
    """bytes of these that were of a remote catalog: tissue and block indexes, each part once a node"""
    staged_hits: float = 0.0
    """copies of remote slides found on local disk"""
    staged_misses: float = 0.0
    """copies of slides that had to be downloaded"""

    def add(self, other: Counters) -> None:
        """Adds another's numbers to these."""
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)


_NAMES = [entry.name for entry in fields(Counters)]


class _Uncounted(Counters):
    """Counters that stay at 0, so that threads may share them."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, 0.0)


UNCOUNTED = _Uncounted()
"""Where those count who were handed no counters."""
