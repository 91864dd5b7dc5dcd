"""Slides of several files: which files belong to one, and what tells their version together."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Sequence

from streaming import storage

# Formats whose pixels lie in other files than the one that is opened.
MULTI_FILE_SUFFIXES = (".mrxs", ".vms", ".vmu")
DICOM_SUFFIXES = (".dcm", ".dicom")
DICOM_MAGIC_NBYTES = 132  # its magic lies behind a preamble
# What a Hamamatsu text names; OpenSlide reads none that is larger (KEY_FILE_MAX_SIZE of its hamamatsu.c).
_NAMED = re.compile(r"^\s*(?:ImageFile|MapFile|OptimisationFile|MacroImage)[^=\n]*=[ \t]*(.+?)\s*$", re.MULTILINE)
_MAX_TEXT = 2**16


def _suffix(uri: str) -> str:
    return posixpath.splitext(storage.name_of(uri))[1].lower()


def is_multi_file(uri: str) -> bool:
    """Whether a slide, told by its suffix, is of a format of several files that only OpenSlide reads."""
    return _suffix(uri) in MULTI_FILE_SUFFIXES


def is_companion(uri: str) -> bool:
    """Whether it is such as macOS lays beside a file: `._a.svs`."""
    return storage.name_of(uri).startswith("._")


def may_be_dicom(uri: str) -> bool:
    """Whether an object may be DICOM by its name: by the suffix, or without one, or called by its UID."""
    name, suffix = storage.name_of(uri), _suffix(uri)
    is_odd = (suffix == "" or suffix[1:].isdigit()) and not name.startswith(".")
    return is_odd or (suffix in DICOM_SUFFIXES and not is_companion(uri))


def is_folder(uri: str) -> bool:
    """Whether an address names a folder, not an object: it says so, or a local one is there."""
    return uri.endswith(("/", "/*")) or (storage.is_local(uri) and os.path.isdir(storage.local_path(uri)))


def is_dicom(start: bytes) -> bool:
    """Whether an object that begins so (`DICOM_MAGIC_NBYTES` do) is a DICOM file."""
    return start[128:DICOM_MAGIC_NBYTES] == b"DICM"


def members(uri: str, options: storage.StorageOptions | None = None) -> list[storage.ObjectInfo]:
    """The files of a slide, the one that is opened first; of a format of one file, just that.

    MRXS: the folder of the same stem. VMS and VMU: what the text names. A file that is missing is missing here:
    OpenSlide tells what it wants. What belongs to a DICOM object, its content tells (`dicom_series`).

    Raises:
        StorageError: the slide does not exist, or its folder can't be listed.
    """
    main = storage.stat(uri, options)
    name = storage.name_of(main.uri)
    match _suffix(uri):
        case ".mrxs":
            others = storage.list_files(posixpath.splitext(main.uri)[0], lambda _: True, options)
        case ".vms" | ".vmu" if main.size <= _MAX_TEXT:
            named = _NAMED.findall(storage.read_bytes(main.uri, options).decode("utf-8", "replace"))
            others = storage.list_beside(main.uri, lambda beside: beside in named, options)
        case _:
            others = []
    return [main, *(other for other in others if storage.name_of(other.uri) != name)]


def as_one(files: Sequence[storage.ObjectInfo]) -> storage.ObjectInfo:
    """A slide's files as one object of their total size, whose version changes with any of theirs."""
    main = files[0]
    if len(files) == 1:
        return main
    notes = sorted(f"{storage.relative_name(file, main)}\n{file.version}\n{file.size}" for file in files)
    version = hashlib.sha256("\n".join(notes).encode()).hexdigest()[:32]
    return storage.ObjectInfo(main.uri, sum(file.size for file in files), version, tuple(files))
