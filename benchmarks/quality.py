"""Whether training teaches anything: `tilestream bench quality`.

A ViT-tiny is trained by the demo's recipe for some CPU-minutes on made slides, and scored against its own random
initialisation on other patients' slides, whose maker knows the tissue class of each tile. Then a recipe that must
collapse (no centring, learning rate × 100) has to be stopped by the guard. `--section.key value` changes a field of the
recipe that is to teach something.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.common import made_catalog
from benchmarks.table import machine
from streaming import storage
from streaming.errors import TrainingError
from streaming.synthetic.layout import SyntheticSlide, TissueClass, tissue_classes
from streaming.synthetic.svs import write_slide
from trainer.embed.model import Model, load_model, model_of
from trainer.evaluate.annotations import AnnotatedTiles
from trainer.evaluate.datasets import read_dataset
from trainer.evaluate.options import EvaluateOptions
from trainer.evaluate.scores import Score
from trainer.evaluate.scoring import evaluate_model
from trainer.run.config import Config, read_config
from trainer.run.fit import make_module
from trainer.run.train import train

TRAINED_ON, SCORED_ON = range(6), range(100, 148)
MPP, SIZE, STEP = 1.0, 64, 32  # tiles as large as the demo's crops
MOST = 40  # tiles of a class from a slide
BROKEN = ("--loss.centring", "centring", "--loss.centre_momentum", "0.999999", "--optim.base_lr", "0.8")


def made(folder: Path, patients: Sequence[int], width: int, height: int) -> list[SyntheticSlide]:
    """Slides of these patients, written once to `folder/quality`."""
    slides = [SyntheticSlide(width=width, height=height, patient=patient) for patient in patients]
    folder.joinpath("quality").mkdir(parents=True, exist_ok=True)
    for slide in slides:
        if not place(folder, slide).exists():
            sys.stderr.write(f"making {place(folder, slide).name}\n")
            write_slide(slide, place(folder, slide))
    return slides


def place(folder: Path, slide: SyntheticSlide) -> Path:
    """Where a slide's file is."""
    return folder / "quality" / f"{slide.patient}-{slide.width}.svs"


def pure_tiles(slide: SyntheticSlide) -> list[tuple[int, int, TissueClass]]:
    """Level-0 corner and class of tiles that lie in one class of tissue alone, as the slide's maker knows it."""
    extent = round(SIZE * MPP / slide.mpp)
    points = tissue_classes(slide, 0, 0, slide.width, slide.height, STEP)
    found: dict[int, list[tuple[int, int, TissueClass]]] = {}
    corners = [(x, y) for y in range(0, slide.height - extent, extent) for x in range(0, slide.width - extent, extent)]
    for index in np.random.default_rng(slide.patient).permutation(len(corners)):
        x, y = corners[index]
        kinds = np.unique(points[y // STEP : (y + extent) // STEP, x // STEP : (x + extent) // STEP])
        tiles = found.setdefault(int(kinds[0]), [])
        if len(kinds) == 1 and kinds[0] != TissueClass.BACKGROUND and len(tiles) < MOST:
            tiles.append((x, y, TissueClass(kinds[0])))
    return [tile for tiles in found.values() for tile in tiles]


def write_dataset(folder: Path, slides: Sequence[SyntheticSlide]) -> str:
    """The labelled tiles as a table that `tilestream evaluate` takes."""
    path = folder / "quality" / "tiles.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "x", "y", "mpp", "size", "label", "patient"))
        for slide in slides:
            for x, y, kind in pure_tiles(slide):
                writer.writerow((place(folder, slide), x, y, MPP, SIZE, kind.name.lower(), slide.patient))
    return str(path)


def configured(catalog: str, out: str, steps: int, *overrides: str) -> Config:
    """The demo's recipe for so many steps."""
    fixed = ["--data.catalog", catalog, "--run.out", out, "--train.steps", str(steps), "--run.loggers", "[]"]
    return read_config("debug", [*fixed, "--train.log_every", "10", "--train.checkpoint_every", "100000", *overrides])


def cpu_s_of_a_step(catalog: str) -> float:
    """CPU seconds of a step in this process, reading its tiles included."""
    taken: list[float] = []
    for steps in (10, 30):
        with tempfile.TemporaryDirectory() as out:
            started = time.process_time()
            train(configured(catalog, out, steps), debug=True)
            taken.append(time.process_time() - started)
    return (taken[1] - taken[0]) / 20


def scored(model: Model, dataset: str, probe_steps: int) -> list[Score]:
    """Linear probe, kNN, logistic regression and rank of a model on the made tiles."""
    options = EvaluateOptions(tasks=("linear", "knn", "logistic", "quality"), probe_steps=probe_steps)
    return evaluate_model(model, read_dataset(dataset, AnnotatedTiles()), options)


def guard_fires(catalog: str) -> str | None:
    """What the guard says when it stops the broken recipe; None if it lets it run."""
    with tempfile.TemporaryDirectory() as out:
        watch = ("--watch.grace_steps", "20", "--train.log_every", "2")
        try:
            train(configured(catalog, out, 300, *BROKEN, *watch), debug=True)
        except TrainingError as error:
            return str(error).removeprefix(f"{storage.canonical(out)}: ").split(";")[0]
    return None


def print_table(trained: Sequence[Score], random: Sequence[Score]) -> bool:
    """Prints both models' scores; whether linear probe and kNN are better beyond the intervals."""
    print(f"{'':<44} {'random':>7} {'95 % interval':>16} {'trained':>9} {'95 % interval':>16}")
    clear = True
    for before, after in zip(random, trained, strict=True):
        ends = [f"{s.low:.3f} to {s.high:.3f}" if np.isfinite(s.low) else "–" for s in (before, after)]
        verdict = ""
        if after.metric == "balanced accuracy":
            apart = after.low > before.high
            clear &= apart or after.task == "logistic"
            verdict = "  apart" if apart else "  NOT apart"
        name = f"{after.task}: {after.metric}"
        print(f"{name:<44} {before.value:>7.3f} {ends[0]:>16} {after.value:>9.3f} {ends[1]:>16}{verdict}")
    return clear


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 where training teaches nothing, or the guard stays silent."""
    parser = argparse.ArgumentParser(prog="tilestream bench quality", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="CPU-minutes of training (10)")
    parser.add_argument("--steps", type=int, help="steps of training, instead of minutes")
    parser.add_argument("--probe-steps", type=int, default=12500, help="of the linear probe (12500)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    default = Path(tempfile.gettempdir(), "tilestream-bench")
    parser.add_argument("--folder", type=Path, default=default, help="where slides are kept")
    args, overrides = parser.parse_known_args(argv)
    slides = made(args.folder, TRAINED_ON, 8192, 6144)
    dataset = write_dataset(args.folder, made(args.folder, SCORED_ON, 6144, 4608))
    catalog = str(args.folder / "quality" / "catalog")
    made_catalog([str(place(args.folder, slide)) for slide in slides], out=catalog)
    steps = args.steps or max(30, round(args.minutes * 60 / cpu_s_of_a_step(catalog)))
    with tempfile.TemporaryDirectory() as out:
        config = configured(catalog, out, steps, *overrides)
        random = scored(
            model_of("random", config.augment, make_module(config).teacher.backbone), dataset, args.probe_steps
        )
        started, wall = time.process_time(), time.perf_counter()
        train(config, debug=True)
        cpu_min, wall_min = (time.process_time() - started) / 60, (time.perf_counter() - wall) / 60
        trained = scored(load_model(out), dataset, args.probe_steps)
    told = guard_fires(catalog)
    facts = {"steps": steps, "cpu_minutes": round(cpu_min, 2), "wall_minutes": round(wall_min, 2), "guard": told}
    if args.json:
        scores = {name: [asdict(s) for s in found] for name, found in (("random", random), ("trained", trained))}
        print(json.dumps({"machine": machine(), **facts, **scores}))
        return 0
    print(f"{machine()}; ViT-tiny, {steps} steps, {cpu_min:.1f} CPU-minutes ({wall_min:.1f} on the clock)")
    print(f"{trained[0].n:,} tiles of {trained[0].groups} patients that were not trained on\n")
    clear = print_table(trained, random)
    print(f"\ncollapse guard on the broken recipe: {told or 'SILENT'}")
    return 0 if clear and told and "collapsed" in told else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main())
