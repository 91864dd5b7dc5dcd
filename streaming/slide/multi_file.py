"""Slides of several files: which files belong to one, and what tells their version together."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterable, Sequence

from streaming import storage

# Formats whose pixels lie in other files than the one that is opened.
MULTI_FILE_SUFFIXES = (".mrxs", ".vms", ".vmu", ".dcm")
# What a Hamamatsu text names; OpenSlide reads none that is larger (KEY_FILE_MAX_SIZE of its hamamatsu.c).
_NAMED = re.compile(r"^\s*(?:ImageFile|MapFile|OptimisationFile|MacroImage)[^=\n]*=[ \t]*(.+?)\s*$", re.MULTILINE)
_MAX_TEXT = 2**16


def _suffix(uri: str) -> str:
    return posixpath.splitext(storage.name_of(uri))[1].lower()


def is_multi_file(uri: str) -> bool:
    """Whether a slide, told by its suffix, is of a format of several files."""
    return _suffix(uri) in MULTI_FILE_SUFFIXES


def members(uri: str, options: storage.StorageOptions | None = None) -> list[storage.ObjectInfo]:
    """The files of a slide, the one that is opened first; of a format of one file, just that.

    MRXS: the folder of the same stem. VMS and VMU: what the text names. DICOM: all `.dcm` of the folder, as their
    series could only be told by reading each. A file that is missing is missing here: OpenSlide tells what it wants.

    Raises:
        StorageError: the slide does not exist, or its folder can't be listed.
    """
    main = storage.stat(uri, options)
    folder, name = posixpath.split(main.uri)
    match _suffix(uri):
        case ".mrxs":
            others = storage.list_files(posixpath.splitext(main.uri)[0], lambda _: True, options)
        case ".vms" | ".vmu" if main.size <= _MAX_TEXT:
            named = _NAMED.findall(storage.read_bytes(main.uri, options).decode("utf-8", "replace"))
            others = storage.list_files(folder, lambda beside: beside in named, options)
        case ".dcm":
            others = storage.list_files(folder, lambda beside: _suffix(beside) == ".dcm", options)
        case _:
            others = []
    return [main, *(other for other in others if storage.name_of(other.uri) != name)]


def as_one(files: Sequence[storage.ObjectInfo]) -> storage.ObjectInfo:
    """A slide's files as one object of their total size, whose version changes with any of theirs."""
    main = files[0]
    if not is_multi_file(main.uri):
        return main
    notes = sorted(f"{storage.relative_name(file, main)}\n{file.version}\n{file.size}" for file in files)
    version = hashlib.sha256("\n".join(notes).encode()).hexdigest()[:32]
    return storage.ObjectInfo(main.uri, sum(file.size for file in files), version)


def without_members(slides: Iterable[storage.ObjectInfo]) -> list[storage.ObjectInfo]:
    """Of the DICOM files of a folder only the first by name: the folder is one slide."""
    ordered = sorted(slides, key=lambda slide: slide.uri)
    first = {posixpath.dirname(s.uri): s.uri for s in reversed(ordered) if _suffix(s.uri) == ".dcm"}
    return [s for s in ordered if _suffix(s.uri) != ".dcm" or first[posixpath.dirname(s.uri)] == s.uri]
