"""A run in one self-contained HTML file: slides, tiles, crops, curves, failures, embeddings, scores, licences."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.tissue import CELL_UM
from streaming.delivery.failures import FAILURES
from streaming.errors import ConfigError
from streaming.plan.magnifications import mpp_named
from streaming.reading.batch import of_view, tile_columns
from streaming.reading.reader import TileReader
from streaming.show.page import jpeg_url, page
from streaming.show.pictures import mosaic, slide_thumbnail, with_tissue
from streaming.slide.resample import Pixels
from trainer.embed.files import SlideEmbeddings, find_embeddings, read_embeddings
from trainer.evaluate.scoring import SCORES_JSON
from trainer.recipe.network import build_backbone
from trainer.run import checkpoints
from trainer.run.config import Config, changed
from trainer.run.metrics_log import METRICS
from trainer.run.step_batches import for_step
from trainer.show.colours import principal_colours
from trainer.show.crops import crop_pictures, with_holes
from trainer.show.figures import svg

_LINE_COLOURS = ("#1f8f6f", "#c2557a", "#4f78c4", "#c98a2b", "#7d68b8", "#5c5c5c", "#a3473f")
_GREY = "#888888"  # legible on white and on black

_STYLE = """
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}h1{font-size:28px;margin:0}
h2{font-size:19px;margin:44px 0 4px}
p{margin:4px 0 14px;color:var(--soft);max-width:76ch}img{max-width:100%;display:block;border-radius:6px}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:10px;margin-top:20px}
.numbers div,figure,details{background:var(--card);border:1px solid var(--line);border-radius:10px}
.numbers div,figure,details{padding:12px 14px;margin:0}
.numbers b{display:block;font-size:22px;color:var(--mark);font-weight:650}
.numbers span,figcaption{color:var(--soft);font-size:13px}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:12px}
.two{grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr))}
figure img{width:100%}figcaption{padding-top:8px}
pre{overflow-x:auto;font:13px/1.5 ui-monospace,monospace;margin:0;white-space:pre-wrap}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{text-align:left;padding:5px 10px 5px 0;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:500}
details{margin-top:12px}summary{cursor:pointer}
"""


def write_report(
    out: str,
    run: str,
    *,
    scores: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    storage_options: dict[str, Any] | None = None,
) -> None:
    """Writes the report of a run to a local file or URI.

    scores are folders that `tilestream evaluate` wrote to, embeddings files or folders of `tilestream embed`, of which
    the first slide is drawn.

    Raises:
        CheckpointError: the run has no checkpoint.
        ConfigError: a folder of scores or embeddings holds none.
        TilestreamError: metrics, the catalog or its slides can't be read.
    """
    checkpoint = checkpoints.find(run, storage_options)
    # A run's own file holds no secrets.
    config = changed(checkpoints.read_config(checkpoint, storage_options), [], storage_options or {})
    folder = checkpoint.rpartition("/checkpoints/")[0]  # not `run.out`: runs are moved
    metrics = _metrics_of(folder, storage_options)
    scored = [_scores_of(folder, storage_options) for folder in scores]
    drawn = read_embeddings(find_embeddings(embeddings, storage_options)[0], storage_options) if embeddings else None
    catalog = Catalog.load(config.data.catalog or "", config.data.storage_options)
    sections = [
        _headline(config, catalog, metrics, checkpoint),
        _slides(catalog, config),
        *_tiles_and_crops(config, catalog),
        _curves(metrics, config),
        _failures(folder, storage_options),
        _embeddings(drawn, config) if drawn is not None else "",
        _scores(scored) if scored else "",
        _licences(catalog),
        _going_on(config),
    ]
    content = page("tilestream report", _STYLE, f"<main>{''.join(sections)}</main>")
    storage.write_bytes(out, content, config.data.storage_options)


def _figure(pixels: Pixels, caption: str) -> str:
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="{jpeg_url(pixels, 84)}"><figcaption>{text}</figcaption></figure>'


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{body}</section>"


def _headline(config: Config, catalog: Catalog, metrics: pa.Table, checkpoint: str) -> str:
    loss, speed, waited = (metrics[name].to_numpy() for name in ("loss", "tiles_per_s", "data_wait_share"))
    steady = slice(1, None) if len(speed) > 1 else slice(None)  # the first row holds the cold start
    numbers = [
        (f"{len(catalog)}", "slides"),
        (f"{catalog.column('tissue_mm2').sum():.1f} mm²", "tissue"),
        (f"{metrics['next_index'][-1].as_py():,}", "tiles streamed"),
        (f"{int(metrics['step'][-1].as_py()):,}", "optimiser steps"),
        (f"{np.median(speed[steady]):.0f}", "tiles/s, median"),
        (f"{np.mean(waited[steady]):.1%}", "of the time waited for data"),
        (f"{loss[0]:.2f} → {loss[-1]:.2f}", "loss"),
    ]
    cards = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for value, name in numbers
    )
    about = f"{config.model.backbone}, trained on tiles streamed from the slides themselves. Checkpoint: {checkpoint}"
    return f'<h1>tilestream</h1><p>{html.escape(about)}</p><div class="numbers">{cards}</div>'


def _slides(catalog: Catalog, config: Config, most: int = 8) -> str:
    figures: list[str] = []
    patients = catalog.metadata_or_none("patient")
    for number in range(min(most, len(catalog))):
        row = catalog[number]
        image = slide_thumbnail(row.slide, row.mpp, 520, config.data.slide_options)
        image = with_tissue(image, row, catalog.tissue_grid(number), config.data.min_tissue)
        patient = f"patient {patients[number]}, " if patients[number] else ""
        size = f"{row.width:,} × {row.height:,} px at {row.mpp:g} µm/px, {len(row.levels)} levels"
        caption = f"{storage.name_of(row.slide)}: {patient}{size}, {row.tissue_mm2:.2f} mm² tissue"
        figures.append(_figure(image, caption))
    share = f"{config.data.min_tissue:.0%}"
    text = f"Tinted: cells of {CELL_UM:.0f} µm with at least {share} tissue; tiles are drawn from there."
    return _section("Slides and their tissue", text, f'<div class="row two">{"".join(figures)}</div>')


def _tiles_and_crops(config: Config, catalog: Catalog) -> tuple[str, str]:
    stream = config.stream(catalog)
    batch = TileReader(stream.plan, catalog, stream.reader)({"index": np.arange(max(64, config.train.batch))})
    views = [batch[name] for name in tile_columns(batch)]
    tiles, mpp = np.concatenate(views), np.concatenate([batch[of_view("mpp", view)] for view in range(len(views))])
    # A slide's own pixels may stand for a magnification, so there are more values than were asked for.
    listed = stream.plan.magnifications
    asked = np.array(mpp_named(config.data.drawn_mpp)) if config.data.tiles is None else listed[:: -(-len(listed) // 6)]
    nearest = asked[np.abs(np.log(mpp[:, None] / asked)).argmin(axis=1)]
    figures = [
        _figure(
            mosaic(list(tiles[nearest == value][:10]), 5, 108),
            f"{_span(mpp[nearest == value])} µm/px: a tile is {_span(mpp[nearest == value] * tiles.shape[1])} µm wide",
        )
        for value in np.unique(nearest)
    ]
    text = "The run's first tiles, by magnification; read again by index, they are the very pixels that training got."
    streamed = _section("Streamed tiles", text, f'<div class="row two">{"".join(figures)}</div>')
    return streamed, _crops(config, {name: batch[name][:4] for name in (*tile_columns(batch), "index")})


def _span(values: NDArray[np.float64]) -> str:
    """The least and the largest of some values, or the one that all are."""
    least, largest = f"{values.min():.4g}", f"{values.max():.4g}"
    return least if least == largest else f"{least} to {largest}"


def _crops(config: Config, batch: dict[str, NDArray[Any]]) -> str:
    augment, side = config.augment, config.augment.global_size
    patch_grid = build_backbone(config.model, side).patch_grid(side, side)
    cut = {name: torch.from_numpy(column) for name, column in for_step(batch, augment).items()}
    crops, masks = config.recipe.views(cut["tile"], cut["index"], patch_grid, config.run.seed, cut.get("local_tile"))
    figures: list[str] = []
    for i, index in enumerate(batch["index"].tolist()):
        views, masked = crop_pictures(crops.global_[:, i], augment), int(masks[:, i].sum(dim=1).argmax())
        student = with_holes(views[masked], masks[masked, i].numpy())
        tiles = [batch[name][i] for name in tile_columns(batch)]
        pictures = [*tiles, *views, student, *crop_pictures(crops.local[:4, i], augment)]
        figures.append(_figure(mosaic(pictures, 4, 128), f"index {index}"))
    text = (
        "Each tile, its two global crops, one of them as the student sees it with patches masked, and local crops. "
        "All drawn from a hash of seed, index and view, so that they are the same on any rank and after a resume."
    )
    return _section("Crops as the model sees them", text, f'<div class="row two">{"".join(figures)}</div>')


def _curves(metrics: pa.Table, config: Config) -> str:
    step = metrics["step"].to_numpy()
    terms = [
        ("loss", "loss"),
        ("dino_global", "DINO global"),
        ("dino_local", "DINO local"),
        ("ibot", "iBOT"),
        ("regression", "patch regression"),
        ("koleo", "KoLeo"),
        ("kde", "KDE"),
    ]
    terms.append(("validation_loss", "loss, held out"))  # in some rows alone
    kept = [(label, _numbers(metrics, name)) for name, label in terms if name in metrics.column_names]
    kept = [(label, values) for label, values in kept if np.isfinite(values).any()]
    losses = _plot(step, kept, "loss", None)
    speed = [("tiles/s", metrics["tiles_per_s"].to_numpy())]
    waited = ("waited for data, %", 100 * metrics["data_wait_share"].to_numpy())
    caption = f"global batch {config.train.batch}; the first point holds the cold start"
    figures = (
        f"<figure>{losses}<figcaption>loss terms by optimiser step</figcaption></figure>"
        f"<figure>{_plot(step, speed, 'tiles/s', waited)}<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
    if "knn_accuracy" in metrics.column_names and np.isfinite(followed := _numbers(metrics, "knn_accuracy")).any():
        line = _plot(step, [("kNN accuracy", followed)], "kNN accuracy", None)
        figures += f"<figure>{line}<figcaption>kNN accuracy by optimiser step</figcaption></figure>"
    return _section(
        "Training",
        "Loss terms, throughput, and the share of time that the trainer waited for tiles.",
        f'<div class="row two">{figures}</div>',
    )


def _numbers(metrics: pa.Table, name: str) -> NDArray[np.float64]:
    """A column, NaN where a step has none."""
    return metrics[name].to_numpy().astype(np.float64)


def _plot(
    step: NDArray[Any],
    lines: Sequence[tuple[str, NDArray[Any]]],
    unit: str,
    right: tuple[str, NDArray[Any]] | None,
) -> str:
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        axes = figure.subplots()
        for (label, values), colour in zip(lines, _LINE_COLOURS, strict=False):
            there = np.isfinite(values)
            axes.plot(step[there], values[there], label=label, color=colour, linewidth=1.6)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=min(0.0, *(float(np.nanmin(values)) for _, values in lines)))
        every = [axes]
        if right is not None:
            other = axes.twinx()
            other.plot(step, right[1], color=_LINE_COLOURS[1], linewidth=1.2, label=right[0])
            other.set_ylabel(right[0])
            other.set_ylim(0, 100)
            every.append(other)
        for axis in every:
            axis.tick_params(colors=_GREY)
            axis.xaxis.label.set_color(_GREY)
            axis.yaxis.label.set_color(_GREY)
            for spine in axis.spines.values():
                spine.set_color(_GREY)
                spine.set_alpha(0.4)
        handles = [line for axis in every for line in axis.get_lines()]
        # Above the axes: no place within them is free of lines in every run.
        labels = [str(line.get_label()) for line in handles]
        figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, labelcolor=_GREY)
        return svg(figure)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(value)}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _failures(folder: str, options: storage.StorageOptions | None, most: int = 12) -> str:
    uri, text = storage.join(folder, FAILURES), "No tile failed: each that was drawn was read."
    if not storage.exists(uri, options):
        return _section("Failures", text, "")
    counts = Counter[tuple[str, str]]()
    for row in storage.read_table(uri, options).to_pylist():
        counts[row["slide"], row["reason"]] += row["count"]
    if not counts:
        return _section("Failures", text, "")
    text = f"{counts.total():,} tiles could not be read, and others were drawn for them; {FAILURES} names all."
    rows = [(slide, reason, f"{count:,}") for (slide, reason), count in counts.most_common(most)]
    return _section("Failures", text, _table(("slide", "reason", "tiles"), rows))


def _metrics_of(folder: str, options: storage.StorageOptions | None) -> pa.Table:
    uri = storage.join(folder, METRICS)
    if not storage.exists(uri, options) or not (found := storage.read_table(uri, options)).num_rows:
        raise ConfigError(f"{uri}: no step of this run is logged yet; let it go on, and ask again")
    if missing := {"step", "next_index", "loss", "tiles_per_s", "data_wait_share"} - {*found.column_names}:
        raise ConfigError(f"{uri}: has no {', '.join(sorted(missing))}; it is no run's own file: name another run")
    return found


def _scores_of(folder: str, options: storage.StorageOptions | None) -> dict[str, Any]:
    uri = storage.join(folder, SCORES_JSON)
    if not storage.exists(uri, options):
        raise ConfigError(f"{folder}: no {SCORES_JSON} here; name a folder of `tilestream evaluate --out`")
    try:
        found = json.loads(storage.read_bytes(uri, options))
        _scores([found])
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{uri}: not what `tilestream evaluate --out` writes ({error}); evaluate again") from error
    return found


def _scores(found: Sequence[dict[str, Any]]) -> str:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    rows = [
        (
            storage.name_of(about["dataset"]),
            storage.name_of(about["model"]),
            *(score["task"], score["metric"], number(score["value"])),
            # Scores of before `stdev` have none.
            number(score.get("stdev")),
            "–" if score["low"] is None else f"{number(score['low'])} to {number(score['high'])}",
            *(f"{score['n']:,}", f"{score['groups'] or '–'}"),
        )
        for about in found
        for score in about["scores"]
    ]
    warnings = "".join(f"<p>{html.escape(about['warning'])}</p>" for about in found if about.get("warning"))
    names = ("dataset", "model", "task", "metric", "value", "± of runs", "95 % interval", "n", "patients or slides")
    text = "Intervals resample patients or slides; below ten of them there are none."
    return _section("Scores", text, warnings + _table(names, rows))


def _licences(catalog: Catalog) -> str:
    column = next((name for name in ("license", "licence") if name in catalog.metadata_columns), None)
    if column is None:
        return _section("Licences", "The catalog names none: its metadata have no column license.", "")
    counts = Counter(str(name or "not named") for name in catalog.metadata(column))
    rows = [(name, f"{count:,}") for name, count in counts.most_common()]
    return _section("Licences", "Of the slides that it was trained on.", _table(("licence", "slides"), rows))


def _embeddings(slide: SlideEmbeddings, config: Config) -> str:
    about, name = slide.about, storage.name_of(slide.about.slide)
    (colours,), explained = principal_colours([slide.features])
    image = slide_thumbnail(about.slide, about.slide_mpp, 620, config.data.slide_options)
    painted = image.copy()
    scale = image.shape[1] / about.width
    for corner, colour in zip(slide.corners, colours, strict=True):
        left, top, right, bottom = (round(float(v) * scale) for v in (*corner, *(corner + about.exact_extent)))
        painted[top:bottom, left:right] = (colour * 255).astype(np.uint8)
    num, width = slide.features.shape
    caption = f"{num:,} tiles, {width} dimensions; {explained:.0%} of the variance in three components"
    text = f"{name}, its tiles as {about.model} embeds them; red, green and blue are their three principal components."
    figures = _figure(image, name) + _figure(painted, caption)
    return _section("Embeddings", text, f'<div class="row two">{figures}</div>')


def _going_on(config: Config) -> str:
    commands = "\n".join(own_slides_commands())
    return _section(
        "Your own slides",
        "The same road on your own data; addresses may be local or s3://.",
        f"<details open><summary>commands</summary><pre>{html.escape(commands)}</pre></details>"
        f"<details><summary>configuration of this run</summary><pre>{html.escape(config.to_yaml())}</pre></details>",
    )


def own_slides_commands() -> list[str]:
    """What to type to go the same road with one's own slides."""
    return [
        "tilestream catalog /path/to/slides --out catalog",
        "tilestream train debug --data.catalog catalog --run.out runs/first",
        "tilestream embed runs/first /path/to/slides --out embeddings",
    ]
