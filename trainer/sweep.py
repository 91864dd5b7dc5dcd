"""Data-scaling studies: runs on nested parts of the data, each one scored: `tilestream sweep`."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from streaming import storage
from streaming.catalog import Catalog
from streaming.errors import ConfigError
from trainer.evaluate.knn_watch import KnnWatch
from trainer.evaluate.options import EvaluateOptions
from trainer.evaluate.scoring import SCORES_JSON, evaluate, labelled
from trainer.run.config import Config
from trainer.run.data import load_catalog, make_plan
from trainer.run.fit import check_model
from trainer.run.train import train

TABLE, PICTURE = "sweep.parquet", "sweep.png"
_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("share", pa.float64()),
        ("slides", pa.int64()),
        ("patients", pa.int64()),
        ("tiles_per_slide", pa.int64()),  # null: no bound
        ("seed", pa.int64()),
        ("steps", pa.int64()),
        ("tiles_seen", pa.int64()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
        ("groups", pa.int64()),
    ]
)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep."""

    share: float
    """of the slides, by patient"""
    tiles_per_slide: int | None
    """distinct tiles of each slide; none: no bound"""
    seed: int

    @property
    def name(self) -> str:
        """The run's folder."""
        bound = "inf" if self.tiles_per_slide is None else str(self.tiles_per_slide)
        return f"slides-{self.share:g}_tiles-{bound}_seed-{self.seed}"

    def of(self, config: Config, out: str) -> Config:
        """The configuration of this run."""
        universe = replace(config.data.universe, slides=self.share, tiles_per_slide=self.tiles_per_slide)
        run = replace(config.run, out=storage.join(out, self.name), seed=self.seed)
        return replace(config, run=run, data=replace(config.data, universe=universe))


def planned_runs(
    shares: Sequence[float], tiles_per_slide: Sequence[int | None], seeds: Sequence[int], config: Config
) -> list[PlannedRun]:
    """All combinations, the smallest data first, with `run.seed` where no seed is given.

    Raises:
        ConfigError: a share or number of tiles that makes no sense, or one that comes twice.
    """
    for what, given in (("--slides", shares), ("--tiles-per-slide", tiles_per_slide), ("--seeds", seeds)):
        if len(set(given)) < len(given):
            raise ConfigError(f"{what}: a value comes twice; give each once")
    bounds = sorted(tiles_per_slide, key=lambda bound: math.inf if bound is None else bound)
    runs = [
        PlannedRun(share=share, tiles_per_slide=bound, seed=seed)
        for share in sorted(shares)
        for bound in bounds
        for seed in seeds or [config.run.seed]
    ]
    if not runs:
        raise ConfigError("--slides and --tiles-per-slide: give at least one value of each")
    for run in runs:
        run.of(config, "")  # the universe refuses what makes no sense
    return runs


def sweep(
    config: Config,
    runs: Sequence[PlannedRun],
    dataset: str,
    out: str,
    options: EvaluateOptions | None = None,
    *,
    debug: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Row] | None:
    """Trains and scores every run, and writes `sweep.parquet` and `sweep.png` to `out` when all are done.

    Returns the table's rows; None where a run was told to stop (SIGTERM) before its last step.

    Each run lies in a folder of its own below `out`, its scores in `scores/`. A sweep that is started again trains on
    where it was, and does not score again what was scored by the same options. With `debug`, all runs in this process.

    Raises:
        ConfigError: a dataset that can't be scored by embeddings of tiles, or a recipe that makes no sense.
        PlanError: a share so small that no slide is left, or none that has the resolution.
        TilestreamError: as `train` and `evaluate`.
    """
    options, out = options or EvaluateOptions(), storage.canonical(out)
    if labelled(dataset, options, config.data.storage_options).whole_slides:
        raise ConfigError(f"{dataset}: labels whole slides, which are scored by `tilestream embed` first; label tiles")
    catalog = load_catalog(config.data)
    check_model(config, resumed=True)
    # What is wrong with the last run's data is told before the first one trains.
    sizes = {run: _drawn_from(run.of(config, out), catalog) for run in runs}
    rows: list[Row] = []
    for number, run in enumerate(runs, start=1):
        slides, patients = sizes[run]
        tell(f"run {number} of {len(runs)}: {run.name}: {slides} slides of {patients} patients")
        result = train(run.of(config, out), KnnWatch, debug=debug)
        if result.steps < result.planned:
            return None
        about = _about(run, sizes[run], result.steps, config.train.batch)
        scores = _scores(result.checkpoint, dataset, options, storage.join(out, run.name, "scores"), config)
        rows += [about | score for score in scores]
    store = config.data.storage_options
    storage.write_table(storage.join(out, TABLE), pa.Table.from_pylist(rows, schema=_SCHEMA), store)
    storage.write_bytes(storage.join(out, PICTURE), draw(rows), store)
    return rows


def _drawn_from(config: Config, catalog: Catalog) -> tuple[int, int]:
    """Slides and patients that a run draws its tiles from."""
    return make_plan(config.data, config.run.seed, catalog, config.held_out).drawn_from


def _about(run: PlannedRun, drawn_from: tuple[int, int], steps: int, batch: int) -> Row:
    """The table's columns that tell of the run itself."""
    slides, patients = drawn_from
    return {
        "run": run.name,
        "share": run.share,
        "slides": slides,
        "patients": patients,
        "tiles_per_slide": run.tiles_per_slide,
        "seed": run.seed,
        "steps": steps,
        "tiles_seen": steps * batch,
    }


def _scores(source: str, dataset: str, options: EvaluateOptions, out: str, config: Config) -> list[Row]:
    """A checkpoint's scores: those that lie in `out`, where they are of the same, else new ones."""
    store, found = config.data.storage_options, storage.join(out, SCORES_JSON)
    about = {"model": source, "dataset": dataset, "options": json.loads(json.dumps(options.told(), default=str))}
    if storage.exists(found, store):
        before = json.loads(storage.read_bytes(found, store))
        if {name: before.get(name) for name in about} == about:
            return before["scores"]
    evaluate(source, dataset, options, store, out=out)
    return json.loads(storage.read_bytes(found, store))["scores"]


def score_lines(rows: Sequence[Row]) -> list[str]:
    """The scores as a table for a terminal."""
    width = max(len("metric"), *(len(row["metric"]) for row in rows))
    lines = [
        f"{'share':>6} {'slides':>7} {'tiles a slide':>13} {'seed':>5}  {'task':<8} {'metric':<{width}} {'value':>7}"
        "  95 % interval"
    ]
    for row in rows:
        bound = "no bound" if row["tiles_per_slide"] is None else f"{row['tiles_per_slide']:,}"
        interval = "–" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append(
            f"{row['share']:>6g} {row['slides']:>7,} {bound:>13} {row['seed']:>5}  {row['task']:<8} "
            f"{row['metric']:<{width}} {row['value']:>7.3f}  {interval}"
        )
    return lines


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of the picture: scores over shares or numbers of tiles, the mean over seeds."""

    label: str
    x: list[float]
    value: list[float]
    low: list[float]
    """lowest end of the seeds' 95 % intervals; NaN where there are none"""
    high: list[float]


def curves(rows: Sequence[Row], over: str, by: str) -> Iterator[Curve]:
    """A curve of one metric's rows over the column `over` for each value of the column `by`; no bound is infinity."""

    def number(row: Mapping[str, Any], name: str) -> float:
        return math.inf if row[name] is None else float(row[name])

    for fixed in sorted({number(row, by) for row in rows}):
        own = [row for row in rows if number(row, by) == fixed]
        x = sorted({number(row, over) for row in own})
        at = [[row for row in own if number(row, over) == place] for place in x]
        yield Curve(
            label="no bound" if math.isinf(fixed) else f"{fixed:g}",
            x=x,
            value=[sum(row["value"] for row in seeds) / len(seeds) for seeds in at],
            low=[min(_or_nan(row["low"]) for row in seeds) for seeds in at],
            high=[max(_or_nan(row["high"]) for row in seeds) for seeds in at],
        )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def draw(rows: Sequence[Row]) -> bytes:
    """A PNG: for each metric, the score over the share of slides and over the distinct tiles of a slide."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    figure, axes = plt.subplots(
        len(metrics), 2, figsize=(10, 3.4 * len(metrics)), layout="constrained", squeeze=False, sharey="row"
    )
    panels = ("share", "tiles_per_slide", "share of slides"), ("tiles_per_slide", "share", "distinct tiles of a slide")
    for pair, (task, metric) in zip(axes, metrics, strict=True):
        own = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        for ax, (over, by, title) in zip(pair, panels, strict=True):
            _draw_panel(
                ax, list(curves(own, over, by)), title, legend="share of slides" if by == "share" else "tiles a slide"
            )
        pair[0].set_ylabel(f"{task}: {metric}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    return picture.getvalue()


def _draw_panel(ax: Any, lines: Sequence[Curve], title: str, *, legend: str) -> None:
    finite = sorted({x for line in lines for x in line.x if math.isfinite(x)})
    # Without a bound stands a step of three to the right of the largest one.
    last = 3 * finite[-1] if finite else 1.0
    for line in lines:
        x = [last if math.isinf(place) else place for place in line.x]
        (drawn,) = ax.plot(x, line.value, "o-", markersize=4, label=line.label)
        ax.fill_between(x, line.low, line.high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    unbounded = any(math.isinf(x) for line in lines for x in line.x)
    ax.set_xscale("log")
    ax.set_xticks([*finite, *([last] if unbounded else [])])
    ax.set_xticklabels([*(f"{x:g}" for x in finite), *(["no bound"] if unbounded else [])])
    ax.minorticks_off()
    ax.set_xlabel(title)
    ax.grid(alpha=0.3)
    ax.legend(title=legend, fontsize="small")
