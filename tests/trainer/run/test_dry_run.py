"""The dry run: what a preset needs, without memory for its model."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from streaming.errors import PlanError
from streaming.operate.prices import read_prices
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from tests.conftest import write_catalog
from trainer.cli import main
from trainer.recipe.schedule import Schedules
from trainer.run.config import read_config
from trainer.run.dry_run import describe, draw, memory, model_size, room_of_node
from trainer.run.fit import make_module


def test_a_dry_run_of_the_largest_preset_tells_its_size_steps_and_curves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--run.out", str(tmp_path / "run"), "--train.ranks", "[16,32]"]
    assert main(["train", "midnight-12k", "--dry-run", *options, "--schedules", str(tmp_path / "schedules.png")]) == 0
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 24, "a screen"
    assert [path.name for path in tmp_path.iterdir()] == ["schedules.png"], "nothing is written but what was asked for"
    # ViT-g/14 as published, 1,134,771,712 with the 1,536 of timm's missing mask token and positions of 37×37 patches.
    backbone = int(told.split("\nstudent ")[1].split()[0].replace(",", ""))
    assert 1_130_000_000 < backbone < 1_140_000_000
    assert "500,000 optimiser steps of 768 tiles: 32 ranks × 12 tiles × 2 rounds, fsdp\n" in told
    assert "\n              or 16 ranks × 12 tiles × 4 rounds, fsdp, where there is no room for more\n" in told
    assert "384,000,000 of 256 px" in told
    assert "not checked" in told
    assert "vit_giant_patch14_dinov2.lvd142m: its names and shapes fit" in told
    picture = np.asarray(Image.open(tmp_path / "schedules.png").convert("RGB"))
    assert picture.std() > 5  # not blank


def test_the_estimate_shares_the_weights_among_shards_and_saves_activations() -> None:
    base = read_config("debug", ["--train.ranks", "4"])
    sharded = replace(base, train=replace(base.train, strategy="fsdp", activation_checkpointing=True))
    size = model_size(base)
    whole, shared = memory(base, size), memory(sharded, size)
    assert whole["weights"][0] == 4 * size.parameters
    assert whole["optimiser"][0] == 8 * size.parameters
    assert shared["weights"][0] == size.parameters
    assert shared["activations of blocks"][0] < whole["activations of blocks"][0]
    assert size.parameters == sum(p.numel() for p in make_module(base).student.parameters())


def test_a_rank_more_on_a_node_costs_its_host_no_model() -> None:
    config = read_config("debug", [])
    size = model_size(config)
    large = replace(size, backbone=10 * size.backbone)
    (one, two), (of_large, more) = ([room_of_node(config, s, ranks).memory for ranks in (1, 2)] for s in (size, large))
    assert two - one == more - of_large
    assert of_large - one == 2 * 16 * 9 * size.backbone


def test_curves_are_drawn_for_one_step_too() -> None:
    optim = read_config("debug", []).optim
    schedules, short = Schedules(optim, 60, 32), Schedules(replace(optim, warmup_steps=0), 1, 32)
    assert Image.open(io.BytesIO(draw(short))).size == Image.open(io.BytesIO(draw(schedules))).size


def test_a_dry_run_checks_that_the_catalog_has_what_is_asked_for(catalog: str, tmp_path: Path) -> None:
    arguments = ["--data.catalog", catalog, "--run.out", str(tmp_path), "--data.tile_size", "64"]
    lines = list(describe(read_config("debug", [*arguments, "--data.mpp", "{0.5: 1, 1.0: 1}"])))
    at = next(i for i, line in enumerate(lines) if line.startswith("catalog"))
    assert lines[at].endswith("its 3 slides give 64 px tiles at 0.5, 1 µm/px")
    assert [line.strip() for line in lines[at + 1 :]] == [
        "0.5 µm/px: 50% of the tiles, from 3 slides of 3 patients",
        "1 µm/px: 50% of the tiles, from 3 slides of 3 patients",
    ]
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[at - 2 : at]}
    assert told["anywhere"].endswith("blocks, as is set")
    assert told["blocks"] == "a tile costs 1.00 requests for 1.00 blocks"
    with pytest.raises(PlanError, match="64"):
        list(describe(read_config("debug", [*arguments, "--data.mpp", "{64.0: 1}"])))
    # The made slides have 0.25 µm/px: twice finer may be made up from them, four times may not.
    assert list(describe(read_config("debug", [*arguments, "--data.mpp", "{0.125: 1}"])))
    with pytest.raises(PlanError, match=r"0\.0625"):
        list(describe(read_config("debug", [*arguments, "--data.mpp", "{0.0625: 1}"])))


def test_a_dry_run_tells_which_slides_serve_none_and_why(slides: list[Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare.svs"
    write_slide(SyntheticSlide(width=2048, height=1536, patient=1, downsamples=(1, 4), write_mpp=False), bare)
    catalog = write_catalog(tmp_path / "catalog", [slides[0], bare], mpp=8.4)
    arguments = ["--data.catalog", catalog, "--run.out", str(tmp_path / "run"), "--data.tile_size", "64"]
    lines = list(describe(read_config("debug", [*arguments, "--data.mpp", "{0.5: 1, 1.0: 3}"])))
    assert "              0.5 µm/px: 25% of the tiles, from 1 slides of 1 patients" in lines
    assert f"              serves none: {bare}: too coarse, 8.4 µm/px" in lines


def test_a_run_that_has_begun_tells_the_time_that_is_left_and_its_cost(tmp_path: Path) -> None:
    config = read_config("debug", ["--run.out", str(tmp_path), "--train.steps", "3610", "--train.batch", "100"])
    assert any(line.startswith("time          not known before it runs") for line in describe(config))
    pq.write_table(pa.table({"step": [5.0, 10.0], "tiles_per_s": [50.0, 50.0]}), tmp_path / "metrics.parquet")
    prices = read_prices(str(Path(__file__).parents[3] / "deploy/prices.yaml"))
    (line,) = (line for line in describe(config, prices=prices) if line.startswith("time"))
    assert "2.0 h for 3,600 steps more, at the 50 tiles/s" in line
    on_gpus = replace(config, train=replace(config.train, gpu=True))
    (line,) = (line for line in describe(on_gpus, prices=prices) if line.startswith("time"))
    assert line.endswith(": 8 USD of GPUs")
