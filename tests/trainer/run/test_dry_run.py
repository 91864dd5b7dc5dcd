"""The dry run: what a preset needs, without memory for its model."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streaming.errors import PlanError
from trainer.cli import main
from trainer.recipe.schedule import Schedules
from trainer.run.config import read_config
from trainer.run.dry_run import PICTURE, describe, draw, memory, model_size
from trainer.run.fit import make_module


def test_a_dry_run_of_the_largest_preset_tells_its_size_steps_and_curves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--run.out", str(tmp_path), "--train.ranks", "[16,32]"]
    assert main(["train", "midnight-12k", "--dry-run", *options]) == 0
    told = capsys.readouterr().out
    # ViT-g/14 as published, 1,134,771,712 with the 1,536 of timm's missing mask token and positions of 37×37 patches.
    backbone = int(told.split("\nstudent ")[1].split()[0].replace(",", ""))
    assert 1_130_000_000 < backbone < 1_140_000_000
    assert "500,000 optimiser steps of 768 tiles: 32 ranks × 12 tiles × 2 rounds, fsdp\n" in told
    assert "\n              or 16 ranks × 12 tiles × 4 rounds, fsdp, where there is no room for more\n" in told
    assert "384,000,000 of 256 px" in told
    assert "not checked" in told
    assert "vit_giant_patch14_dinov2.lvd142m: its names and shapes fit" in told
    picture = np.asarray(Image.open(tmp_path / PICTURE).convert("RGB"))
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


def test_curves_are_drawn_for_one_step_too() -> None:
    optim = read_config("debug", []).optim
    schedules, short = Schedules(optim, 60, 32), Schedules(replace(optim, warmup_steps=0), 1, 32)
    assert Image.open(io.BytesIO(draw(short))).size == Image.open(io.BytesIO(draw(schedules))).size


def test_a_dry_run_checks_that_the_catalog_has_what_is_asked_for(catalog: str, tmp_path: Path) -> None:
    arguments = ["--data.catalog", catalog, "--run.out", str(tmp_path), "--data.tile_size", "64"]
    lines = list(describe(read_config("debug", [*arguments, "--data.mpp", "{0.5: 1, 1.0: 1}"])))
    assert lines[-1].endswith("its 3 slides give 64 px tiles at 0.5, 1 µm/px")
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[-3:]}
    assert told["anywhere"].endswith("blocks, as is set")
    assert told["blocks"] == "a tile costs 1.00 requests for 1.00 blocks"
    with pytest.raises(PlanError, match="64"):
        list(describe(read_config("debug", [*arguments, "--data.mpp", "{64.0: 1}"])))
    # The made slides have 0.25 µm/px: twice finer may be made up from them, four times may not.
    assert list(describe(read_config("debug", [*arguments, "--data.mpp", "{0.125: 1}"])))
    with pytest.raises(PlanError, match=r"0\.0625"):
        list(describe(read_config("debug", [*arguments, "--data.mpp", "{0.0625: 1}"])))
