"""The slides that a user's sources name."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from streaming import storage
from streaming.errors import CatalogError
from streaming.slide import SLIDE_SUFFIXES
from streaming.slide.multi_file import as_one, is_multi_file, members, without_members

_MAX_LISTINGS = 16
# Images of many files without a suffix of their own, one a chunk.
_STORE = ".zarr"
_MAX_KINDS = 6


def find_slides(
    sources: Sequence[str], options: storage.StorageOptions | None, passed_over: Counter[str] | None = None
) -> list[storage.ObjectInfo]:
    """The slides that files, folders, globs and prefixes name: each once, sorted.

    In folders and globs a slide is told by its suffix, and the DICOM files of a folder are one; a file named outright
    is taken as it is. Size and version of a slide of several files are those of all of them. To `passed_over` is added
    how many files of each suffix are no slide and belong to none.

    Raises:
        StorageError: a source is missing or can't be reached.
        CatalogError: a source holds no slide.
    """
    found: dict[str, storage.ObjectInfo] = {}
    others: set[str] = set()
    for source in sources:
        source = storage.canonical(source)
        objects, outright = storage.expand(source, options)
        slides = objects if outright else without_members(o for o in objects if o.uri.lower().endswith(SLIDE_SUFFIXES))
        if not slides:
            kinds = counted(Counter(_kinds(o.uri for o in objects)))
            what = f"none of its {len(objects)} files is a slide: {kinds}" if objects else "is empty"
            raise CatalogError(f"{source}: {what} ({', '.join(SLIDE_SUFFIXES)}); name a folder or file with slides")
        found.update({o.uri: o for o in slides})
        others.update(o.uri for o in objects)
    with ThreadPoolExecutor(_MAX_LISTINGS) as pool:
        files = list(pool.map(lambda uri: _files_of(found[uri], options), sorted(found)))
    if passed_over is not None:
        others -= {file.uri for of_slide in files for file in of_slide}
        passed_over.update(_kinds(others))
    return [as_one(of_slide) for of_slide in files]


def _files_of(info: storage.ObjectInfo, options: storage.StorageOptions | None) -> list[storage.ObjectInfo]:
    return members(info.uri, options) if is_multi_file(info.uri) else [info]


def counted(kinds: Counter[str]) -> str:
    """How many there are of the six most frequent kinds, and of all others together: `30 .vsi, 20 .isyntax`."""
    named = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))[:_MAX_KINDS]
    rest = kinds.total() - sum(count for _, count in named)
    return ", ".join([*(f"{count} {kind}" for kind, count in named), *([f"{rest} others"] if rest else [])])


def _kinds(uris: Iterable[str]) -> Iterator[str]:
    """The suffix of each file, that of a store of many files once."""
    stores: set[str] = set()
    for uri in uris:
        folder, inside, _ = uri.partition(f"{_STORE}/")
        if inside:
            stores.add(folder)
        else:
            yield posixpath.splitext(storage.name_of(uri))[1].lower() or "without suffix"
    yield from [_STORE] * len(stores)
