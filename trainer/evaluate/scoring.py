"""From a model and a dataset to scores: `tilestream evaluate`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from streaming import storage
from streaming.errors import ConfigError
from streaming.progress import Pace, ProgressLine
from trainer.embed.model import Model, load_model
from trainer.embed.table_slides import TableSlides
from trainer.evaluate import eva, eva_masks, mil, probes, quality
from trainer.evaluate.annotations import AnnotatedTiles, Target
from trainer.evaluate.datasets import Samples, read_dataset
from trainer.evaluate.detection import score_detection
from trainer.evaluate.features import as_they_are, extract, resized_to
from trainer.evaluate.options import PROBE_STEPS, EvaluateOptions, Task
from trainer.evaluate.probes import Embeddings, Ints
from trainer.evaluate.scores import Score, balanced_accuracy
from trainer.evaluate.scratch import scratch
from trainer.evaluate.segmentation import painted, score_segmentation
from trainer.evaluate.splits import Fold, held_out, leak_warning, make_folds

_BY_EVA: tuple[Task, ...] = ("linear", "slide", "segmentation")
_OF_TILES: tuple[Task, ...] = ("knn", "linear", "logistic", "quality")
SCORES = "scores.parquet"
SCORES_JSON = "scores.json"


def evaluate(
    source: str,
    dataset: str,
    options: EvaluateOptions | None = None,
    storage_options: dict[str, Any] | None = None,
    *,
    out: str | None = None,
) -> list[Score]:
    """Scores a model on a dataset, and writes `scores.parquet` and `scores.json` to `out` where that is given.

    source is a run or one of its checkpoints, a folder that `tilestream export` wrote, or a name of timm's hub; for
    whole slides, the folder that `tilestream embed` wrote. What is wrong with the dataset is told before the model is
    loaded, and nothing is written unless all is scored.

    Raises:
        CheckpointError: no usable model.
        ConfigError: a dataset that can't be scored: one class, missing labels, a leaking split, another kind of task.
        SlideError: a slide that is empty, can't be read, or lacks the resolution.
        StorageError: something can't be reached.
    """
    options = options or EvaluateOptions()
    samples = labelled(dataset, options, storage_options)
    folds, warning = _folds(samples, options)
    if warning is not None:
        sys.stderr.write(f"tilestream: warning: {warning}\n")
    if samples.whole_slides:
        with scratch(options.scratch) as room:
            bags = mil.read_bags(source, samples, room, storage_options)
            if options.protocol == "eva":
                scores = eva.score_slides(bags, samples, folds[0], options.seed, _device(options))
            else:
                scores = mil.score_slides(bags, samples, folds, options.epochs, options.seed, _device(options))
    else:
        scores = evaluate_model(load_model(source, options.token, storage_options), samples, options, storage_options)
    if out is not None:
        about = {"model": source, "dataset": dataset, "options": options.told(), "warning": warning}
        write_scores(out, scores, about, storage_options)
    return scores


def labelled(
    dataset: str,
    options: EvaluateOptions,
    storage_options: dict[str, Any] | None = None,
    slides: TableSlides | None = None,
) -> Samples:
    """A dataset, checked for what `evaluate` refuses before it looks at a model; errors as there.

    slides opens its slides (None: as the options say).
    """
    if options.gpu and not torch.cuda.is_available():
        raise ConfigError("no GPU is visible to PyTorch here; leave out --gpu")
    slides = slides or TableSlides(options.slides, storage_options)
    samples = read_dataset(dataset, _wanted(options), storage_options, slides)
    _tasks(options, samples)
    for fold in _folds(samples, options)[0]:
        if samples.points is not None:
            held_out(samples, fold, options.seed)
    return samples


def _folds(samples: Samples, options: EvaluateOptions) -> tuple[list[Fold], str | None]:
    """What is learnt from and scored by the protocol, and what is to be told of it; errors as `make_folds`."""
    if options.protocol == "eva":
        fold, warning = eva.eva_fold(samples)
        if options.probe_steps == PROBE_STEPS:
            return [fold], warning
        if samples.labels is None or samples.whole_slides:
            raise ConfigError(
                f"{samples.source}: protocol eva has its own steps for masks and slides; leave out --probe-steps"
            )
        short = f"{options.probe_steps:,} steps at most instead of {PROBE_STEPS:,}: the scores are not eva's"
        return [fold], f"{warning}; {short}" if warning else short
    return make_folds(samples, options.folds, options.seed), leak_warning(samples)


def evaluate_model(
    model: Model, samples: Samples, options: EvaluateOptions, storage_options: dict[str, Any] | None = None
) -> list[Score]:
    """Scores a model in memory on samples; errors as `evaluate`."""
    tasks = _tasks(options, samples)
    folds, _ = _folds(samples, options)
    device, by_eva = _device(options), options.protocol == "eva"
    fit = as_they_are if options.resize is None else resized_to(options.resize)
    if by_eva:
        fit = partial(eva.resize_and_crop, side=options.resize or eva.SIDE)
    model = replace(model.on(device), precision=options.products)
    with scratch(options.scratch) as room:
        with ProgressLine("evaluate", "tiles", total=len(samples)) as progress:
            features = extract(
                model,
                samples.tiles,
                fit=fit,
                patches=room if samples.labels is None else None,
                batch=options.batch,
                options=storage_options,
                slides=TableSlides(options.slides, storage_options),
                progress=_with_rate(progress),
            )
        if by_eva and samples.masks is not None:
            cropped = eva_masks.cropped_masks(samples, features, room)
            return eva_masks.score_masks(features, cropped, samples, folds[0], options.seed, device)
        if by_eva:
            setting = replace(eva.TILES, steps=options.probe_steps)
            return eva.score_tiles(features.embeddings, samples, folds[0], options.seed, device, setting)
        if samples.masks is not None:
            masks = painted(samples, features.side, room)
            return score_segmentation(features, masks, samples, folds, options.epochs, options.seed, device)
        if samples.points is not None:
            return score_detection(features, samples, folds, options.radius, options.epochs, options.seed, device)
        return score_tiles(features.embeddings, samples, folds, tasks, options)


def _with_rate(progress: ProgressLine) -> Callable[[int], None]:
    """Shows how many tiles are done, and at what rate since the first ones came."""
    pace = Pace()

    def update(done: int) -> None:
        rate = pace.at(done)
        progress.update(done, f"{rate:,.0f} tiles/s" if rate else "")

    return update


def _device(options: EvaluateOptions) -> torch.device:
    return torch.device("cuda" if options.gpu else "cpu")


def score_tiles(
    embeddings: Embeddings,
    samples: Samples,
    folds: Sequence[Fold],
    tasks: Sequence[Task],
    options: EvaluateOptions,
) -> list[Score]:
    """Scores embeddings (N, D) of labelled tiles."""
    assert samples.labels is not None, "tiles have labels"
    num_classes, device = len(samples.classes), _device(options)
    classify: dict[str, Callable[[Embeddings, Ints, Embeddings], Ints]] = {
        "knn": partial(probes.nearest_neighbours, k=options.k, device=device),
        "linear": partial(probes.linear_probe, num_classes=num_classes, steps=options.probe_steps, seed=options.seed),
        "logistic": probes.logistic,
    }
    scores: list[Score] = []
    tested = np.concatenate([fold.test for fold in folds])
    groups = None if samples.groups is None else samples.groups[tested]
    for task in tasks:
        if task == "quality":
            scores.append(quality.rankme(embeddings, options.seed))
            scores += quality.neighbour_scores(embeddings, samples, options.k, options.seed, device)
            continue
        predicted = [
            classify[task](embeddings[fold.train], samples.labels[fold.train], embeddings[fold.test]) for fold in folds
        ]
        labels = samples.labels[tested]
        scores.append(balanced_accuracy(task, labels, np.concatenate(predicted), groups, num_classes, options.seed))
    return scores


def _wanted(options: EvaluateOptions) -> AnnotatedTiles:
    """Which tiles of annotated slides, with what the tasks want of the annotations.

    Raises:
        ConfigError: they want different things.
    """
    wanted: dict[Task, Target] = {"segmentation": "mask", "detection": "points"}
    targets = {wanted.get(task, "class") for task in options.tasks}
    if len(targets) > 1:
        raise ConfigError(f"tasks {', '.join(options.tasks)}: of different kinds of labels; evaluate them one by one")
    return replace(options.grid, target=targets.pop()) if targets else options.grid


def _tasks(options: EvaluateOptions, samples: Samples) -> tuple[Task, ...]:
    """The tasks of the options, or those of the dataset's kind.

    Raises:
        ConfigError: the dataset has not what one needs.
    """
    possible: tuple[Task, ...] = _OF_TILES
    if samples.whole_slides:
        possible = ("slide",)
    elif samples.masks is not None:
        possible = ("segmentation",)
    elif samples.points is not None:
        possible = ("detection",)
    default: tuple[Task, ...] = tuple(task for task in possible if task != "logistic")
    if options.protocol == "eva":
        possible = tuple(task for task in possible if task in _BY_EVA)
        default = possible
        if not possible:
            raise ConfigError(f"{samples.source}: eva has no protocol for points; take --protocol quick")
    if wrong := [task for task in options.tasks if task not in possible]:
        raise ConfigError(f"{samples.source}: can't be scored by {wrong[0]}; take some of {', '.join(possible)}")
    return options.tasks or default


def write_scores(
    out: str, scores: Sequence[Score], about: dict[str, Any], store: storage.StorageOptions | None = None
) -> None:
    """Writes the scores as Parquet, and as JSON with what they are of; each file appears when it is whole.

    Raises:
        StorageError: they can't be written.
    """
    rows = [{name: _number(value) for name, value in asdict(score).items()} for score in scores]
    storage.write_table(storage.join(out, SCORES), pa.Table.from_pylist(rows, schema=_SCHEMA), store)
    content = json.dumps({**about, "scores": rows}, indent=1, default=str)
    storage.write_bytes(storage.join(out, SCORES_JSON), content.encode(), store)


def _number(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("task", "metric")),
        *(pa.field(name, pa.float64()) for name in ("value", "low", "high", "stdev")),
        *(pa.field(name, pa.int64()) for name in ("n", "groups")),
    ]
)


def table_lines(scores: Sequence[Score]) -> list[str]:
    """The scores as a table for a terminal."""
    width = max(len("metric"), *(len(score.metric) for score in scores))
    by_runs = any(not math.isnan(score.stdev) for score in scores)
    lines = [f"{'task':<13} {'metric':<{width}} {'value':>8}  {'95 % interval':<17} {'n':>8} {'groups':>9}"]
    lines[0] += f" {'± of runs':>9}" if by_runs else ""
    for score in scores:
        known = not math.isnan(score.low)
        interval = f"{score.low:.3f} to {score.high:.3f}" if known else "–"
        lines.append(
            f"{score.task:<13} {score.metric:<{width}} {score.value:>8.3f}  {interval:<17} {score.n:>8,} "
            f"{score.groups or '–':>9}" + (f" {score.stdev:>9.3f}" if by_runs else "")
        )
    return lines
