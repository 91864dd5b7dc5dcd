"""The slides that a user's sources name."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def find_slides(
    sources: Sequence[str], options: storage.StorageOptions | None, passed_over: Counter[str] | None = None
) -> list[storage.ObjectInfo]:
    """The slides that files, folders, globs and prefixes name: each once, sorted.

    In folders and globs a slide is told by its suffix; a file named outright is taken as it is. DICOM files are told by
    their content, and those of one series in one folder are one slide, whichever of them are named. Size and version
    of a slide of several files are those of all of them, of DICOM those of its levels. To `passed_over` is added how
    many files of each suffix, or DICOM objects of each kind, are no slide and belong to none.

    Raises:
        StorageError: a source is missing or can't be reached.
        CatalogError: a source holds no slide.
    """
    found: dict[str, Sequence[storage.ObjectInfo]] = {}
    others, kinds = set[str](), dict[str, str]()
    for source in sources:
        source = storage.canonical(source)
        objects, outright = storage.expand(source, options)
        dicom = _sorted_dicom(objects, options, outright=outright)
        kinds |= dicom.kinds
        plain = [o for o in objects if o.uri not in dicom.told]
        if not outright:
            plain = [o for o in plain if o.uri.lower().endswith(SLIDE_SUFFIXES) and not is_companion(o.uri)]
        if not plain and not dicom.slides:
            told = counted(Counter(_kinds((o.uri for o in objects), kinds)))
            what = f"none of its {len(objects)} files is a slide: {told}" if objects else "is empty"
            raise CatalogError(f"{source}: {what} ({', '.join(SLIDE_SUFFIXES)}); name a folder or file with slides")
        found.update({o.uri: [o] for o in plain})
        found.update({slide.levels[0].uri: slide.levels for slide in dicom.slides})
        others.update(o.uri for o in objects)
        others -= {info.uri for slide in dicom.slides for info in slide.beside}
    with ThreadPoolExecutor(_MAX_LISTINGS) as pool:
        files = list(pool.map(lambda uri: _files_of(found[uri], options), sorted(found)))
    if passed_over is not None:
        others -= {file.uri for of_slide in files for file in of_slide}
        passed_over.update(_kinds(others, kinds))
    return [as_one(of_slide) for of_slide in files]


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
        beside = storage.list_files(posixpath.dirname(candidates[0].uri), may_be_dicom, options)
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


def _kinds(uris: Iterable[str], dicom: Mapping[str, str]) -> Iterator[str]:
    """The suffix of each file, that of a store of many files once; of DICOM what it is."""
    stores: set[str] = set()
    for uri in uris:
        folder, inside, _ = uri.partition(f"{_STORE}/")
        if inside:
            stores.add(folder)
        elif uri in dicom:
            yield f"DICOM {dicom[uri]}"
        else:
            yield posixpath.splitext(storage.name_of(uri))[1].lower() or "without suffix"
    yield from [_STORE] * len(stores)
