"""The slides that a user's sources name."""

from __future__ import annotations

import glob
import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streaming import storage
from streaming.errors import CatalogError
from streaming.slide import SLIDE_SUFFIXES
from streaming.slide.multi_file import as_one, is_companion, is_multi_file, may_be_dicom, members

if TYPE_CHECKING:
    from streaming.slide.dicom_series import Series

_MAX_LISTINGS = 16
# Images of many files without a suffix of their own, one a chunk.
_STORE = ".zarr"
_MAX_KINDS = 6
# Folders that systems and other programs make for themselves, beside those whose names begin with a point.
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_COMPANION, _HIDDEN, _NO_TEXT = "._ files of macOS", "in hidden and system folders", "names that are not in UTF-8"


def find_slides(
    sources: Sequence[str], options: storage.StorageOptions | None, skipped: dict[str, str] | None = None
) -> list[storage.ObjectInfo]:
    """The slides that files, folders, globs and prefixes name: each once, sorted.

    In folders and globs a slide is told by its suffix, and hidden folders and those of systems are passed over; a file
    named outright is taken as it is. DICOM files are told by their content, and those of one series in one folder are
    one slide, whichever of them are named. Size and version of a slide of several files are those of all of them, of
    DICOM those of its levels. To `skipped` is added, by address, what is no slide and belongs to none, and of which
    kind it is: its suffix, what DICOM object, or why it can't be looked at. An image store is one.

    Raises:
        StorageError: a source is missing or can't be reached.
        CatalogError: a source holds no slide.
    """
    found: dict[str, Sequence[storage.ObjectInfo]] = {}
    others, belonging = dict[str, str](), set[str]()
    for source in sources:
        source = storage.canonical(source)
        left_out: dict[str, str] = {}
        objects, outright = storage.expand(source, options, left_out)
        num_seen = len(objects)
        left_out |= {o.uri: _NO_TEXT for o in objects if _as_text(o.uri) != o.uri}
        if not outright:
            left_out |= {o.uri: _HIDDEN for o in objects if _is_hidden(source, o.uri)}
        objects = [o for o in objects if o.uri not in left_out]
        dicom = _sorted_dicom(objects, options, outright=outright)
        plain = [o for o in objects if o.uri not in dicom.told]
        if not outright:
            plain = [o for o in plain if o.uri.lower().endswith(SLIDE_SUFFIXES) and not is_companion(o.uri)]
        left_out |= dict(_kind(o.uri, dicom.kinds) for o in objects)
        if not plain and not dicom.slides:
            told = counted(Counter(left_out.values()))
            what = f"none of its {num_seen} files is a slide: {told}" if left_out else "is empty"
            raise CatalogError(
                f"{_as_text(source)}: {what} ({', '.join(SLIDE_SUFFIXES)}); name a folder or file with slides"
            )
        found.update({o.uri: [o] for o in plain})
        found.update({slide.levels[0].uri: slide.levels for slide in dicom.slides})
        others |= left_out
        belonging |= {info.uri for slide in dicom.slides for info in slide.beside}
    with ThreadPoolExecutor(_MAX_LISTINGS) as pool:
        files = list(pool.map(lambda uri: _files_of(found[uri], options), sorted(found)))
    if skipped is not None:
        belonging |= {file.uri for of_slide in files for file in of_slide}
        skipped.update((_as_text(uri), kind) for uri, kind in others.items() if uri not in belonging)
    return [as_one(of_slide) for of_slide in files]


def _as_text(uri: str) -> str:
    """An address as a table can hold it: names on a disk may be any bytes."""
    return uri.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_of_system(name: str) -> bool:
    """Whether a folder is hidden, or one that a system or another program made for itself, by its name."""
    return (name.startswith(".") and name not in (".", "..")) or name in _OF_SYSTEMS  # which S3 has as names


def _is_hidden(source: str, uri: str) -> bool:
    """Whether an object lies in a folder below a folder or pattern that no one keeps slides in."""
    fixed = re.split(r"[*?[]", source)[0] if glob.has_magic(source) else f"{source}/"
    above = fixed.rpartition("/")[0]
    if "/." in source.removeprefix(above):
        return False  # the pattern asks for them
    folders = uri.removeprefix(above).split("/")[:-1]
    return any(map(is_of_system, folders))


def _files_of(files: Sequence[storage.ObjectInfo], options: storage.StorageOptions | None) -> list[storage.ObjectInfo]:
    return members(files[0].uri, options) if is_multi_file(files[0].uri) else list(files)


@dataclass(frozen=True)
class _Dicom:
    """What the DICOM files of a source are."""

    slides: Sequence[Series]
    kinds: dict[str, str]
    """by address, those that are no slide and belong to none"""
    told: set[str]
    """addresses of all that are known to be DICOM"""


def _sorted_dicom(
    objects: Sequence[storage.ObjectInfo], options: storage.StorageOptions | None, *, outright: bool
) -> _Dicom:
    candidates = [o for o in objects if may_be_dicom(o.uri)]
    if not candidates:
        return _Dicom([], {}, set())
    # Its parser is imported for DICOM alone.
    from streaming.slide.dicom_series import sort_objects

    if outright:
        # The rest of its series lies beside it.
        beside = storage.list_beside(candidates[0].uri, may_be_dicom, options)
        candidates += [o for o in beside if o.uri != candidates[0].uri]
    found = sort_objects(candidates, options)
    named = {o.uri for o in objects}
    slides = [s for s in found.slides if named & {info.uri for info in (*s.levels, *s.beside)}]
    kinds = {uri: kind for uri, kind in found.others.items() if uri in named}
    belonging = {info.uri for slide in slides for info in (*slide.levels, *slide.beside)}
    return _Dicom(slides, kinds, belonging | kinds.keys())


def counted(kinds: Counter[str]) -> str:
    """How many there are of the six most frequent kinds, and of all others together: `30 .vsi, 20 .isyntax`."""
    named = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))[:_MAX_KINDS]
    rest = kinds.total() - sum(count for _, count in named)
    return ", ".join([*(f"{count} {kind}" for kind, count in named), *([f"{rest} others"] if rest else [])])


def _kind(uri: str, dicom: Mapping[str, str]) -> tuple[str, str]:
    """What an object that is no slide is called by, and what it is: a store of many files, DICOM, or by its suffix."""
    folder, inside, _ = uri.partition(f"{_STORE}/")
    if inside:
        return f"{folder}{_STORE}", _STORE
    if uri in dicom:
        return uri, f"DICOM {dicom[uri]}"
    if is_companion(uri):
        return uri, _COMPANION
    return uri, posixpath.splitext(storage.name_of(uri))[1].lower() or "without suffix"
