"""What a stored object is, and what its version is: the one place that decides it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from datetime import datetime

from streaming.errors import StorageError
from streaming.storage.addresses import folder_of, is_plain, name_of


@dataclass(frozen=True)
class ObjectInfo:
    """A stored object: where it is and what tells its version (ETag where there is one, else the modification time)."""

    uri: str
    size: int
    version: str
    files: tuple[ObjectInfo, ...] = field(default=(), compare=False, repr=False)
    """of a slide of several: these, the one that is opened first; where they are known"""

    @property
    def digest(self) -> str:
        """SHA-256 of all three, in hex: names what is made of just this version."""
        return hashlib.sha256(f"{self.uri}\n{self.version}\n{self.size}".encode()).hexdigest()


def object_version(etag: str | None, changed: datetime | None) -> str:
    """The version of an object by what its storage tells; of a web server that tells neither, always the same."""
    # Some listings quote the ETag, others do not.
    return etag.strip('"') if etag else "" if changed is None else changed.isoformat()


def file_version(stat: os.stat_result) -> str:
    """The version of a local file."""
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def relative_name(file: ObjectInfo, main: ObjectInfo) -> str:
    """A file's path from the folder of the main one of those that belong together.

    Raises:
        StorageError: it would lead out of that folder, as a listing may have it.
    """
    if file.uri == main.uri:
        return name_of(file.uri)
    name = file.uri.removeprefix(folder_of(main.uri) + "/")
    if not is_plain(name) or name.startswith("/") or "://" in name:
        raise StorageError(f"{file.uri}: its name leads out of the folder of {main.uri}; rename it")
    return name
