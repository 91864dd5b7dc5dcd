"""What a user's sources name: slides of files and folders, of tables, and of the Imaging Data Commons."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from streaming import storage
from streaming.catalog import idc, listings
from streaming.catalog.idc import IdcOptions
from streaming.catalog.metadata_csv import mpp_of
from streaming.catalog.named import Named
from streaming.catalog.sources import find_slides
from streaming.errors import ConfigError, StorageError, UnreachableError
from streaming.slide.multi_file import as_one, may_be_dicom

_IN_FLIGHT = 16
# What cataloguing takes, by the average of series of the Imaging Data Commons: the listing; of each file its header; of
# each level where its frames are; for the thumbnail a level's frames, row by row. That level is of a sixteenth of the
# slide's width, and so of 0.4 % of its bytes; tables have some 16 bytes of a frame's 15 KB.
_GETS_A_FILE, _GETS_A_LEVEL, _THUMBNAIL_GETS = 1, 2, 20
_NBYTES_A_GET, _THUMBNAIL_SHARE = 32_000, 0.005


def find(
    sources: Sequence[str],
    options: storage.StorageOptions | None = None,
    asked: IdcOptions | None = None,
    skipped: dict[str, str] | None = None,
) -> list[Named]:
    """What sources name, each once, sorted by address.

    A source is a file, folder, glob or prefix with slides, a table of addresses, or `idc:` with a collection or glob.
    Series of `idc:` and slides of public buckets are not looked at yet: their keys are of one content for ever. To
    `skipped` is added what `find_slides` tells.

    Raises:
        ConfigError: a table or the index makes no sense, or names nothing; two tell different things of a slide.
        StorageError: a source is missing or can't be reached.
        CatalogError: a folder holds no slide.
    """
    asked, found = asked or IdcOptions(), dict[str, Named]()
    patterns = [source.removeprefix(idc.SCHEME) for source in sources if source.startswith(idc.SCHEME)]
    if patterns:
        _add(found, idc.find_series(patterns, asked, options))
    elif asked.where or asked.idc_index:
        raise ConfigError("--where and --idc-index choose among idc: sources; name one, for example idc:tcga_brca")
    others = [source for source in sources if not source.startswith(idc.SCHEME)]
    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        for table in filter(_is_table, others):
            listed = listings.read_listing(storage.canonical(table), options, skipped)
            _add(found, pool.map(lambda named: _looked_at(named, options), listed))
    for folder in (source for source in others if not _is_table(source)):
        slides = _found_at(storage.canonical(folder), options, skipped)
        _add(found, (Named(uri=info.uri, info=info, nbytes=info.size) for info in slides))
    return [found[uri] for uri in sorted(found)]


def _add(found: dict[str, Named], more: Iterable[Named]) -> None:
    """Adds what a source names; of what another one named already, what both tell comes together.

    Raises:
        ConfigError: they tell different things.
    """
    for named in more:
        before = found.get(named.uri)
        if before is not None:
            told, anew = before.metadata, named.metadata
            if odd := [name for name in told if anew.get(name, told[name]) != told[name]]:
                values = f"{odd[0]} {told[odd[0]]!r} and {anew[odd[0]]!r}"
                raise ConfigError(f"{named.uri}: named twice, with {values}; keep one of them")
            named = replace(named, info=named.info or before.info, metadata={**told, **anew})
        found[named.uri] = named


def _is_table(source: str) -> bool:
    return source.lower().endswith(listings.SUFFIXES)


def _looked_at(named: Named, options: storage.StorageOptions | None) -> Named:
    """A slide of a table with its version, unless its key tells it; one that is missing is told when it is opened."""
    if named.is_series or storage.place_of(named.uri, options).by_size:
        return named
    try:
        info = storage.identified(named.uri, options)
    except UnreachableError:
        raise
    except StorageError:
        return named
    return replace(named, info=info, nbytes=info.size)


def _found_at(
    source: str, options: storage.StorageOptions | None, skipped: dict[str, str] | None
) -> list[storage.ObjectInfo]:
    """The slides of a file, folder or glob, which may lie in a mirror."""
    place = storage.place_of(source, options)
    slides = find_slides([place.uri], place.options, skipped)
    if place.uri == source and not place.by_size:
        return slides
    named = [place.named(info) for info in slides]
    return [as_one(info.files) if info.files else info for info in named]


def slide_of(named: Named, options: storage.StorageOptions | None = None) -> storage.ObjectInfo:
    """What a source names as one slide by its own address, wherever it is read.

    That of a series is of all files of its folder, whichever: when it is opened, their headers tell the levels.

    Raises:
        StorageError: it is missing or can't be reached.
    """
    if named.info is not None:
        return named.info
    if not named.is_series:
        return storage.identified(named.uri, options)
    if named.levels:
        return as_one(named.levels)
    place = storage.place_of(named.uri, options)
    files = storage.list_files(place.uri, may_be_dicom, place.options)
    if not files:
        raise StorageError(f"{named.uri}: no DICOM file in {place.uri}; is it a series, and the copy there complete?")
    return as_one([place.named(file) for file in files])


def slides_of_all(
    sources: Sequence[str], options: storage.StorageOptions | None = None, asked: IdcOptions | None = None
) -> list[tuple[storage.ObjectInfo, float | None]]:
    """All slides that sources name, sorted, each with the µm/px that a table among the sources tells of it.

    Raises:
        ConfigError, StorageError, CatalogError: as `find`; a series holds no slide, or a µm/px is none.
    """
    found = find(sources, options, asked)
    told = [mpp_of(named.metadata, named.uri) for named in found]
    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        slides = pool.map(lambda named: _exactly(named, options), found)
        with_mpp = [(info, mpp) for of_one, mpp in zip(slides, told, strict=True) for info in of_one]
    return sorted(with_mpp, key=lambda slide: slide[0].uri)


def _exactly(named: Named, options: storage.StorageOptions | None) -> list[storage.ObjectInfo]:
    return _found_at(named.uri, options, None) if named.is_series else [slide_of(named, options)]


def work_line(todo: Sequence[Named], num_done: int) -> str:
    """What cataloguing is going to take, in one line."""
    requests = nbytes = 0
    for named in todo:
        num_levels = (len(named.levels) or max(1, named.num_files - 2)) if named.is_series else 1
        num_files = len(named.levels) or named.num_files + 1
        of_one = num_files * _GETS_A_FILE + num_levels * _GETS_A_LEVEL + _THUMBNAIL_GETS
        requests += of_one
        nbytes += round(of_one * _NBYTES_A_GET + named.nbytes * _THUMBNAIL_SHARE)
    whole = sum(named.nbytes for named in todo)
    done = f", {num_done:,} known" if num_done else ""
    return (
        f"{len(todo):,} to look at{done}: about {requests:,} GETs and {nbytes / 1e6:,.0f} MB of {whole / 1e6:,.0f} MB"
    )


def folder_of(slide: str) -> str:
    """The folder of a slide's file: what a series is named by."""
    return posixpath.dirname(slide)
