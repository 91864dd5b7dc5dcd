"""Ranges of an object as a file, for parsers that read a little here and there."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import TYPE_CHECKING

from streaming.counters import UNCOUNTED, Counters
from streaming.storage.ranges import Ranges

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# A long piece comes in parts, at once.
PART_NBYTES = 2**21
_KEPT_NBYTES = 100 * 2**16
_MAX_NBYTES = 9 * 2**16  # a longer piece is fetched as it is, and kept by nobody


class RangeFile:
    """A read-only seekable file over ranges; it fetches and keeps pages, of 64 KiB unless told otherwise.

    Pages that follow each other and are not there yet are one request.
    """

    def __init__(self, ranges: Ranges, count: Counters = UNCOUNTED, page_nbytes: int = 2**16) -> None:
        self.size = ranges.size
        self._ranges, self._count, self._at, self._page_nbytes = ranges, count, 0, page_nbytes
        self._pages: OrderedDict[int, bytes] = OrderedDict()

    def seek(self, offset: int, whence: int = 0) -> int:
        """As io's."""
        self._at = max(0, offset + (0, self._at, self.size)[whence])
        return self._at

    def tell(self) -> int:
        """As io's."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """As io's: fewer bytes at the end."""
        end = self.size if size < 0 else min(self._at + size, self.size)
        if end <= self._at:
            return b""
        first, last = self._at // self._page_nbytes, (end - 1) // self._page_nbytes
        if first == last and first in self._pages:
            # Parsers read some bytes at a time, a thousand times.
            self._pages.move_to_end(first)
            begin = first * self._page_nbytes
            content = self._pages[first][self._at - begin : end - begin]
        elif end - self._at <= _MAX_NBYTES or all(page in self._pages for page in range(first, last + 1)):
            pages = b"".join(self._kept(first, last))
            content = pages[self._at - first * self._page_nbytes : end - first * self._page_nbytes]
        else:
            spans = [(start, min(start + PART_NBYTES, end)) for start in range(self._at, end, PART_NBYTES)]
            content = b"".join(self._ranges.begin(spans, self._count).wait())
        self._at = end
        return content

    def fetch(self, start: int, end: int) -> None:
        """Fetches what is going to be read by one request; of more than 6 MB, the first ones."""
        first, last = start // self._page_nbytes, (min(end, start + _KEPT_NBYTES, self.size) - 1) // self._page_nbytes
        self._kept(first, last)

    def _kept(self, first: int, last: int) -> list[bytes]:
        """Some pages, those fetched that are not there yet."""
        nbytes, spans, missing = self._page_nbytes, list[tuple[int, int]](), list[int]()
        for page in range(first, last + 1):
            if page in self._pages:
                self._pages.move_to_end(page)
                continue
            start, end = page * nbytes, min((page + 1) * nbytes, self.size)
            if spans and spans[-1][1] == start:
                spans[-1] = spans[-1][0], end
            else:
                spans.append((start, end))
            missing.append(page)
        if spans:
            contents = self._ranges.begin(spans, self._count).wait()
            for (start, _), content in zip(spans, contents, strict=True):
                for at in range(0, len(content), nbytes):
                    self._pages[(start + at) // nbytes] = content[at : at + nbytes]
        found = [self._pages[page] for page in range(first, last + 1)]
        while len(self._pages) * nbytes > _KEPT_NBYTES:
            self._pages.popitem(last=False)
        return found


class _Raw(io.RawIOBase):
    """A RangeFile as the io module wants a file."""

    def __init__(self, file: RangeFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def readall(self) -> bytes:
        return self._file.read()

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        content = self._file.read(len(view))
        view[: len(content)] = content
        return len(content)


def opened(ranges: Ranges) -> io.BufferedReader:
    """A file of the io module over ranges, for libraries that insist on one."""
    return io.BufferedReader(_Raw(RangeFile(ranges)), PART_NBYTES)
