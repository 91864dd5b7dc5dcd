"""Arrays too large for memory, in a folder of one's choice, gone when they were scored."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from streaming.errors import ConfigError


class Scratch:
    """A folder for arrays that are mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A new array in a file of its own.

        Raises:
            ConfigError: the disk has no room for it.
        """
        wanted, free = (
            int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize,
            shutil.disk_usage(self.folder).free,
        )
        if wanted > free:
            raise ConfigError(
                f"{self.folder.parent}: {name} take {wanted / 1e9:,.1f} GB while they are scored, and "
                f"{free / 1e9:,.1f} GB are free; name a folder with room by --scratch"
            )
        return np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape)


@contextmanager
def scratch(folder: str | None = None) -> Generator[Scratch]:
    """A folder below `folder` (None: the system's for temporary files), removed at the end.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        own = tempfile.TemporaryDirectory(prefix="tilestream-", dir=folder)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror or error}; name a folder to write to by --scratch") from error
    with own as path:
        yield Scratch(Path(path))
