"""Runs on nested parts of the data, and its curves."""

import io
import math
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from streaming import storage
from streaming.catalog import Catalog
from streaming.plan.specs import TileSpecs
from tests.processes import wait_for
from trainer.cli import main
from trainer.recipe.flops import step_flops
from trainer.run import checkpoints
from trainer.run.config import read_config
from trainer.run.data import make_plan
from trainer.sweep import SLIDES, TILES, Axis, curves, draw, planned_runs, read_axis

SMALL = [
    *("--augment.global_size", "32", "--augment.local_size", "16", "--augment.num_local", "1"),
    *("--data.tile_size", "32", "--data.mpp", "{0.5: 1}", "--train.batch", "4", "--train.steps", "2"),
    *("--model.num_prototypes", "32", "--model.head_hidden", "16", "--model.head_bottleneck", "8"),
    *("--optim.warmup_steps", "1", "--optim.teacher_temp_warmup_steps", "1"),
]


@pytest.mark.slow
def test_a_sweep_is_trained_on_nested_data_scored_drawn_and_not_done_twice(
    catalog: str, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    command = ["sweep", "debug", "--data.catalog", catalog, *SMALL, "--evaluate", str(coloured), "--out", str(out)]
    command += ["--slides", "0.3,1", "--tiles-per-slide", "5,inf", "--task", "knn", "--k", "3", "--debug"]
    assert main(command) == 0
    assert "sweep.parquet" in capsys.readouterr().out
    rows = pq.read_table(out / "sweep.parquet").to_pylist()
    cells = [(row["share"], row["tiles_per_slide"]) for row in rows]
    assert cells == [(0.3, 5), (0.3, None), (1.0, 5), (1.0, None)]
    assert [row["slides"] for row in rows] == [1, 1, 3, 3]
    assert all(0.0 <= row["value"] <= 1.0 for row in rows)
    assert all(row["low"] is None for row in rows)  # of four patients there is no interval
    for row in rows:
        run = str(out / row["run"])
        assert checkpoints.steps_of(run) == [2]
        universe = checkpoints.read_config(checkpoints.find(run)).data.universe
        assert (universe.slides, universe.tiles_per_slide) == (row["share"], row["tiles_per_slide"])
    pixels = np.asarray(Image.open(out / "sweep.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, "something is drawn"

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main(command) == 0
    again = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert {path.name for path in out.rglob("*") if again.get(path) != written.get(path) and path.is_file()} == {
        "sweep.parquet",
        "sweep.png",
    }
    assert pq.read_table(out / "sweep.parquet").to_pylist() == rows


@pytest.mark.slow
def test_a_sweep_that_gets_sigterm_leaves_with_143_and_goes_on_when_it_is_started_again(
    catalog: str, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "sweep", signal.getsignal(signal.SIGTERM)
    command = ["sweep", "debug", "--data.catalog", catalog, *SMALL, "--evaluate", str(coloured), "--out", str(out)]
    command += ["--slides", "1", "--tiles-per-slide", "inf", "--task", "knn", "--k", "3", "--debug"]
    command += ["--train.steps", "40"]
    folder = str(out / "slides-1_tiles-inf_seed-0")

    def terminate() -> None:
        wait_for(lambda: signal.getsignal(signal.SIGTERM) is not before)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 143
    assert "start the same command again to go on" in capsys.readouterr().err
    (stopped,) = checkpoints.steps_of(folder)
    assert stopped < 40
    assert not list(out.glob("sweep.*")), "there is no table of half a sweep"
    assert main(command) == 0
    assert pq.read_table(out / "sweep.parquet")["steps"].to_pylist() == [40]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--slides", "0,1"], "universe.slides is 0.0"),
        (["--slides", "0.5,0.5"], "--slides: a value comes twice"),
        (["--slides", "half"], "--slides 'half': give numbers between commas"),
        (["--slides", ","], "give at least one value"),
        (["--tiles-per-slide", "0"], "universe.tiles_per_slide is 0"),
        (["--task", "slide"], "can't be scored by slide"),
        (["--data.mpp", "{0.01: 1}"], "0.01"),
        (["--over", "data.corner=blocks"], "no key 'data.corner'; the nearest is 'data.corners'"),
        (["--over", "data.corners=blocks,nowhere"], "data.corners is 'nowhere'; give one of anywhere, blocks"),
        (["--over", "data.corners=[blocks"], "give a field and its values"),
        (["--over", "data.corners=blocks,blocks"], "--over data.corners: a value comes twice"),
        (["--over", "data={}"], "data: it is a section"),
        (["--over", "run.out=a,b"], "--over run.out: give at least one value of a field that runs"),
        (["--over", "run.seed=1,2", "--seeds", "1"], "name the same field"),
        (["--over", "data.mpp={0.5: 1},{0.01: 1}"], "0.01"),
        (["--over", "train.flops=1,1e12"], "train.flops 1: a step takes"),
        (["--over", "data.tiles=null,none.parquet"], "none.parquet"),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_is_trained(
    wrong: list[str], told: str, catalog: str, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    command = ["sweep", "debug", "--data.catalog", catalog, *SMALL, "--evaluate", str(coloured), "--out", str(out)]
    assert main([*command, "--debug", *wrong]) == 2
    line = capsys.readouterr().err
    assert told in line
    assert line.count("\n") == 1
    assert not out.exists()


def test_a_dataset_that_is_not_there_is_refused_before_anything_is_trained(
    catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", "debug", "--data.catalog", catalog, *SMALL, "--evaluate", str(tmp_path / "none.csv")]
    assert main([*command, "--out", str(tmp_path / "sweep")]) == 2
    assert "none.csv" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_curves_are_means_over_seeds_within_the_widest_of_their_intervals() -> None:
    def row(share: float, bound: int | None, value: float, low: float | None) -> dict:
        about = {"share": share, "tiles_per_slide": bound, "task": "knn", "metric": "balanced accuracy"}
        return about | {"value": value, "low": low, "high": None if low is None else 2 * value - low}

    rows = [row(0.1, 10, 0.5, 0.4), row(0.1, 10, 0.7, 0.65), row(1.0, 10, 0.8, None), row(1.0, None, 0.9, 0.8)]
    first, second = curves(rows, "share", ["tiles_per_slide"])
    assert (first.label, first.x, first.value) == ("10", [0.1, 1.0], [pytest.approx(0.6), 0.8])
    assert (first.low[0], first.high[0]) == (0.4, pytest.approx(0.75))
    assert math.isnan(first.low[1])
    assert (second.label, second.x) == ("no bound", [1.0])
    (all_, none) = list(curves(rows, "tiles_per_slide", ["share"]))[::-1]
    assert (all_.x, none.x) == ([10.0, math.inf], [10.0])
    assert Image.open(io.BytesIO(draw(rows, ["share", "tiles_per_slide"]))).size[0] > 500
    rows = [row | {"data.corners": corners} for row in rows for corners in ("blocks", "anywhere")]
    panel = list(curves(rows, "data.corners", ["share", "tiles_per_slide"]))
    assert [line.label for line in panel] == [
        "share of slides 0.1, distinct tiles of a slide 10",
        "share of slides 1, distinct tiles of a slide 10",
        "share of slides 1, distinct tiles of a slide no bound",
    ]
    assert all(line.x == ["blocks", "anywhere"] for line in panel), "in the order in which they were given"
    wide = Image.open(io.BytesIO(draw(rows, ["share", "tiles_per_slide", "data.corners"])))
    assert wide.size[0] > 1500


def test_runs_of_a_sweep_have_names_seeds_and_universes_of_their_own() -> None:
    config = read_config("debug", ["--run.seed", "7"])
    universe = [Axis(key=SLIDES, values=("1.0", "0.01"), option="--slides")]
    universe += [Axis(key=TILES, values=("null", "100"), option="--tiles-per-slide")]
    runs = planned_runs(universe, config)
    assert [run.name for run in runs] == [
        "slides-0.01_tiles-100_seed-7",
        "slides-0.01_tiles-inf_seed-7",
        "slides-1_tiles-100_seed-7",
        "slides-1_tiles-inf_seed-7",
    ]
    own = runs[0].at("out")
    assert own.run.out == storage.join("out", runs[0].name)
    assert own.data.universe.seed == config.data.universe.seed, "all seeds draw from the same slides"


def test_any_field_is_an_axis_with_values_and_folders_of_its_own() -> None:
    config = read_config("debug", [])
    mpp = read_axis("data.mpp={0.5: 1, 1.0: 2},{uniform: [0.25, 2.0]}")
    runs = planned_runs([mpp, read_axis("run.seed=2,1"), read_axis("data.tiles=null,a/list.parquet")], config)
    assert [(run.config.data.mpp, run.config.run.seed, run.config.data.tiles) for run in runs] == [
        (values, seed, tiles)
        for seed in (1, 2)
        for values in ({0.5: 1, 1.0: 2}, {"uniform": [0.25, 2.0]})
        for tiles in (None, "a/list.parquet")
    ]
    names = [run.name for run in runs]
    assert len(set(names)) == 8
    assert all(
        re.fullmatch(r"slides-1_tiles-inf_data\.mpp-[\w.-]+_data\.tiles-[\w.-]+_seed-[12]", name) for name in names
    )


def test_an_index_is_the_same_tile_in_all_runs_that_draw_alike_whatever_else_is_swept(catalog: str) -> None:
    config, index = read_config("debug", ["--data.catalog", catalog, "--data.tile_size", "64"]), np.arange(500)
    loaded = Catalog.load(catalog)

    def specs(*axes: str) -> list[TileSpecs]:
        runs = planned_runs([read_axis(axis) for axis in axes], config)
        return [make_plan(run.config.data, run.config.run.seed, loaded).specs(index) for run in runs]

    def tiles(drawn: TileSpecs) -> np.ndarray:
        return np.stack([drawn.slide, drawn.x, drawn.y, drawn.mpp], axis=1)

    alone, small, large = *specs(), *specs("train.flops=1e12,1e13")
    assert np.array_equal(tiles(alone), tiles(small))
    assert np.array_equal(tiles(alone), tiles(large))
    anywhere, blocks = specs("data.corners=anywhere,blocks")
    assert np.array_equal(tiles(alone), tiles(anywhere))
    assert np.array_equal(anywhere.mpp, blocks.mpp)
    assert np.array_equal(tiles(blocks), tiles(specs("data.corners=blocks", "run.seed=0")[0]))


@pytest.mark.slow
def test_a_sweep_over_corners_and_flops_has_their_columns_and_as_many_steps_as_the_flops_buy(
    catalog: str, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    config = read_config("debug", ["--data.catalog", catalog, *SMALL])
    of_step = step_flops(config.recipe, config.train.batch).total
    command = ["sweep", "debug", "--data.catalog", catalog, *SMALL, "--evaluate", str(coloured), "--out", str(out)]
    command += ["--over", "data.corners=blocks,anywhere", "--over", f"train.flops={1.5 * of_step}"]
    assert main([*command, "--task", "knn", "--k", "3", "--debug"]) == 0
    assert "data.corners" in capsys.readouterr().out
    rows = pq.read_table(out / "sweep.parquet").to_pylist()
    found = [(row["data.corners"], row["train.flops"] / of_step, row["steps"], row["tiles_seen"]) for row in rows]
    assert found == [("blocks", 1.5, 1, 4), ("anywhere", 1.5, 1, 4)]
    assert {(row["share"], row["tiles_per_slide"], row["seed"]) for row in rows} == {(1.0, None, 0)}
    for row in rows:
        assert checkpoints.read_config(checkpoints.find(str(out / row["run"]))).data.corners == row["data.corners"]
    assert Image.open(out / "sweep.png").size[0] > 900, "as wide as two panels"
