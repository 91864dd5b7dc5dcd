"""The loss on patients held out: what it looks at, and that looking changes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from streaming.catalog import Catalog
from streaming.errors import ConfigError
from tests.trainer.run.test_resume import assert_equal_states, tiny
from trainer.recipe.losses import LossConfig
from trainer.run import checkpoints
from trainer.run.config import Config
from trainer.run.data import make_plan
from trainer.run.dry_run import describe
from trainer.run.fit import make_module
from trainer.run.train import train
from trainer.run.validation import Validation, held_out_stream

HELD = ("--watch.validation_slides", "0.34", "--watch.validation_tiles", "6")


def held(catalog: str, out: Path, *overrides: str) -> Config:
    """Four steps on two patients of three."""
    return tiny(catalog, out, "--train.steps", "4", *HELD, *overrides)


def test_a_run_follows_the_loss_of_patients_that_it_never_trains_on(catalog: str, tmp_path: Path) -> None:
    config = held(catalog, tmp_path / "run", "--watch.validation_every", "2")
    train(config, debug=True)
    rows = pq.read_table(tmp_path / "run/metrics.parquet").to_pylist()
    names = {f"validation_{name}" for name in ("loss", "dino_global", "dino_local", "ibot", "koleo")}
    for row in rows:
        found = {name for name in row if name.startswith("validation_") and row[name] is not None}
        assert found == (names if row["step"] % 2 == 0 else set())
    loaded = Catalog.load(catalog)
    trained = make_plan(config.data, config.run.seed, loaded, config.held_out).slides_of(np.arange(500))
    apart = held_out_stream(config, loaded).plan.slides_of(np.arange(500))
    assert len(set(trained.tolist())) == 2
    assert not set(trained.tolist()) & set(apart.tolist())
    assert any(line.startswith("held out      1 slides of 1 patients") for line in describe(config))


def test_looking_more_often_changes_nothing_of_what_is_trained(catalog: str, tmp_path: Path) -> None:
    states: list[dict[str, Any]] = []
    for every in (1, 4):
        config = held(
            *(catalog, tmp_path / str(every), "--watch.validation_every", str(every)),
            *("--model.drop_path", "0.4", "--loss.centring", "centring"),
        )
        train(config, debug=True)
        states.append(checkpoints.load(checkpoints.checkpoint_uri(config.run.out, 4)))
    assert_equal_states(*states)


def test_validation_terms_are_those_of_a_step_without_stochastic_depth(catalog: str, tmp_path: Path) -> None:
    config = held(catalog, tmp_path / "run", "--model.drop_path", "0")
    module = make_module(config)
    (first, second) = (Validation(config, rank) for rank in (0, 0))
    terms = first.terms(module, lambda mean: mean[None])
    assert terms == second.terms(module, lambda mean: mean[None])
    # Six tiles, in whole micro-batches of four: eight.
    assert [batch["index"].tolist() for batch in first.batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    inputs = [module.step_input(module.drawn(batch)) for batch in first.batches]
    expected = torch.stack([module.training_step(one, 0).detach() for one in inputs]).mean()
    assert terms["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)
    dropping = make_module(replace(config, model=replace(config.model, drop_path=0.5), loss=LossConfig()))
    assert first.terms(dropping, lambda mean: mean[None])["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert dropping.training


def test_ranks_share_the_tiles_of_one(catalog: str, tmp_path: Path) -> None:
    one = Validation(held(catalog, tmp_path / "run"), 0)
    two = held(catalog, tmp_path / "run", "--train.ranks", "2", "--mask.group_size", "2")
    parts = [Validation(two, rank) for rank in range(2)]
    turns = [batch["index"] for turn in zip(*(part.batches for part in parts), strict=True) for batch in turn]
    assert torch.equal(torch.cat(turns), torch.cat([batch["index"] for batch in one.batches]))


def test_a_share_that_is_nobody_s_is_refused_before_anything_starts(catalog: str, tmp_path: Path) -> None:
    config = tiny(catalog, tmp_path / "run", "--watch.validation_slides", "0.1", "--watch.validation_every", "1")
    with pytest.raises(ConfigError, match=r"0\.1 of 3 slides of 3 patients would hold nobody out; raise it"):
        train(config, debug=True)
    assert not (tmp_path / "run").exists()
