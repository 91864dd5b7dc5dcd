"""Building a catalog: find slides, inspect them in a Ray Data job, keep what was done at every moment."""

from __future__ import annotations

import csv
import io
import json
import pickle
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, cast

import pyarrow as pa
import ray.data

from streaming import cluster, storage
from streaming.catalog import Catalog
from streaming.catalog import catalog as cat
from streaming.catalog.catalog import REJECTED_SCHEMA, Inspected
from streaming.catalog.tissue import tissue_grid
from streaming.catalog.tissue_map import TissueMap
from streaming.errors import CatalogError, ConfigError, SlideError, StorageError
from streaming.progress import ProgressLine
from streaming.slide import SLIDE_SUFFIXES, open_slide
from streaming.slide.multi_file import as_one, is_multi_file, members, without_members
from streaming.storage.staging import Staging

_KEY_COLUMNS = ("slide", "uri", "path", "filename", "file", "slide_id", "name")
_SAVE_EVERY_S = 20.0
_MAX_LISTINGS = 16


@dataclass(frozen=True)
class Rejected:
    """A slide that can't be used, and why."""

    slide: str
    size: int
    version: str
    reason: str


@dataclass(frozen=True)
class BuildReport:
    """What one run of the builder did, in slides."""

    added: int
    skipped: int
    rejected: list[Rejected]
    total: int
    unmatched: int
    """slides of the catalog without a row in the CSV"""


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


def inspect(
    info: storage.ObjectInfo,
    mpp: float | None,
    options: storage.StorageOptions | None,
    staging: Staging,
    out: str | None = None,
) -> Inspected | Rejected:
    """A slide's row and tissue, or why it has none; mpp stands in where the metadata has none.

    Its block index is written to the catalog at `out`.
    """
    try:
        slide = storage.PATIENT(open_slide, info.uri, options, mpp=mpp, expected=info, staging=staging)
        try:
            grid = tissue_grid(slide)
            if not grid.fraction.any():
                return Rejected(info.uri, info.size, info.version, "no tissue found")
            if slide.packed_index and out is not None:
                uri = storage.join(out, cat.BLOCKS, cat.index_name(info))
                storage.PATIENT(storage.write_bytes, uri, slide.packed_index, options)
            return Inspected(cat.describe(slide, info, grid), grid)
        finally:
            slide.close()
    except (SlideError, StorageError) as error:
        return Rejected(info.uri, info.size, info.version, str(error).removeprefix(f"{info.uri}: "))


def inspect_all(
    slides: Sequence[tuple[storage.ObjectInfo, float | None]],
    options: storage.StorageOptions | None,
    staging: Staging,
    out: str,
) -> Iterator[Inspected | Rejected]:
    """Inspects slides, each with its stand-in mpp, as a Ray Data job; results come as they are done."""

    def task(item: dict[str, Any]) -> dict[str, Any]:
        info, mpp = pickle.loads(item["item"])
        return {"result": pickle.dumps(inspect(info, mpp, options, staging, out))}

    items = [{"item": pickle.dumps(slide)} for slide in slides]
    # One slide a block: a slide that kills its process (a decoder's crash) costs itself alone. Ray Data would start the
    # process again for ever; three times do for nodes that are lost.
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(task, max_retries=3)
    dataset.context.max_errored_blocks = -1
    pending = {info.uri: info for info, _ in slides}
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for item in batch["result"]:
            result: Inspected | Rejected = pickle.loads(item.as_py())
            del pending[result.slide if isinstance(result, Rejected) else result.row.slide]
            yield result
    for info in pending.values():
        yield Rejected(info.uri, info.size, info.version, "the process that read it died; is the file damaged?")


def read_metadata(uri: str, options: storage.StorageOptions | None) -> dict[str, dict[str, str]]:
    """A CSV of free columns as {slide's key: {column: value}}.

    The key is the first of the columns slide, uri, path, filename, file, slide_id, name (else the first of all): a
    slide's address, file name, or file name without suffix.

    Raises:
        ConfigError: the file is no CSV, or tells two things of one slide.
        StorageError: it can't be read.
    """
    try:
        reader = csv.DictReader(io.StringIO(storage.read_bytes(uri, options).decode("utf-8-sig")))
        names = list(reader.fieldnames or [])
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{uri}: not a CSV in UTF-8 ({error}); save it as one") from error
    if len(names) < 2:
        raise ConfigError(f"{uri}: a CSV with a header of a slide column and at least one more is needed, not {names}")
    lower = {name.strip().lower(): name for name in names}
    key = next((lower[name] for name in _KEY_COLUMNS if name in lower), names[0])
    metadata: dict[str, dict[str, str]] = {}
    for row in rows:
        values = {n.strip().lower(): (row[n] or "").strip() for n in names if n != key and (row[n] or "").strip()}
        slide = (row[key] or "").strip()
        if metadata.setdefault(slide, values) != values:
            raise ConfigError(f"{uri}: two different rows for slide {slide!r}; keep one")
    return metadata


def _lookup(metadata: dict[str, dict[str, str]], uri: str) -> dict[str, str] | None:
    name = storage.name_of(uri)
    return next((metadata[key] for key in (uri, name, PurePosixPath(name).stem) if key in metadata), None)


def _stand_in_mpp(values: dict[str, str] | None, default: float | None, uri: str) -> float | None:
    text = (values or {}).get("mpp")
    if text is None:
        return default
    try:
        mpp = float(text)
    except ValueError:
        mpp = 0.0
    if not mpp > 0:
        raise ConfigError(f"{uri}: mpp {text!r} in the CSV; it is µm per pixel, a number above 0")
    return mpp


def build_catalog(
    sources: Sequence[str],
    out: str,
    *,
    mpp: float | None = None,
    metadata_csv: str | None = None,
    options: storage.StorageOptions | None = None,
    staging: Staging | None = None,
    verbose: bool = False,
) -> BuildReport:
    """Builds a catalog at `out` (any fsspec URI), or extends the one that is there.

    Unchanged slides are skipped, rejected ones tried again. What is done is saved every few seconds, so that an
    interrupted build goes on where it was. mpp (µm/px) and the CSV's column `mpp` serve slides whose metadata has none.

    Raises:
        ConfigError: the CSV or mpp makes no sense.
        CatalogError: a source holds no slide, none could be used, or `out` holds a catalog of another version.
        StorageError: a source or `out` can't be reached.
    """
    if mpp is not None and not mpp > 0:
        raise ConfigError(f"--mpp {mpp}; it is µm per pixel, a number above 0")
    metadata = read_metadata(metadata_csv, options) if metadata_csv else {}
    slides = find_slides(sources, options)
    staging = staging or Staging()
    tables, tissue = _known(out, options, staging)
    known, _ = cat.merge(tables, tissue)
    versions = dict(zip(known["slide"].to_pylist(), known["version"].to_pylist(), strict=True))
    new = [info for info in slides if versions.get(info.uri) != info.version]
    todo = [(info, _stand_in_mpp(_lookup(metadata, info.uri), mpp, info.uri)) for info in new]
    rejected: list[Rejected] = []
    if todo:
        cluster.connect(num_cpus=2, verbose=verbose)
        for rows in _inspected(todo, rejected, options, staging, storage.canonical(out)):
            tables.append(cat.part_of(rows))
            part = f"{int(time.time() * 1000)}-{uuid.uuid4().hex[:8]}.parquet"
            storage.PATIENT(storage.write_table, storage.join(out, cat.PARTS, part), tables[-1], options)
    table, grids = cat.merge(tables, tissue)
    unmatched = 0
    if metadata:
        table, unmatched = _with_metadata(table, metadata)
    _write_rejected(out, rejected, {info.uri for info in slides}, options)
    if table.num_rows == 0:
        raise CatalogError(
            f"{rejected[0].slide}: {rejected[0].reason} ({len(rejected)} of {len(slides)} slides rejected, none left; "
            f"reasons in {storage.join(out, cat.REJECTED)})"
        )
    cat.write(out, table, grids, options)
    storage.remove(storage.join(out, cat.PARTS), options)
    return BuildReport(len(todo) - len(rejected), len(slides) - len(todo), rejected, table.num_rows, unmatched)


def _known(
    out: str, options: storage.StorageOptions | None, staging: Staging
) -> tuple[list[pa.Table], TissueMap | None]:
    """What earlier runs found out: the catalog with its tissue, and the parts of a build that was interrupted."""
    tables, tissue = [cat.part_of([])], None
    slides = storage.join(out, cat.SLIDES)
    if storage.exists(slides, options):
        tables.append(storage.read_table(slides, options))
        cat.check_version(tables[-1], slides)
        tissue = Catalog.of_table(storage.canonical(out), tables[-1], options, staging).tissue
    for name in storage.list_names(storage.join(out, cat.PARTS), options):
        if name.endswith(".parquet"):
            part = storage.join(out, cat.PARTS, name)
            tables.append(storage.read_table(part, options))
            cat.check_version(tables[-1], part)
    return tables, tissue


def _inspected(
    todo: Sequence[tuple[storage.ObjectInfo, float | None]],
    rejected: list[Rejected],
    options: storage.StorageOptions | None,
    staging: Staging,
    out: str,
) -> Iterator[list[Inspected]]:
    """Slides in the lots in which they are worth saving; rejections are put on the list."""
    lot: list[Inspected] = []
    saved_at = time.monotonic()
    with ProgressLine("catalog", "slides", total=len(todo)) as progress:
        for done, result in enumerate(inspect_all(todo, options, staging, out), start=1):
            if isinstance(result, Rejected):
                rejected.append(result)
            else:
                lot.append(result)
            progress.update(done, f"{len(rejected)} rejected")
            if lot and time.monotonic() - saved_at > _SAVE_EVERY_S:
                yield lot
                lot, saved_at = [], time.monotonic()
    if lot:
        yield lot


def _with_metadata(table: pa.Table, metadata: dict[str, dict[str, str]]) -> tuple[pa.Table, int]:
    """The table with the CSV's columns joined, and how many slides the CSV does not know; those keep what they had."""
    found = [_lookup(metadata, cast(str, slide.as_py())) for slide in table["slide"]]
    joined = [
        before if values is None else json.dumps(values, sort_keys=True)
        for before, values in zip(table["metadata"].to_pylist(), found, strict=True)
    ]
    at = table.schema.get_field_index("metadata")
    table = table.set_column(at, "metadata", pa.array(joined, pa.string()))
    return table, sum(values is None for values in found)


def _write_rejected(
    out: str, rejected: Sequence[Rejected], seen: set[str], options: storage.StorageOptions | None
) -> None:
    """Replaces the record of the slides seen in this run; what other runs rejected stays."""
    uri = storage.join(out, cat.REJECTED)
    table = pa.Table.from_pylist([asdict(entry) for entry in rejected], schema=REJECTED_SCHEMA)
    if storage.exists(uri, options):
        earlier = storage.read_table(uri, options)
        keep = [slide not in seen for slide in earlier["slide"].to_pylist()]
        table = pa.concat_tables([earlier.filter(pa.array(keep, pa.bool_())), table])
    storage.write_table(uri, table.sort_by("slide"), options)
