"""Slides that a user's sources name for anything but cataloguing, with what catalogs among the sources know of them."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

from streaming import storage
from streaming.catalog.catalog import Catalog
from streaming.catalog.given import Given
from streaming.catalog.idc import SCHEME, IdcOptions
from streaming.catalog.inspection import Inspected, Rejected, inspect
from streaming.catalog.schema import METADATA, OPTION, SLIDES, TABLE, SlideRow
from streaming.catalog.selection import slides_of_all
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import CatalogError, ConfigError
from streaming.slide import SLIDE_SUFFIXES, Slide, open_slide
from streaming.slide.multi_file import DICOM_SUFFIXES
from streaming.storage.staging import Staging

_IN_FLIGHT = 16
# What ends a name is a suffix if it looks like one: the UUID of TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF-D8FB-… is none.
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,7}$")


def keys(slide: str) -> list[str]:
    """By what a slide is found, the surest first: its address, its file's name, the same without suffix."""
    name = storage.name_of(slide)
    return list(dict.fromkeys([storage.canonical(slide), name, _SUFFIX.sub("", name)]))


def keys_of_series(slide: str) -> list[str]:
    """Of DICOM, the folder that it lies in: its series may be called by that."""
    return keys(posixpath.dirname(slide))[:2] if slide.lower().endswith(DICOM_SUFFIXES) else []


@dataclass(frozen=True, kw_only=True)
class KnownSlide:
    """A slide, and what is known of it before it is opened."""

    info: storage.ObjectInfo
    given: Given
    """by a table among the sources or on the command line; of a catalog's slide, nothing"""
    catalog: int | None = None
    """which catalog has it"""
    row: int = 0
    """where in it"""


def made_by(row: SlideRow) -> str:
    """What decides a slide's tissue and µm/px beside its file, as text: empty where nothing does."""
    mpp = None if row.mpp_from == METADATA else row.mpp
    return json.dumps([mpp, row.mask]) if mpp is not None or row.mask else ""


@dataclass(frozen=True)
class KnownSlides:
    """Slides by number, in the order of their addresses."""

    slides: Sequence[KnownSlide]
    catalogs: Sequence[Catalog]
    options: storage.StorageOptions | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.slides)

    def some(self, numbers: Sequence[int]) -> KnownSlides:
        """Those of some numbers, counted anew."""
        return replace(self, slides=[self.slides[number] for number in numbers])

    def open(self, number: int, count: Counters = UNCOUNTED) -> Slide:
        """Opens a slide, in the version that was named or catalogued; what that takes is added to `count`.

        Raises:
            SlideError, StorageError, CatalogError: it can't be opened.
        """
        known = self.slides[number]
        if known.catalog is not None:
            return self.catalogs[known.catalog].open_slide(known.row, count=count)
        info = known.info
        return open_slide(info.uri, self.options, mpp=known.given.mpp, expected=info, count=count)

    def inspect(self, number: int) -> Inspected | Rejected:
        """A slide's row and tissue: the catalog's where one has it, else as `tilestream catalog` would find them.

        Raises:
            CatalogError, StorageError: the catalog's tissue can't be read.
        """
        known = self.slides[number]
        if known.catalog is not None:
            catalog = self.catalogs[known.catalog]
            return Inspected(catalog[known.row], catalog.tissue_grid(known.row))
        return inspect(known.info, known.given, self.options, Staging())

    def may_be_made_by(self, number: int) -> set[str]:
        """What `made_by` may turn out to be: an mpp that is given counts only where the slide tells none."""
        known = self.slides[number]
        if known.catalog is not None:
            return {made_by(self.catalogs[known.catalog][known.row])}
        return {"", *([json.dumps([known.given.mpp, ""])] if known.given.mpp is not None else [])}

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, known in enumerate(self.slides):
            for key in (*keys(known.info.uri), *keys_of_series(known.info.uri)):
                found.setdefault(key, []).append(number)
        return found

    def number_of(self, name: str) -> int | None:
        """The slide of an address, a file's name, or that without suffix, of DICOM also its folder's; None: none.

        Raises:
            ConfigError: several have that name.
        """
        named = keys(name.removesuffix("*").rstrip("/"))
        numbers = next((self._numbers[key] for key in named if key in self._numbers), [])
        if len(numbers) > 1:
            one, other = (self.slides[number].info.uri for number in numbers[:2])
            raise ConfigError(f"{name}: {one} and {other} have that name; give the whole address, or fewer slides")
        return numbers[0] if numbers else None


def known_slides(
    sources: Sequence[str],
    options: storage.StorageOptions | None = None,
    asked: IdcOptions | None = None,
    slide_mpp: float | None = None,
) -> KnownSlides:
    """All slides that sources name, each once: files, folders, globs, tables, `idc:`, and catalogs.

    A catalog's slides are what it says: version, µm/px, tissue. So they are where another source names them, too.
    slide_mpp (µm/px at level 0) serves the other slides whose metadata has none.

    Raises:
        ConfigError: tables that make no sense; slide_mpp where all slides are catalogs'.
        CatalogError: a source holds no slide, or a catalog of another version.
        StorageError: a source can't be reached.
    """
    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        are_catalogs = list(pool.map(lambda source: _is_catalog(source, options), sources))
    catalogs = [Catalog.load(source, options) for source, is_one in zip(sources, are_catalogs, strict=True) if is_one]
    others = [source for source, is_one in zip(sources, are_catalogs, strict=True) if not is_one]
    if slide_mpp is not None and not others:
        raise ConfigError(f"--slide-mpp {slide_mpp:g}: a catalog tells the mpp of its slides; leave it out")
    found: dict[str, KnownSlide] = {}
    for info, table_mpp in slides_of_all(others, options, asked) if others or not catalogs else []:
        mpp = slide_mpp if table_mpp is None else table_mpp
        given = Given(mpp=mpp, mpp_from=OPTION if table_mpp is None else TABLE)
        found[info.uri] = KnownSlide(info=info, given=given)
    for number, catalog in enumerate(catalogs):
        table = catalog.table
        columns = (table[name].to_pylist() for name in ("slide", "size", "version"))
        for row, (uri, size, version) in enumerate(zip(*columns, strict=True)):
            before = found.get(uri)
            if before is not None and before.catalog is not None and before.info.version != version:
                one, other = catalogs[before.catalog].uri, catalog.uri
                raise CatalogError(f"{uri}: {one} and {other} know it in two versions; leave one of them out")
            info = storage.ObjectInfo(uri, size, version)
            found[uri] = KnownSlide(info=info, given=Given(), catalog=number, row=row)
    return KnownSlides([found[uri] for uri in sorted(found)], catalogs, options)


def _is_catalog(source: str, options: storage.StorageOptions | None) -> bool:
    """Whether a source is a folder that `tilestream catalog` wrote."""
    is_other = source.lower().endswith(SLIDE_SUFFIXES) or source.startswith(SCHEME)
    return not is_other and storage.exists(storage.join(source, SLIDES), options)
