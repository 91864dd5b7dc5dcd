"""A catalog to look at: its slides with their tissue, and those that were rejected, as one HTML page."""

from __future__ import annotations

import contextlib
import html
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pyarrow as pa

from streaming import storage
from streaming.catalog import Catalog, schema
from streaming.catalog.sources import counted
from streaming.catalog.tissue import CELL_UM
from streaming.errors import TilestreamError
from streaming.plan.plan import MIN_TISSUE
from streaming.progress import ProgressLine
from streaming.show.page import jpeg_url, page
from streaming.show.pictures import picture_of, with_tissue
from streaming.slide import open_slide
from streaming.slide.resolution import NO_MPP, ODD_MPP
from streaming.storage.staging import Staging

PREVIEW = "preview.html"
_MOST_SLIDES, _MOST_REJECTED = 200, 200
_WIDTH, _QUALITY = 360, 80
_AT_ONCE = 4
# Slides rejected for this were opened; others might bring down the process that opens them.
_OPENED = ("no tissue found", NO_MPP, ODD_MPP)

_STYLE = """
main{max-width:1240px;margin:0 auto;padding:32px 20px 64px}h1{font-size:26px;margin:0}
h2{font-size:19px;margin:40px 0 4px}p{margin:4px 0 14px;color:var(--soft);max-width:76ch}
.row{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:12px}
figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 12px;margin:0}
figure img{width:100%;height:220px;object-fit:contain;display:block;border-radius:6px}
figcaption{padding-top:8px;font-size:13px;color:var(--soft);overflow-wrap:anywhere}figcaption b{color:var(--text)}
.bad figcaption i{color:#c2557a;font-style:normal}
"""


def write_preview(
    uri: str, options: storage.StorageOptions | None = None, staging: Staging | None = None
) -> tuple[str, int]:
    """Writes the page into the catalog's folder; gives its address and how many slides it shows.

    Of many slides, some are shown that lie evenly in the catalog.

    Raises:
        CatalogError: there is no catalog.
        StorageError: it can't be read, or the page not written.
    """
    catalog, staging = Catalog.load(uri, options, staging), staging or Staging()
    shown = _evenly(len(catalog), _MOST_SLIDES)
    rejected = _table(catalog.uri, schema.REJECTED, options).to_pylist()
    skipped = Counter(cast("list[str]", _table(catalog.uri, schema.SKIPPED, options)["reason"].to_pylist()))
    some_rejected = [rejected[row] for row in _evenly(len(rejected), _MOST_REJECTED)]
    with ThreadPoolExecutor(_AT_ONCE) as pool, ProgressLine("preview", "slides", total=len(shown)) as progress:
        good = pool.map(lambda row: _of_slide(catalog, row, options, staging), shown)
        figures = list(_counted(good, progress))
        bad = list(pool.map(lambda entry: _of_rejected(entry, options, staging), some_rejected))
    area = catalog.column("tissue_mm2").sum()
    text = f"{len(catalog):,} slides, {area:,.0f} mm² tissue, {len(rejected):,} rejected; of files skipped: "
    parts = [
        f"<h1>{html.escape(storage.shown(catalog.uri))}</h1><p>{html.escape(text + (counted(skipped) or 'none'))}</p>",
        _section(
            f"{len(shown):,} of {len(catalog):,} slides",
            f"Tinted: cells of {CELL_UM:.0f} µm with at least {MIN_TISSUE:.0%} tissue, from where tiles are drawn.",
            figures,
        ),
    ]
    if bad:
        parts.append(_section(f"{len(bad):,} of {len(rejected):,} rejected", f"All: {schema.REJECTED}.", bad, "bad"))
    target = storage.join(uri, PREVIEW)
    storage.write_bytes(target, page("tilestream catalog", _STYLE, f"<main>{''.join(parts)}</main>"), options)
    return target, len(shown)


def _evenly(count: int, most: int) -> list[int]:
    return [at * count // min(count, most) for at in range(min(count, most))]


def _table(uri: str, name: str, options: storage.StorageOptions | None) -> pa.Table:
    path = storage.join(uri, name)
    empty = schema.REJECTED_SCHEMA if name == schema.REJECTED else schema.SKIPPED_SCHEMA
    return storage.read_table(path, options) if storage.exists(path, options) else empty.empty_table()


def _counted(figures: Iterator[str], progress: ProgressLine) -> Iterator[str]:
    for done, figure in enumerate(figures, start=1):
        progress.update(done)
        yield figure


def _section(title: str, text: str, figures: Sequence[str], kind: str = "") -> str:
    told = f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>"
    return f'<section class="{kind}">{told}<div class="row">{"".join(figures)}</div></section>'


def _of_slide(catalog: Catalog, number: int, options: storage.StorageOptions | None, staging: Staging) -> str:
    row = catalog[number]
    facts = [
        f"{row.width:,} × {row.height:,} px at {row.mpp:.4g} µm/px (by {row.mpp_from})",
        f"{len(row.levels)} level{'s' if len(row.levels) > 1 else ''}",
        f"{row.tissue_mm2:,.1f} mm² tissue",
    ]
    if row.mask:
        facts.append("by a mask")
    try:
        with contextlib.closing(catalog.open_slide(number, options, staging)) as slide:
            image = picture_of(slide, _WIDTH)
    except TilestreamError as error:
        return _figure(row.slide, ", ".join(facts), str(error), "")
    tinted = with_tissue(image, row, catalog.tissue_grid(number), MIN_TISSUE)
    return _figure(row.slide, ", ".join(facts), "", jpeg_url(tinted, _QUALITY))


def _of_rejected(entry: dict[str, Any], options: storage.StorageOptions | None, staging: Staging) -> str:
    picture = ""
    if entry["reason"].startswith(_OPENED):
        try:
            with contextlib.closing(open_slide(entry["slide"], options, staging=staging)) as slide:
                slide.mpp = slide.mpp or 1.0  # any will do
                picture = jpeg_url(picture_of(slide, _WIDTH), _QUALITY)
        except TilestreamError:
            pass  # the reason is told anyway
    return _figure(entry["slide"], "", entry["reason"], picture)


def _figure(slide: str, facts: str, trouble: str, picture: str) -> str:
    name, told = html.escape(storage.name_of(slide)), html.escape(facts)
    image = f'<img alt="{name}" src="{picture}">' if picture else ""
    why = f"<br><i>{html.escape(trouble)}</i>" if trouble else ""
    title = html.escape(slide, quote=True)
    return f'<figure title="{title}">{image}<figcaption><b>{name}</b><br>{told}{why}</figcaption></figure>'
