"""A step made again: the tiles, crops and losses that the run had, to the bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from streaming.errors import TrainingError
from streaming.slide import open_slide
from tests.trainer.run.test_resume import logged, tiny
from trainer.cli import main
from trainer.recipe.masks import Masks
from trainer.recipe.module import DinoModule
from trainer.run.config import Config
from trainer.run.replay import find_replay, train_again
from trainer.run.train import train

SEVEN = ("--train.steps", "7", "--train.checkpoint_every", "3", "--train.keep_checkpoints", "9")
TWO_ROUNDS = ("--train.accumulate", "2", "--mask.group_size", "2", "--model.drop_path", "0.4")
THREADS = ("--train.rank_cpus", str(torch.get_num_threads()))
UNTIMED = ("loss", "dino_global", "dino_local", "ibot", "koleo", "grad_norm_backbone", "teacher_entropy", "lr")


def again(config: Config, step: int) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    assert train_again(find_replay(config.run.out, step, config), rows.append) is None
    return rows


def test_losses_from_the_checkpoint_before_and_from_the_start_are_those_that_were_logged_to_the_bit(
    catalog: str, tmp_path: Path
) -> None:
    config = tiny(catalog, tmp_path / "run", *SEVEN, *TWO_ROUNDS, *THREADS)
    train(config, debug=True)
    files = sorted((tmp_path / "run").rglob("*"))
    wanted = {row["step"]: row for row in logged(tmp_path / "run")}
    for step, first in ((5, 4), (2, 1), (7, 7)):  # after the checkpoints of steps 3, none and 6
        rows = again(config, step)
        assert [row["step"] for row in rows] == list(range(first, step + 1))
        for row in rows:
            assert {name: row[name] for name in UNTIMED} == {name: wanted[row["step"]][name] for name in UNTIMED}
    assert sorted((tmp_path / "run").rglob("*")) == files


def test_the_command_writes_what_a_step_saw_and_its_losses_beside_the_logged_ones(
    catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    loss = DinoModule.loss

    def noting(self: DinoModule, crops: tuple[torch.Tensor, ...], masks: Masks, *rest: Any) -> object:
        seen.append((*crops, masks.hidden))
        return loss(self, crops, masks, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(DinoModule, "loss", noting)
    run = tmp_path / "run"
    train(tiny(catalog, run, *SEVEN, *TWO_ROUNDS, *THREADS), debug=True)
    assert main(["replay", str(run), "--step", "5", "--out", str(tmp_path / "again")]) == 0
    told = capsys.readouterr().out
    assert told.count("the same") >= 8, told
    assert "DIFFERENT" not in told
    tensors = load_file(tmp_path / "again/rank-00.safetensors")
    assert tensors["index"].tolist() == [16, 17, 18, 19]
    for name, rounds in zip(("global", "local", "mask"), zip(*seen[8:10], strict=True), strict=True):
        assert torch.equal(tensors[name], torch.cat(rounds, dim=1)), name
    with safe_open(tmp_path / "again/rank-00.safetensors", "pt") as file:
        slides = json.loads(file.metadata()["slides"])
    page = (tmp_path / "again/rank-00.html").read_text()
    for tile, slide, (x, y), mpp in zip(
        tensors["tile"], slides, tensors["corner"].tolist(), tensors["mpp"], strict=True
    ):
        assert np.array_equal(open_slide(slide).read_tile(x, y, float(mpp), 64), tile.numpy())
        assert f"{slide}, x {x}, y {y}, {mpp:g} µm/px" in page
    assert page.count("data:image/jpeg") == 4


def test_ranks_share_a_step_and_one_s_share_can_be_had_alone(catalog: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = tiny(catalog, run, *SEVEN, "--train.ranks", "2", "--mask.group_size", "1")
    (run / "config.yaml").write_text(config.to_yaml())
    assert main(["replay", str(run), "--step", "3", "--no-losses"]) == 0
    folder = run / "replay/step-00000003"
    found = [load_file(folder / f"rank-0{rank}.safetensors")["index"].tolist() for rank in range(2)]
    assert found == [[8, 9], [10, 11]]
    of_one = ["--step", "3", "--no-losses", "--only-ranks", "1", "--out", str(tmp_path / "b")]
    assert main(["replay", str(run), *of_one]) == 0
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["rank-01.html", "rank-01.safetensors"]


@pytest.mark.long
def test_two_ranks_train_again_without_ray_as_they_did_on_it(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # as users have it; Ray sets it for its ranks
    config = tiny(catalog, tmp_path / "run", *SEVEN, "--train.ranks", "2", "--mask.group_size", "1")
    train(config)
    rows, wanted = again(config, 5), {row["step"]: row for row in logged(tmp_path / "run")}
    assert [row["step"] for row in rows] == [4, 5]
    for row in rows:
        assert {name: row[name] for name in UNTIMED} == {name: wanted[row["step"]][name] for name in UNTIMED}


def test_a_run_that_stopped_for_a_nan_names_the_command_which_finds_its_first_step(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = DinoModule.training_step

    def poisoned(self: DinoModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == 4 else loss

    monkeypatch.setattr(DinoModule, "training_step", poisoned)
    config = tiny(catalog, tmp_path / "run", *SEVEN, "--train.log_every", "3")
    with pytest.raises(TrainingError) as caught:
        train(config, debug=True)
    command = str(caught.value).split("`")[1]
    assert command == f"tilestream replay {tmp_path / 'run'} --step 6"
    assert main([*command.split()[1:], "--out", str(tmp_path / "again")]) == 0
    told = capsys.readouterr().out
    assert "step 5: grad_norm_backbone" in told or "step 5: loss" in told, told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--step", "0"), "no step 0; its steps are 1 to 7"),
        (("--step", "8"), "no step 8; its steps are 1 to 7"),
        (("--step", "2", "--only-ranks", "1"), "no rank 1; its ranks are 0 to 0"),
        (("--step", "2", "--train.stepps", "1"), "no key 'train.stepps'"),
    ],
)
def test_what_a_run_has_not_is_refused(
    options: tuple[str, ...], told: str, catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(tiny(catalog, tmp_path, *SEVEN).to_yaml())
    assert main(["replay", str(tmp_path), *options, "--no-losses"]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "replay").exists()
