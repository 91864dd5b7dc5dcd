"""Ranges of an object as a file, for parsers that read a little here and there."""

from __future__ import annotations

from functools import lru_cache

from streaming.counters import UNCOUNTED, Counters
from streaming.storage.ranges import Ranges, read_range

_PAGES_KEPT = 100


class RangeFile:
    """A read-only seekable file over ranges; it fetches and keeps pages of 64 KiB, a hundred at most."""

    _PAGE = 2**16
    _MAX_PAGES_READ = 9  # a longer piece is fetched as it is, and kept by nobody

    def __init__(self, ranges: Ranges, count: Counters = UNCOUNTED) -> None:
        self._ranges, self._count, self._at = ranges, count, 0
        self._page = lru_cache(maxsize=_PAGES_KEPT)(self._fetch)

    def _fetch(self, page: int) -> bytes:
        start = page * self._PAGE
        return read_range(self._ranges, start, min(start + self._PAGE, self._ranges.size), self._count)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As io's."""
        self._at = max(0, offset + (0, self._at, self._ranges.size)[whence])
        return self._at

    def tell(self) -> int:
        """As io's."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """As io's: fewer bytes at the end."""
        end = self._ranges.size if size < 0 else min(self._at + size, self._ranges.size)
        if end <= self._at:
            return b""
        first, last = self._at // self._PAGE, (end - 1) // self._PAGE
        if last - first >= self._MAX_PAGES_READ:
            content = read_range(self._ranges, self._at, end, self._count)
        else:
            pages = b"".join(self._page(page) for page in range(first, last + 1))
            content = pages[self._at - first * self._PAGE : end - first * self._PAGE]
        self._at = end
        return content
