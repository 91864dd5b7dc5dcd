"""The slides that a user's sources name."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from streaming import storage
from streaming.errors import CatalogError
from streaming.slide import SLIDE_SUFFIXES
from streaming.slide.multi_file import as_one, is_multi_file, members, without_members

_MAX_LISTINGS = 16


def find_slides(sources: Sequence[str], options: storage.StorageOptions | None) -> list[storage.ObjectInfo]:
    """The slides that files, folders, globs and prefixes name: each once, sorted.

    In folders and globs a slide is told by its suffix, and the DICOM files of a folder are one; a file named outright
    is taken as it is. Size and version of a slide of several files are those of all of them.

    Raises:
        StorageError: a source is missing or can't be reached.
        CatalogError: a source holds no slide.
    """
    found: dict[str, storage.ObjectInfo] = {}
    for source in sources:
        source = storage.canonical(source)
        objects, outright = storage.expand(source, options)
        slides = objects if outright else without_members(o for o in objects if o.uri.lower().endswith(SLIDE_SUFFIXES))
        if not slides:
            what = f"none of its {len(objects)} files is a slide" if objects else "is empty"
            raise CatalogError(f"{source}: {what} ({', '.join(SLIDE_SUFFIXES)}); name a folder or file with slides")
        found.update({o.uri: o for o in slides})
    with ThreadPoolExecutor(_MAX_LISTINGS) as pool:
        return list(pool.map(lambda uri: _whole(found[uri], options), sorted(found)))


def _whole(info: storage.ObjectInfo, options: storage.StorageOptions | None) -> storage.ObjectInfo:
    return as_one(members(info.uri, options)) if is_multi_file(info.uri) else info
