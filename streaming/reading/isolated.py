"""Tiles read in a process apart, so that one that crashes its decoder costs itself alone."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from ray.cloudpickle import cloudpickle

from streaming.catalog import Catalog
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import SlideError, StorageError, StreamError
from streaming.slide import PendingTile, Slide
from streaming.slide.resample import Pixels
from streaming.storage.staging import Staging

# Not the tile's doing: whoever has too little memory, or stops a job, kills like this.
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
_MAX_KILLS = 3


class IsolatedPool:
    """What `SlidePool` does, in a process of its own; another one is started when a tile has crashed it.

    What happens there is not counted.
    """

    def __init__(self, catalog: Catalog, storage_options: dict[str, Any], staging: Staging) -> None:
        self._slides = catalog.slides()
        self._content = cloudpickle.dumps((catalog, storage_options, staging))
        self._process: SpawnProcess | None = None

    def prepare(
        self, tiles: Sequence[tuple[int, int, int, float]], size: int, tolerance: float, count: Counters = UNCOUNTED
    ) -> None:
        """Nothing: slides are opened where they are read."""

    def begin_tile(
        self, key: int, x: int, y: int, mpp: float, size: int, tolerance: float, count: Counters = UNCOUNTED
    ) -> PendingTile:
        """A tile of the catalog's row `key`; it is read when it is filled."""
        del count
        return _IsolatedTile(self, key, x, y, mpp, size, tolerance)

    def read(self, key: int, x: int, y: int, mpp: float, size: int, tolerance: float) -> Pixels:
        """A tile of the catalog's row `key`, uint8 (size, size, 3), read in the process apart.

        Raises:
            SlideError, StorageError: it can't be read, or crashes the process that reads it.
            StreamError: that process is killed from outside, again and again.
        """
        for _ in range(_MAX_KILLS):
            answer = self._ask((key, x, y, mpp, size, tolerance))
            if isinstance(answer, Exception):
                raise answer
            if not isinstance(answer, int):
                return answer
            if answer not in _FROM_OUTSIDE:
                what = signal.Signals(-answer).name if answer < 0 else f"exit status {answer}"
                raise SlideError(
                    f"{self._slides[key]}: tile at {x}, {y} of {mpp} µm/px crashes its decoder ({what}); "
                    "compare the slide with its source"
                )
        raise StreamError(
            f"{self._slides[key]}: the process that reads its tile at {x}, {y} was killed {_MAX_KILLS} times; "
            "is the node short of memory?"
        )

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._connection.close()
            self._process.join()
            self._process = None

    def _ask(self, tile: tuple[int, int, int, float, int, float]) -> Pixels | Exception | int:
        """The pixels, or what reading raised, or how the process ended that should have read them."""
        process = self._process = self._process or self._start()
        try:
            self._connection.send(tile)
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process = None
            process.join()
            assert process.exitcode is not None, "it was waited for"
            return process.exitcode

    def _start(self) -> SpawnProcess:
        self._connection, other = Pipe()
        # A fork would have none of the threads that its libraries count on.
        process = get_context("spawn").Process(target=_serve, args=(other, self._content), daemon=True)
        process.start()
        other.close()
        return process


@dataclass(frozen=True, slots=True)
class _IsolatedTile:
    """A tile that is still to be read; what `streaming.slide.PendingTile` describes."""

    pool: IsolatedPool
    key: int
    x: int
    y: int
    mpp: float
    size: int
    tolerance: float

    def when_ready(self, call: Callable[[], object]) -> None:
        call()  # it is read when it is filled

    def fill(self, out: Pixels) -> None:
        out[:] = self.pool.read(self.key, self.x, self.y, self.mpp, self.size, self.tolerance)


def _serve(connection: Connection, content: bytes) -> None:
    """Reads tiles until nobody asks for more."""
    catalog, options, staging = pickle.loads(content)
    slides: dict[int, Slide] = {}
    while True:
        try:
            row, x, y, mpp, size, tolerance = connection.recv()
        except EOFError:
            return
        try:
            if row not in slides:
                slides[row] = catalog.open_slide(row, options, staging)
            connection.send(slides[row].read_tile(x, y, mpp, size, tolerance=tolerance))
        except (SlideError, StorageError) as error:
            connection.send(error)
