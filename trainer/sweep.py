"""Studies of what a field of the configuration brings, such as shares of the data: a run a value, each one scored.

`tilestream sweep`. An axis is a field with its values; the runs are all combinations.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import pyarrow as pa
import yaml

from streaming import storage
from streaming.catalog import Catalog
from streaming.errors import ConfigError
from trainer.evaluate.knn_watch import KnnWatch
from trainer.evaluate.options import EvaluateOptions
from trainer.evaluate.scoring import SCORES_JSON, evaluate, labelled
from trainer.recipe.recipe import Recipe
from trainer.run.config import Config, changed, plain
from trainer.run.data import load_catalog, make_plan
from trainer.run.fit import check_model
from trainer.run.fitted import fitted
from trainer.run.train import train

TABLE, PICTURE = "sweep.parquet", "sweep.png"
SLIDES, TILES, SEED = "data.universe.slides", "data.universe.tiles_per_slide", "run.seed"
# Columns of the table and titles of the picture that are called otherwise than their fields.
_COLUMNS = {SLIDES: "share", TILES: "tiles_per_slide", SEED: "seed"}
_TITLES = {"share": "share of slides", "tiles_per_slide": "distinct tiles of a slide"}
_ABOUT = [
    ("run", pa.string()),
    ("share", pa.float64()),
    ("slides", pa.int64()),
    ("patients", pa.int64()),
    ("tiles_per_slide", pa.int64()),  # null: no bound
]
_SCORED = [
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
_LONGEST = 40  # characters of a value in the name of a folder
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A field of the configuration, and the values that it has in the runs of a sweep."""

    key: str
    """as `--section.key` has it"""
    values: tuple[str, ...]
    """as `--section.key VALUE` has each"""
    option: str
    """of the command line, for errors"""

    @property
    def column(self) -> str:
        """What the table calls it."""
        return _COLUMNS.get(self.key, self.key)


def read_axis(text: str) -> Axis:
    """An axis as `KEY=VALUE,VALUE,...`; a value that has commas has brackets or braces around them.

    Raises:
        ConfigError: it is no such list.
    """
    key, _, listed = text.partition("=")
    try:
        found = yaml.compose(f"[{listed}]", Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        found = None
    if not key or found is None or found.end_mark.index != len(listed) + 2 or not found.value:
        raise ConfigError(f"--over {text!r}: give a field and its values, such as data.corners=anywhere,blocks")
    # As they are written, for the configuration reads them by the types of its fields.
    values = tuple(
        node.value if isinstance(node, yaml.ScalarNode) else listed[node.start_mark.index - 1 : node.end_mark.index - 1]
        for node in found.value
    )
    return Axis(key=key, values=values, option=f"--over {key}")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep."""

    name: str
    """its folder"""
    config: Config
    """without the sweep's folder"""
    point: Mapping[str, Any]
    """its value of each axis, by the table's columns: a number, None for no bound, or text"""

    def at(self, out: str) -> Config:
        """Its configuration, in the folder of a sweep."""
        return replace(self.config, run=replace(self.config.run, out=storage.join(out, self.name)))


def planned_runs(axes: Sequence[Axis], config: Config) -> list[PlannedRun]:
    """All combinations of the axes' values, numbers rising: the smallest data first.

    Raises:
        ConfigError: no such field, a value that makes no sense, or one that comes twice.
    """
    if twice := [axis.option for axis in axes if [other.key for other in axes].count(axis.key) > 1]:
        raise ConfigError(f"{' and '.join(twice)} name the same field; give it once")
    for axis in axes:
        if axis.key in ("run.out", "data.catalog") or not axis.values:
            raise ConfigError(f"{axis.option}: give at least one value of a field that runs of a sweep may differ in")
    found = [_planned(axes, values, config) for values in itertools.product(*(axis.values for axis in axes))]
    for axis in axes:
        # Values that a folder's name does not tell apart would be one run.
        if len({_named(run.point[axis.column]) for run in found}) < len(axis.values):
            raise ConfigError(f"{axis.option}: a value comes twice; give each once")
    columns = [axis.column for axis in axes if all(not isinstance(run.point[axis.column], str) for run in found)]
    return sorted(found, key=lambda run: [_place(run.point[column]) for column in columns])


def _planned(axes: Sequence[Axis], values: Sequence[str], config: Config) -> PlannedRun:
    given = [f"--{axis.key}={value}" for axis, value in zip(axes, values, strict=True)]
    own = changed(config, given, {})
    point = {axis.column: _value(own, axis.key) for axis in axes}
    others = [f"{axis.key}-{_named(point[axis.column])}" for axis in axes if axis.key not in _COLUMNS]
    universe = own.data.universe
    slides, tiles = f"slides-{_named(universe.slides)}", f"tiles-{_named(universe.tiles_per_slide)}"
    return PlannedRun(name="_".join([slides, tiles, *others, f"seed-{own.run.seed}"]), config=own, point=point)


def _value(config: Config, key: str) -> Any:
    """A field's value as a table has it."""
    value: Any = config
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    if is_dataclass(value):
        raise ConfigError(f"--over {key}: it is a section; name a field of it")
    if value is None and key != TILES:
        return "none"
    return value if value is None or _is_number(value) else str(plain(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _place(value: float | None) -> float:
    """Where a number stands; no bound is infinity."""
    return math.inf if value is None else float(value)


def _named(value: float | str | None) -> str:
    """A value as part of a folder's name: what such names can't hold is told apart by a hash."""
    if value is None:
        return "inf"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    plain_text = re.sub(r"[^\w.+-]+", "-", text).strip("-")[:_LONGEST]
    return text if text == plain_text else f"{plain_text}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def sweep(
    config: Config,
    axes: Sequence[Axis],
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
    With `train.flops`, set or an axis, each run has the steps that these buy it.

    Raises:
        ConfigError: axes of which there are no runs, a dataset that can't be scored by embeddings of tiles, or a recipe
            that makes no sense.
        PlanError: a share so small that no slide is left, or none that has the resolution.
        TilestreamError: as `train` and `evaluate`.
    """
    options, out = options or EvaluateOptions(), storage.canonical(out)
    runs = planned_runs(axes, config)
    if labelled(dataset, options, config.data.storage_options).whole_slides:
        raise ConfigError(f"{dataset}: labels whole slides, which are scored by `tilestream embed` first; label tiles")
    catalog = load_catalog(config.data)
    # What is wrong with the last run is told before the first one trains.
    known: list[Recipe] = []
    for run in runs:
        own, _ = fitted(run.config)
        if own.recipe not in known:
            check_model(own, resumed=True)
            known.append(own.recipe)
    sizes = [_drawn_from(run.config, catalog) for run in runs]
    rows: list[Row] = []
    for number, (run, size) in enumerate(zip(runs, sizes, strict=True), start=1):
        tell(f"run {number} of {len(runs)}: {run.name}: {size[0]} slides of {size[1]} patients")
        result = train(run.at(out), KnnWatch, debug=debug)
        if result.steps < result.planned:
            return None
        about = _about(run, size, result.steps)
        scores = _scores(result.checkpoint, dataset, options, storage.join(out, run.name, "scores"), config)
        rows += [about | score for score in scores]
    store, columns = config.data.storage_options, [axis.column for axis in axes]
    storage.write_table(storage.join(out, TABLE), _table(rows, columns), store)
    storage.write_bytes(storage.join(out, PICTURE), draw(rows, columns), store)
    return rows


def _drawn_from(config: Config, catalog: Catalog) -> tuple[int, int]:
    """Slides and patients that a run draws its tiles from."""
    return make_plan(config.data, config.run.seed, catalog, config.held_out).drawn_from


def _about(run: PlannedRun, drawn_from: tuple[int, int], steps: int) -> Row:
    """The table's columns that tell of the run itself."""
    slides, patients = drawn_from
    universe = run.config.data.universe
    return {
        "run": run.name,
        "share": universe.slides,
        "slides": slides,
        "patients": patients,
        "tiles_per_slide": universe.tiles_per_slide,
        **run.point,
        "seed": run.config.run.seed,
        "steps": steps,
        "tiles_seen": steps * run.config.train.batch,
    }


def _table(rows: Sequence[Row], columns: Sequence[str]) -> pa.Table:
    """The rows, with a column for each axis that has none of its own: of numbers, or else of text."""
    others = [column for column in columns if column not in _COLUMNS.values()]
    numbers = {column: all(_is_number(row[column]) for row in rows) for column in others}
    kinds = [(column, pa.float64() if numbers[column] else pa.string()) for column in others]
    texts = [column for column in others if not numbers[column]]
    rows = [row | {column: str(row[column]) for column in texts} for row in rows]
    return pa.Table.from_pylist(rows, schema=pa.schema([*_ABOUT, *kinds, *_SCORED]))


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


def score_lines(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """The scores as a table for a terminal; columns are the axes'."""
    others = [column for column in columns if column not in _COLUMNS.values()]
    titles = ["share", "slides", "tiles a slide", *others, "seed", "task", "metric", "value", "95 % interval"]
    cells = [
        [
            f"{row['share']:g}",
            f"{row['slides']:,}",
            _told(row["tiles_per_slide"]),
            *(_told(row[column]) for column in others),
            str(row["seed"]),
            row["task"],
            row["metric"],
            f"{row['value']:.3f}",
            "–" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}",
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    return [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in [titles, *cells]
    ]


def _told(value: float | str | None) -> str:
    """A value of an axis for a reader."""
    if value is None:
        return "no bound"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:g}"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of the picture: scores over the values of an axis, the mean over seeds."""

    label: str
    x: list[float | str]
    """numbers, infinity where there is no bound; or text"""
    value: list[float]
    low: list[float]
    """lowest end of the seeds' 95 % intervals; NaN where there are none"""
    high: list[float]


def curves(rows: Sequence[Row], over: str, by: Sequence[str]) -> Iterator[Curve]:
    """A curve of one metric's rows over the column `over` for each combination of values of the columns `by`."""
    there = {tuple(row[column] for column in by) for row in rows}
    for fixed in filter(there.__contains__, itertools.product(*(_values(rows, column) for column in by))):
        own = [row for row in rows if tuple(row[column] for column in by) == fixed]
        x = _values(own, over)
        at = [[row for row in own if row[over] == place] for place in x]
        named = zip(by, map(_told, fixed), strict=True)
        yield Curve(
            label=_told(fixed[0]) if len(by) == 1 else ", ".join(f"{_title(name)} {value}" for name, value in named),
            x=[math.inf if place is None else place for place in x],
            value=[sum(row["value"] for row in seeds) / len(seeds) for seeds in at],
            low=[min(_or_nan(row["low"]) for row in seeds) for seeds in at],
            high=[max(_or_nan(row["high"]) for row in seeds) for seeds in at],
        )


def _values(rows: Sequence[Row], column: str) -> list[Any]:
    """The values of a column, each once: numbers rising, others as they come."""
    found = list(dict.fromkeys(row[column] for row in rows))
    return found if any(isinstance(value, str) for value in found) else sorted(found, key=_place)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _title(column: str) -> str:
    return _TITLES.get(column, column)


def draw(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    """A PNG: for each metric, the score over each axis that has several values; columns are the axes'."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = [column for column in columns if column != _COLUMNS[SEED]] or ["share"]
    overs = [column for column in axes if len(_values(rows, column)) > 1] or axes[:1]
    metrics = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    size = max(2, len(overs)) * 5, 3.4 * len(metrics)
    figure, panels = plt.subplots(
        len(metrics), len(overs), figsize=size, layout="constrained", squeeze=False, sharey="row"
    )
    for of_metric, (task, metric) in zip(panels, metrics, strict=True):
        own = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        for ax, over in zip(of_metric, overs, strict=True):
            by = [column for column in overs if column != over]
            _draw_panel(ax, list(curves(own, over, by)), _title(over), _title(by[0]) if len(by) == 1 else None)
        of_metric[0].set_ylabel(f"{task}: {metric}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    return picture.getvalue()


def _draw_panel(ax: Any, lines: Sequence[Curve], title: str, legend: str | None) -> None:
    places = list(dict.fromkeys(place for line in lines for place in line.x))
    if any(isinstance(place, str) for place in places):
        _draw_points(ax, lines, [str(place) for place in places])
    else:
        _draw_lines(ax, lines, sorted(float(place) for place in places))
    ax.set_xlabel(title)
    ax.grid(alpha=0.3)
    if any(line.label for line in lines):
        ax.legend(title=legend, fontsize="small")


def _draw_lines(ax: Any, lines: Sequence[Curve], places: Sequence[float]) -> None:
    finite = [place for place in places if math.isfinite(place)]
    # Without a bound stands a step of three to the right of the largest one.
    last = 3 * finite[-1] if finite else 1.0
    for line in lines:
        x = [last if place == math.inf else place for place in line.x]
        (drawn,) = ax.plot(x, line.value, "o-", markersize=4, label=line.label)
        ax.fill_between(x, line.low, line.high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    unbounded = len(finite) < len(places)
    if last > 0 and all(place > 0 for place in finite):
        ax.set_xscale("log")
    ax.set_xticks([*finite, *([last] if unbounded else [])])
    ax.set_xticklabels([*(f"{x:g}" for x in finite), *(["no bound"] if unbounded else [])])
    ax.minorticks_off()


def _draw_points(ax: Any, lines: Sequence[Curve], places: Sequence[str]) -> None:
    for number, line in enumerate(lines):
        # Side by side, or one would hide another.
        beside = 0.5 * (number - (len(lines) - 1) / 2) / len(lines)
        x = [places.index(str(place)) + beside for place in line.x]
        ends = zip(line.value, line.low, line.high, strict=True)
        spread = [[max(0.0, value - low), max(0.0, high - value)] for value, low, high in ends]
        ax.errorbar(x, line.value, list(zip(*spread, strict=True)), fmt="o", markersize=5, label=line.label)
    ax.set_xticks(range(len(places)))
    ax.set_xticklabels([place if len(place) <= _LONGEST else f"…{place[-_LONGEST:]}" for place in places])
    ax.set_xlim(-0.5, len(places) - 0.5)
