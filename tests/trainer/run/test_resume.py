"""Resuming: after a kill, after SIGTERM, past damage; and stopping when the run breaks down."""

import math
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from streaming.catalog import Catalog
from streaming.errors import TilestreamError, TrainingError
from tests.processes import TILESTREAM, wait_for
from trainer.evaluate.knn_watch import KnnWatch
from trainer.recipe.module import DinoModule
from trainer.run import checkpoints
from trainer.run.config import Config, read_config
from trainer.run.resuming import resume_point
from trainer.run.train import train

TINY = [
    *("--train.batch", "4", "--train.log_every", "1", "--optim.warmup_steps", "2", "--data.tile_size", "64"),
    *("--data.mpp", "{1.0: 1}", "--augment.global_size", "32", "--augment.local_size", "16"),
    *("--augment.num_local", "2", "--model.num_prototypes", "32", "--model.head_hidden", "16"),
    *("--model.head_bottleneck", "8", "--train.steps", "20", "--train.checkpoint_every", "10"),
]


def tiny(catalog: str, out: Path, *overrides: str) -> Config:
    return read_config("debug", [*TINY, "--data.catalog", catalog, "--run.out", str(out), *overrides])


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, inner in pairs for key, leaf in flat(inner, f"{prefix}/{name}").items()}
    return {prefix: value}


def assert_equal_states(one: dict[str, Any], two: dict[str, Any]) -> None:
    for part in ("state_dict", "optimizer_states"):
        first, second = flat(one[part]), flat(two[part])
        assert first.keys() == second.keys()
        for key, value in first.items():
            equal = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
            assert equal, key


def logged(out: Path) -> list[dict[str, float]]:
    """The rows of a run without what depends on the machine's speed, and counts that begin with the process."""
    timed = ("time", "tiles_per_s", "data_wait_share", "peak_memory_gb", "filtered", "failed")
    rows = pq.read_table(out / "metrics.parquet").to_pylist()
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("few_kernels", ["false", "true"])
def test_twenty_steps_equal_ten_a_kill_and_ten_more_bit_for_bit(
    few_kernels: str, catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    form = ("--train.few_kernels", few_kernels, "--model.drop_path", "0.4")
    arguments = ["train", "debug", "--debug", *TINY, *form, "--data.catalog", catalog, "--run.out", str(killed)]
    running = subprocess.Popen([*TILESTREAM, *arguments], stderr=subprocess.DEVNULL)
    try:
        train(tiny(catalog, whole, *form), debug=True)
        wait_for(lambda: checkpoints.steps_of(str(killed)), running)
    finally:
        running.kill()  # SIGKILL
        running.wait()
    last = Path(checkpoints.checkpoint_uri(str(killed), 20), checkpoints.META)
    last.unlink(missing_ok=True)  # on a fast machine the kill may come late
    note = Path(checkpoints.checkpoint_uri(str(killed), 10), checkpoints.META)
    note.write_text(note.read_text().replace('"opencv": "', '"opencv": "1.'))
    assert "pixels may differ" not in capsys.readouterr().err
    assert train(tiny(catalog, killed, *form), debug=True).start == 10
    (told,) = (line for line in capsys.readouterr().err.splitlines() if "pixels may differ" in line)
    assert "step-00000010 was trained with opencv 1." in told
    one, two = (checkpoints.load(checkpoints.checkpoint_uri(str(out), 20)) for out in (whole, killed))
    assert_equal_states(one, two)
    rows = logged(whole)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert logged(killed) == rows


def test_sigterm_saves_the_step_and_leaves_and_the_run_goes_on_from_there(catalog: str, tmp_path: Path) -> None:
    config = tiny(catalog, tmp_path / "run", "--train.steps", "400", "--train.checkpoint_every", "400")
    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        wait_for(lambda: signal.getsignal(signal.SIGTERM) is not before)
        time.sleep(0.5)  # some steps
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    stopped = train(config, debug=True)
    assert signal.getsignal(signal.SIGTERM) is before
    assert 0 < stopped.steps < 400
    checkpoints.verify(stopped.checkpoint)
    assert [row["step"] for row in logged(tmp_path / "run")] == list(range(1, stopped.steps + 1))
    longer = replace(config, train=replace(config.train, steps=stopped.steps + 1))
    assert train(longer, debug=True, force=True).start == stopped.steps


def test_a_run_that_has_ended_goes_on_to_more_steps_and_says_what_becomes_of_its_schedules(
    catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, short = tmp_path / "run", ("--train.checkpoint_every", "2", "--optim.warmup_steps", "0")
    train(tiny(catalog, out, *short, "--train.steps", "4"), debug=True)
    with pytest.raises(TilestreamError, match=r"another recipe: augment\.hue 0\.1 \(now 0\.2\)"):
        train(tiny(catalog, out, *short, "--train.steps", "6", "--augment.hue", "0.2"), debug=True)
    capsys.readouterr()
    assert train(tiny(catalog, out, *short, "--train.steps", "6"), debug=True).start == 4
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "have become" in line)
    rates = [row["lr"] for row in logged(out)]
    assert line.startswith("train: 4 steps have become 6, and from step 5 on schedules go over 6: ")
    assert f"learning rate {rates[3]:.3g} before, {rates[4]:.3g} now" in line
    top, low = rates[0], 1e-6  # of which the cosines are
    assert rates[4] == pytest.approx(low + (top - low) * (1 + math.cos(math.pi * 4 / 6)) / 2, rel=1e-5)
    assert rates[4] < rates[1]
    # Half way it is another recipe.
    for uri in (checkpoints.checkpoint_uri(str(out), step) for step in (6,)):
        Path(uri, checkpoints.META).unlink()
    with pytest.raises(TilestreamError, match=r"train\.steps 4 \(now 3\)"):
        resume_point(tiny(catalog, out, *short, "--train.steps", "3"), Catalog.load(catalog).fingerprint)


def test_checkpoints_come_by_minutes_too(catalog: str, tmp_path: Path) -> None:
    overrides = ("--train.steps", "3", "--train.checkpoint_every", "100", "--train.checkpoint_minutes", "1e-9")
    train(tiny(catalog, tmp_path / "run", *overrides), debug=True)
    assert checkpoints.steps_of(str(tmp_path / "run")) == [1, 2, 3]


@pytest.mark.parametrize("few_kernels", ["false", "true"])
def test_a_run_goes_on_before_a_damaged_checkpoint_and_writes_it_anew(
    few_kernels: str, catalog: str, tmp_path: Path
) -> None:
    out, short = tmp_path / "run", ("--train.steps", "4", "--train.checkpoint_every", "2")
    config = tiny(catalog, out, *short, "--train.few_kernels", few_kernels)
    train(config, debug=True)
    undisturbed = checkpoints.load(checkpoints.checkpoint_uri(str(out), 4))
    with Path(checkpoints.checkpoint_uri(str(out), 4), checkpoints.STATE).open("r+b") as state:
        state.truncate(1000)
    assert train(config, debug=True).start == 2
    assert_equal_states(checkpoints.load(checkpoints.checkpoint_uri(str(out), 4)), undisturbed)


def test_following_knn_accuracy_changes_no_weight(catalog: str, coloured: Path, tmp_path: Path) -> None:
    short = ("--train.steps", "4", "--train.checkpoint_every", "4")
    train(tiny(catalog, tmp_path / "plain", *short), debug=True)
    follow = ("--watch.knn_dataset", str(coloured), "--watch.knn_every", "2", "--watch.knn_k", "3")
    train(tiny(catalog, tmp_path / "followed", *short, *follow), KnnWatch, debug=True)
    states = [checkpoints.load(checkpoints.checkpoint_uri(str(tmp_path / name), 4)) for name in ("plain", "followed")]
    assert_equal_states(*states)
    accuracy = [row["knn_accuracy"] for row in logged(tmp_path / "followed")]
    assert [value is None for value in accuracy] == [True, False, True, False]
    assert accuracy[-1] == 1.0, "any network tells two colours apart"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--watch.knn_dataset", "nowhere.csv"), "nowhere.csv"),
        (("--watch.knn_tiles", "47"), "48 tiles"),
        (("--watch.knn_every", "3", "--train.log_every", "2"), "no multiple of train.log_every"),
    ],
)
def test_labelled_tiles_that_can_not_be_followed_are_refused_before_training(
    wrong: tuple[str, ...], told: str, catalog: str, coloured: Path, tmp_path: Path
) -> None:
    follow = ("--watch.knn_dataset", str(coloured), "--watch.knn_every", "2")
    with pytest.raises(TilestreamError, match=told):
        train(tiny(catalog, tmp_path / "run", *follow, *wrong), KnnWatch, debug=True)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_good_checkpoint(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DinoModule.training_step

    def poisoned(self: DinoModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == 4 else loss

    monkeypatch.setattr(DinoModule, "training_step", poisoned)
    overrides = ("--train.steps", "8", "--train.checkpoint_every", "2", "--train.log_every", "3")
    with pytest.raises(TrainingError) as caught:
        train(tiny(catalog, tmp_path / "run", *overrides), debug=True)
    # The loss turns NaN in step 5: the checkpoint at 6 must not be written.
    good = checkpoints.checkpoint_uri(str(tmp_path / "run"), 4)
    assert "step 6: loss, dino_global, dino_local not finite" in str(caught.value)
    assert good in str(caught.value)
    assert checkpoints.steps_of(str(tmp_path / "run")) == [2, 4]
    (log,) = (tmp_path / "run/logs").glob("failed-*.log")
    assert "_break_down" in log.read_text(), "a traceback"
    # Whatever starts it again, as it would after a lost machine, is told so before anything is trained.
    with pytest.raises(TrainingError, match=r"STOPPED: .* --force\. It was: .*step 6: loss, "):
        train(tiny(catalog, tmp_path / "run", *overrides), debug=True)
    monkeypatch.undo()
    assert train(tiny(catalog, tmp_path / "run", *overrides), debug=True, force=True).start == 4
    assert not (tmp_path / "run/STOPPED").exists()


def test_a_recipe_that_collapses_stops_the_run(catalog: str, tmp_path: Path) -> None:
    # Sharp targets without centring, of a teacher that is the student itself: all tiles soon take one prototype.
    broken = ("--loss.centring", "centring", "--loss.centre_momentum", "0.9999", "--optim.momentum", "0")
    broken += ("--optim.teacher_temp_start", "0.04", "--optim.teacher_temp", "0.04", "--optim.base_lr", "0.05")
    limits = ("--watch.grace_steps", "2", "--watch.patience", "2", "--loss.koleo_weight", "0")
    with pytest.raises(TrainingError, match=r"collapsed: (prototype_perplexity|teacher_entropy) \S+, not above"):
        train(tiny(catalog, tmp_path / "run", *broken, *limits), debug=True)
    rows = logged(tmp_path / "run")
    assert rows[0]["teacher_entropy"] > 0.1
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.long
def test_post_training_at_a_higher_resolution_goes_on_from_a_checkpoint_with_its_heads(
    catalog: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    short = ("--train.steps", "2", "--train.checkpoint_every", "1")
    train(tiny(catalog, first, *short, "--augment.global_size", "64", "--augment.local_size", "32"), debug=True)
    warm = ("--optim.momentum", "0.9995", "--optim.warmup_steps", "0")
    warm += ("--optim.teacher_temp_start", "0.07", "--optim.teacher_temp", "0.07")
    larger = ("--augment.global_size", "112", "--augment.local_size", "48", "--data.tile_size", "128")
    overrides = [
        *short,
        *warm,
        *larger,
        "--data.mpp",
        "{0.5: 1}",
        "--model.init",
        str(first),
        "--optim.base_lr",
        "1e-12",
    ]
    train(tiny(catalog, second, *overrides), debug=True)
    before = checkpoints.load(checkpoints.checkpoint_uri(str(first), 2))["state_dict"]
    after = checkpoints.load(checkpoints.checkpoint_uri(str(second), 2))["state_dict"]
    positions = "student.backbone.vit.pos_embed"
    assert before[positions].shape[1] == 1 + 4 * 4
    assert after[positions].shape[1] == 1 + 7 * 7
    for key in before.keys() - {positions, positions.replace("student", "teacher")}:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6, msg=key)
    rows = logged(second)
    assert rows[0]["momentum"] == pytest.approx(0.9995)
    assert rows[0]["teacher_temp"] == pytest.approx(0.07)
