"""Building a catalog: find slides, inspect them in a Ray Data job, keep what was done at every moment."""

from __future__ import annotations

import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import ray.data

from streaming import cluster, storage
from streaming.catalog import schema
from streaming.catalog.given import Given, MppFrom
from streaming.catalog.idc import IdcOptions
from streaming.catalog.index_packs import save_indexes
from streaming.catalog.inspection import Inspected, Rejected, inspect_named
from streaming.catalog.keeping import Known, commit, known_slides, save_part, write_beside
from streaming.catalog.masks import Mask, MaskOptions, find_masks, in_none
from streaming.catalog.metadata_csv import lookup, mpp_of, read_metadata
from streaming.catalog.named import Named
from streaming.catalog.selection import find, folder_of, work_line
from streaming.catalog.tissue import Colour
from streaming.catalog.writing import part_of
from streaming.errors import CatalogError
from streaming.progress import ProgressLine
from streaming.slide.geometry import MANY_PIXELS
from streaming.slide.resolution import check_given_mpp
from streaming.storage.staging import Staging

_SAVE_EVERY_S, _SAVE_NBYTES = 20.0, 2**26
# Slides of a task, the tasks that there are at least (for a machine may have many cores), and slides that a task looks
# at side by side.
_LOT, _MIN_LOTS, _AT_ONCE = 16, 32, 8


@dataclass(frozen=True)
class BuildReport:
    """What one run of the builder did, in slides."""

    added: int
    changed: int
    """slides that were there, and were looked at anew: they are others by now, or more is told of them"""
    unchanged: int
    rejected: list[Rejected]
    total: int
    unmatched: int
    """slides of the catalog without a row in the CSV"""
    unmasked: list[str]
    """slides of the sources without a mask, if there are any"""
    odd_masks: list[str]
    """files beside the masks that are no slide's"""
    unknown_classes: list[str]
    """what masks were to include or exclude, and none of those looked at has"""
    mask_classes: list[str]
    """the classes that they have"""
    odd_glass: list[tuple[str, Colour]]
    """slides looked at whose glass is far from grey, with its red, green and blue"""
    without_levels: list[tuple[str, float]]
    """slides looked at of whose pixels 32 and more are read for one of a tile at 2 µm/px, and how many those are"""
    left_out: list[tuple[str, str]]
    """slides looked at of which something is never read, such as further focal planes, and what"""
    contradicted: list[tuple[str, float, Given]]
    """slides whose metadata tells another µm/px than is given, which does not count: it, and what is given"""
    skipped: Counter[str]
    """files in the sources that are no slide and belong to none, and what can't be looked at, by kind"""


def build_catalog(
    sources: Sequence[str],
    out: str,
    *,
    mpp: float | None = None,
    metadata_csv: str | None = None,
    mpp_from: MppFrom = "metadata",
    recheck: bool = False,
    masks: MaskOptions | None = None,
    idc: IdcOptions | None = None,
    options: storage.StorageOptions | None = None,
    staging: Staging | None = None,
    verbose: bool = False,
) -> BuildReport:
    """Builds a catalog at `out` (any fsspec URI), or extends the one that is there.

    Unchanged slides are skipped unless `recheck` is set, rejected ones tried again. What is done is saved every few
    seconds, so that an interrupted build goes on where it was; builds that run side by side add to one catalog. mpp
    (µm/px) and a table's column `mpp` serve slides whose metadata has none; with `mpp_from` csv a table's goes first.
    Of slides that have one, a mask tells where tissue is. Slides for which these are others than before are looked at
    anew.

    Raises:
        ConfigError: the CSV or mpp makes no sense, or masks and slides do not fit together.
        CatalogError: a source holds no slide, none could be used, or `out` holds a catalog of another version.
        StorageError: a source or `out` can't be reached.
    """
    check_given_mpp("--slide-mpp", mpp)
    metadata = read_metadata(metadata_csv, options) if metadata_csv is not None else {}
    skipped: dict[str, str] = {}
    slides = {named.uri: named for named in find(sources, options, idc, skipped)}
    staging, masks = staging or Staging(), masks or MaskOptions()
    known = known_slides(out, options)
    found_masks, odd_masks = find_masks(masks, slides, options)

    def told(slide: str) -> Mapping[str, str]:
        """What sources and CSV tell of a slide, by its address or its series'."""
        named = slides.get(slide) or slides.get(folder_of(slide))
        return {**(named.metadata if named else {}), **(lookup(metadata, slide) or {})}

    def given(slide: str, before: Known | None) -> Given:
        """What counts for a slide: what is told now, else what was before."""
        mask = found_masks.get(slide) or (Mask.of_text(before.mask) if before and before.mask else None)
        told_mpp = mpp_of(told(slide), slide)
        if told_mpp is not None:
            return Given(mpp=told_mpp, mpp_from=schema.TABLE, mpp_decides=mpp_from == "csv", mask=mask)
        if before is not None and before.mpp_from == schema.TABLE:
            decided = before.own_mpp is not None
            return Given(mpp=before.mpp, mpp_from=schema.TABLE, mpp_decides=decided, mask=mask)
        option = before.mpp if mpp is None and before and before.mpp_from != schema.METADATA else mpp
        return Given(mpp=option, mask=mask)

    todo = list[tuple[Named, Given]]()
    num_new = 0
    for named in slides.values():
        before = known.get(named.uri)
        now = given(named.uri, before)
        if recheck or before is None or _is_another(named, now, before):
            todo.append((named, now))
            num_new += before is None
    rejected, odd_glass, without_levels = list[Rejected](), list[tuple[str, Colour]](), list[tuple[str, float]]()
    left_out, mask_classes = list[tuple[str, str]](), set[str]()
    if todo:
        if any(not storage.is_local(named.uri) for named, _ in todo):
            line = work_line([named for named, _ in todo], len(slides) - len(todo))
            sys.stderr.write(f"catalog: {line}\n")
        cluster.connect(num_cpus=2, verbose=verbose)
        for inspected in _inspected(todo, rejected, options, staging, storage.canonical(out)):
            save_part(out, part_of(inspected, [told(slide.row.slide) for slide in inspected]), options)
            odd_glass += [(slide.row.slide, slide.odd_glass) for slide in inspected if slide.odd_glass]
            left_out += [(slide.row.slide, slide.left_out) for slide in inspected if slide.left_out]
            mask_classes.update(*(slide.mask_classes for slide in inspected))
            costs = [(slide.row.slide, slide.coarse_cost) for slide in inspected]
            without_levels += [(slide, cost) for slide, cost in costs if cost >= MANY_PIXELS]
    write_beside(out, rejected, skipped, slides.keys(), options)
    table = commit(out, told, options, staging)
    if table.num_rows == 0:
        raise CatalogError(
            f"{rejected[0].slide}: {rejected[0].reason} ({len(rejected)} of {len(slides)} slides rejected, none left; "
            f"reasons in {storage.join(out, schema.REJECTED)})"
        )
    names = cast("list[str]", table["slide"].to_pylist())
    num_rejected_new = sum(entry.slide not in known for entry in rejected)
    return BuildReport(
        added=num_new - num_rejected_new,
        changed=len(todo) - num_new - (len(rejected) - num_rejected_new),
        unchanged=len(slides) - len(todo),
        rejected=rejected,
        total=table.num_rows,
        unmatched=sum(lookup(metadata, slide) is None for slide in names) if metadata else 0,
        unmasked=[slide for slide in slides if slide not in found_masks] if masks.masks else [],
        odd_masks=odd_masks,
        unknown_classes=in_none((*masks.masks_include, *masks.masks_exclude), mask_classes) if mask_classes else [],
        mask_classes=sorted(mask_classes),
        odd_glass=odd_glass,
        without_levels=without_levels,
        left_out=left_out,
        contradicted=_contradicted(table, slides, given),
        skipped=Counter(skipped.values()),
    )


def _is_another(named: Named, given: Given, before: Known) -> bool:
    """Whether a slide that is known must be looked at anew."""
    if named.info is not None and named.info.version != before.version:
        return True
    mask = given.mask.text() if given.mask else ""
    return (*given.decided(before.own_mpp), mask) != (before.mpp, before.mpp_from, before.mask)


def _contradicted(
    table: pa.Table, slides: Container[str], given: Callable[[str, Known | None], Given]
) -> list[tuple[str, float, Given]]:
    """The slides of this run whose own metadata counts, and tells another µm/px than is given."""
    found = list[tuple[str, float, Given]]()
    names = cast("list[str]", table["slide"].to_pylist())
    for slide, own_mpp in zip(names, cast("list[float | None]", table["own_mpp"].to_pylist()), strict=True):
        if own_mpp is not None and (slide in slides or folder_of(slide) in slides):
            now = given(slide, None)
            if now.contradicts(own_mpp) and not now.mpp_decides:
                found.append((slide, own_mpp, now))
    return found


def _inspected(
    todo: Sequence[tuple[Named, Given]],
    rejected: list[Rejected],
    options: storage.StorageOptions | None,
    staging: Staging,
    out: str,
) -> Iterator[list[Inspected]]:
    """Slides in the lots in which they are worth saving; rejections are put on the list."""
    lot, nbytes = list[Inspected](), 0
    saved_at = time.monotonic()
    with ProgressLine("catalog", "slides", total=len(todo)) as progress:
        for done, result in enumerate(inspect_all(todo, options, staging, out), start=1):
            if isinstance(result, Rejected):
                rejected.append(result)
            else:
                lot.append(result)
            progress.update(done, f"{len(rejected)} rejected")
            nbytes += 0 if isinstance(result, Rejected) else result.tissue.fraction.size
            if lot and (nbytes > _SAVE_NBYTES or time.monotonic() - saved_at > _SAVE_EVERY_S):
                yield lot
                lot, nbytes, saved_at = [], 0, time.monotonic()
    if lot:
        yield lot


def inspect_all(
    slides: Sequence[tuple[Named, Given]],
    options: storage.StorageOptions | None,
    staging: Staging,
    out: str,
) -> Iterator[Inspected | Rejected]:
    """Inspects what sources name, each with what is given of it, as Ray Data jobs; results come as they are done."""
    pending = {named.uri: (named, given) for named, given in slides}
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
    lots: Sequence[Sequence[tuple[Named, Given]]],
    options: storage.StorageOptions | None,
    staging: Staging,
    out: str,
    max_retries: int,
) -> Iterator[tuple[str, Inspected | Rejected]]:
    """What became of each slide of the lots, by what the source names; none of a lot whose process died."""

    def task(item: dict[str, Any]) -> dict[str, Any]:
        lot: Sequence[tuple[Named, Given]] = pickle.loads(item["item"])
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
