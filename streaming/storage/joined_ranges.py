"""Several objects as one: their bytes are counted on from one to the next."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from streaming.counters import UNCOUNTED, Counters
from streaming.storage.ranges import PendingBytes, Ranges, Span, when_all


class JoinedRanges:
    """What `streaming.storage.ranges.Ranges` describes, of objects one after the other.

    Each is opened when it is first asked for. A span lies in one of them.
    """

    tag = ""  # each has its own

    def __init__(self, sizes: Sequence[int], openers: Sequence[Callable[[], Ranges]]) -> None:
        self._starts = [0, *accumulate(sizes)]
        self._openers = list(openers)
        self._opened: list[Ranges | None] = [None] * len(self._openers)
        self.size = self._starts[-1]

    def begin(self, spans: Sequence[Span], count: Counters = UNCOUNTED) -> PendingBytes:
        """Asks for the bytes [start, end) of each span.

        Raises:
            StorageError, SlideError: an object can't be opened, or is not the version that was catalogued.
        """
        by_member: dict[int, list[int]] = {}
        for number, (start, _) in enumerate(spans):
            by_member.setdefault(self._member_at(start), []).append(number)
        parts: list[PendingBytes] = []
        for member, numbers in by_member.items():
            base = self._starts[member]
            parts.append(self._member(member).begin([(spans[n][0] - base, spans[n][1] - base) for n in numbers], count))
        return parts[0] if len(parts) == 1 else _Parts(parts, list(by_member.values()))

    def locate(self, offset: int) -> tuple[str, int]:
        """The address of the object that a byte lies in, and where in it."""
        member = self._member_at(offset)
        return self._member(member).locate(offset - self._starts[member])

    def _member_at(self, offset: int) -> int:
        return min(bisect_right(self._starts, offset), len(self._openers)) - 1

    def _member(self, number: int) -> Ranges:
        found = self._opened[number]
        if found is None:
            # Two threads may both open it: nothing is held open, and the last one is kept.
            found = self._opened[number] = self._openers[number]()
        return found


@dataclass(frozen=True, slots=True)
class _Parts:
    """What several objects were asked for; `numbers` tell which of all spans each part's are."""

    parts: Sequence[PendingBytes]
    numbers: Sequence[Sequence[int]]

    def when_ready(self, call: Callable[[], object]) -> None:
        when_all(self.parts, lambda part, then: part.when_ready(then), call)

    def wait(self) -> list[bytes]:
        contents: dict[int, bytes] = {}
        for part, numbers in zip(self.parts, self.numbers, strict=True):
            contents.update(zip(numbers, part.wait(), strict=True))
        return [contents[number] for number in range(len(contents))]
