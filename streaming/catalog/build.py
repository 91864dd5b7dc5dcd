"""Building a catalog: find slides, inspect them in a Ray Data job, keep what was done at every moment."""

from __future__ import annotations

import pickle
import sys
import time
import uuid
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, cast

import pyarrow as pa
import ray.data

from streaming import cluster, storage
from streaming.catalog import Catalog, schema
from streaming.catalog.idc import IdcOptions
from streaming.catalog.index_packs import save_indexes
from streaming.catalog.inspection import Inspected, Rejected, inspect_named
from streaming.catalog.metadata_csv import lookup, read_metadata, stand_in_mpp, with_metadata
from streaming.catalog.named import Named
from streaming.catalog.selection import find, folder_of, work_line
from streaming.catalog.tissue import Colour
from streaming.catalog.tissue_map import TissueMap
from streaming.catalog.writing import merge, part_of, write
from streaming.errors import CatalogError, ConfigError
from streaming.progress import ProgressLine
from streaming.slide.geometry import MANY_PIXELS
from streaming.storage.staging import Staging

_SAVE_EVERY_S = 20.0
# Slides of a task, the tasks that there are at least (for a machine may have many cores), and slides that a task looks
# at side by side.
_LOT, _MIN_LOTS, _AT_ONCE = 16, 32, 8


@dataclass(frozen=True)
class BuildReport:
    """What one run of the builder did, in slides."""

    added: int
    skipped: int
    rejected: list[Rejected]
    total: int
    unmatched: int
    """slides of the catalog without a row in the CSV"""
    odd_glass: list[tuple[str, Colour]]
    """added slides whose glass is far from grey, with its red, green and blue"""
    without_levels: list[tuple[str, float]]
    """added slides of whose pixels 32 and more are read for one of a tile at 2 µm/px, and how many those are"""
    left_out: list[tuple[str, str]]
    """added slides of which something is never read, such as further focal planes, and what"""
    passed_over: Counter[str]
    """files in the sources that are no slide and belong to none, by suffix"""


def build_catalog(
    sources: Sequence[str],
    out: str,
    *,
    mpp: float | None = None,
    metadata_csv: str | None = None,
    idc: IdcOptions | None = None,
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
    passed_over = Counter[str]()
    slides = {named.uri: named for named in find(sources, options, idc, passed_over)}
    staging = staging or Staging()
    tables, tissue = _known(out, options, staging)

    def told(slide: str) -> Mapping[str, str]:
        """What sources and CSV tell of a slide, by its address or its series'."""
        named = slides.get(slide) or slides.get(folder_of(slide))
        return {**(named.metadata if named else {}), **(lookup(metadata, slide) or {})}

    todo = [(named, stand_in_mpp(told(named.uri), named.uri, mpp)) for named in _changed(slides, tables, tissue)]
    rejected, odd_glass, without_levels = list[Rejected](), list[tuple[str, Colour]](), list[tuple[str, float]]()
    left_out = list[tuple[str, str]]()
    if todo:
        if any(not storage.is_local(named.uri) for named, _ in todo):
            line = work_line([named for named, _ in todo], len(slides) - len(todo))
            sys.stderr.write(f"catalog: {line}\n")
        cluster.connect(num_cpus=2, verbose=verbose)
        for inspected in _inspected(todo, rejected, options, staging, storage.canonical(out)):
            tables.append(_save_part(out, inspected, options))
            odd_glass += [(slide.row.slide, slide.odd_glass) for slide in inspected if slide.odd_glass]
            left_out += [(slide.row.slide, slide.left_out) for slide in inspected if slide.left_out]
            costs = [(slide.row.slide, slide.coarse_cost) for slide in inspected]
            without_levels += [(slide, cost) for slide, cost in costs if cost >= MANY_PIXELS]
    table, cells = merge(tables, tissue)
    table = with_metadata(table, told)
    _write_rejected(out, rejected, slides.keys(), options)
    if table.num_rows == 0:
        raise CatalogError(
            f"{rejected[0].slide}: {rejected[0].reason} ({len(rejected)} of {len(slides)} slides rejected, none left; "
            f"reasons in {storage.join(out, schema.REJECTED)})"
        )
    write(out, table, cells, options)
    storage.remove(storage.join(out, schema.PARTS), options)
    names = cast("list[str]", table["slide"].to_pylist())
    unmatched = sum(lookup(metadata, slide) is None for slide in names) if metadata else 0
    return BuildReport(
        added=len(todo) - len(rejected),
        skipped=len(slides) - len(todo),
        rejected=rejected,
        total=table.num_rows,
        unmatched=unmatched,
        odd_glass=odd_glass,
        without_levels=without_levels,
        left_out=left_out,
        passed_over=passed_over,
    )


def _changed(slides: Mapping[str, Named], tables: Sequence[pa.Table], tissue: TissueMap | None) -> list[Named]:
    """What earlier runs do not know, or know in another version."""
    known, _ = merge(tables, tissue)
    slides_known = cast("list[str]", known["slide"].to_pylist())
    versions = dict(zip(slides_known, known["version"].to_pylist(), strict=True))
    done = versions.keys() | {folder_of(slide) for slide in versions}
    return [
        named
        for named in slides.values()
        if (versions.get(named.uri) != named.info.version if named.info else named.uri not in done)
    ]


def _known(
    out: str, options: storage.StorageOptions | None, staging: Staging
) -> tuple[list[pa.Table], TissueMap | None]:
    """What earlier runs found out: the catalog with its tissue, and the parts of a build that was interrupted."""
    tables, tissue = [part_of([])], None
    slides = storage.join(out, schema.SLIDES)
    if storage.exists(slides, options):
        tables.append(storage.read_table(slides, options))
        schema.check_version(tables[-1], slides)
        tissue = Catalog.of_table(storage.canonical(out), tables[-1], options, staging).tissue
    for name in storage.list_names(storage.join(out, schema.PARTS), options):
        if name.endswith(".parquet"):
            part = storage.join(out, schema.PARTS, name)
            tables.append(storage.read_table(part, options))
            schema.check_version(tables[-1], part)
    return tables, tissue


def _save_part(out: str, slides: Sequence[Inspected], options: storage.StorageOptions | None) -> pa.Table:
    part = part_of(slides)
    name = f"{int(time.time() * 1000)}-{uuid.uuid4().hex[:8]}.parquet"
    storage.write_table(storage.join(out, schema.PARTS, name), part, options)
    return part


def _inspected(
    todo: Sequence[tuple[Named, float | None]],
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


def inspect_all(
    slides: Sequence[tuple[Named, float | None]],
    options: storage.StorageOptions | None,
    staging: Staging,
    out: str,
) -> Iterator[Inspected | Rejected]:
    """Inspects what sources name, each with its stand-in mpp, as Ray Data jobs; results come as they are done."""
    pending = {named.uri: (named, mpp) for named, mpp in slides}
    # In lots, for a task costs more than the little that is read of a slide. A slide that kills its process (a crash of
    # its decoder) takes its lot along: those are looked at once more, each by itself.
    for size in sorted({1, min(_LOT, -(-len(pending) // _MIN_LOTS))}, reverse=True):
        left = list(pending.values())
        lots = [left[start : start + size] for start in range(0, len(left), size)]
        for named, result in _lots_inspected(lots, options, staging, out, max_retries=3 if size == 1 else 0):
            del pending[named]
            yield result
    for named, _ in pending.values():
        version = named.info.version if named.info else ""
        reason = "the process that read it died; is the file damaged?"
        yield Rejected(named.uri, named.nbytes, version, reason)


def _lots_inspected(
    lots: Sequence[Sequence[tuple[Named, float | None]]],
    options: storage.StorageOptions | None,
    staging: Staging,
    out: str,
    max_retries: int,
) -> Iterator[tuple[str, Inspected | Rejected]]:
    """What became of each slide of the lots, by what the source names; none of a lot whose process died."""

    def task(item: dict[str, Any]) -> dict[str, Any]:
        lot: Sequence[tuple[Named, float | None]] = pickle.loads(item["item"])
        # While one waits for its bytes, others are decoded.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            looked_at = list(pool.map(lambda entry: inspect_named(entry[0], entry[1], options, staging), lot))
        found = save_indexes(looked_at, out, options)
        return {"result": pickle.dumps([(named.uri, result) for (named, _), result in zip(lot, found, strict=True)])}

    if not lots:
        return
    items = [{"item": pickle.dumps(lot)} for lot in lots]
    # Ray Data would start a process that died again for ever; three times do for nodes that are lost.
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(task, max_retries=max_retries)
    dataset.context.max_errored_blocks = -1
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for item in batch["result"]:
            yield from pickle.loads(item.as_py())


def _write_rejected(
    out: str, rejected: Sequence[Rejected], seen: Container[str], options: storage.StorageOptions | None
) -> None:
    """Replaces the record of the slides seen in this run; what other runs rejected stays."""
    uri = storage.join(out, schema.REJECTED)
    table = pa.Table.from_pylist([asdict(entry) for entry in rejected], schema=schema.REJECTED_SCHEMA)
    if storage.exists(uri, options):
        earlier = storage.read_table(uri, options)
        slides = cast("list[str]", earlier["slide"].to_pylist())
        keep = [slide not in seen and folder_of(slide) not in seen for slide in slides]
        table = pa.concat_tables([earlier.filter(pa.array(keep, pa.bool_())), table])
    storage.write_table(uri, table.sort_by("slide"), options)
