"""Training in one process (`--debug`): the whole loop without Ray."""

import gc
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streaming.catalog import Catalog
from streaming.errors import CheckpointError, ConfigError, StreamError, root_cause
from streaming.plan.list_writing import drawn_tiles, write_list
from trainer.run import after_step, checkpoints
from trainer.run.config import Config, read_config
from trainer.run.fit import make_module
from trainer.run.step_batches import StepBatches
from trainer.run.train import train

SMALL = [
    *("--train.batch", "4", "--train.log_every", "1", "--optim.warmup_steps", "2", "--data.tile_size", "64"),
    *(
        "--data.mpp",
        "{1.0: 1}",
        "--augment.global_size",
        "32",
        "--augment.local_size",
        "16",
        "--augment.num_local",
        "2",
    ),
    *("--model.num_prototypes", "32", "--model.head_hidden", "16", "--model.head_bottleneck", "8"),
]


@pytest.fixture
def config(catalog: str, tmp_path: Path) -> Config:
    return read_config("debug", [*SMALL, "--data.catalog", catalog, "--run.out", str(tmp_path / "run")])


def steps(config: Config, total: int, *, every: int, out: Path) -> Config:
    run, settings = replace(config.run, out=str(out)), replace(config.train, steps=total, checkpoint_every=every)
    return replace(config, run=run, train=settings)


def state(out: Path, step: int) -> dict:
    return checkpoints.load(checkpoints.checkpoint_uri(str(out), step))


def test_a_resumed_run_ends_with_the_very_weights_of_an_undisturbed_one(config: Config, tmp_path: Path) -> None:
    whole = steps(config, 6, every=3, out=tmp_path / "whole")
    train(whole, debug=True)
    halves = steps(config, 6, every=3, out=tmp_path / "halves")
    # The first half is the undisturbed run's own third step: all that a killed run leaves behind.
    source = Path(checkpoints.checkpoint_uri(str(tmp_path / "whole"), 3))
    target = Path(checkpoints.checkpoint_uri(str(tmp_path / "halves"), 3))
    target.parent.mkdir(parents=True)
    source.rename(target)
    assert train(halves, debug=True).start == 3
    one, two = state(tmp_path / "whole", 6), state(tmp_path / "halves", 6)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, weight in one["state_dict"].items():
        assert torch.equal(weight, two["state_dict"][key]), key


def test_a_run_says_where_its_catalog_lies_wherever_one_looks_at_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.data.catalog is not None
    catalog = Path(config.data.catalog)
    monkeypatch.chdir(catalog.parent)
    beside = replace(config, data=replace(config.data, catalog=catalog.name))
    train(steps(beside, 1, every=1, out=tmp_path / "run"), debug=True)
    assert checkpoints.read_config(str(tmp_path / "run")).data.catalog == str(catalog)


def test_training_moves_the_student_and_the_teacher_follows_it(config: Config, tmp_path: Path) -> None:
    run = steps(config, 2, every=2, out=tmp_path / "run")
    train(run, debug=True)
    before, after = make_module(run).state_dict(), state(tmp_path / "run", 2)["state_dict"]
    key = "backbone.vit.blocks.0.attn.qkv.weight"
    student, teacher, start = after[f"student.{key}"], after[f"teacher.{key}"], before[f"teacher.{key}"]
    assert not torch.equal(student, start)
    assert 0 < (teacher - start).norm() < (student - start).norm()


def test_a_batch_job_of_slurm_is_not_taken_for_ranks(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert train(steps(config, 2, every=2, out=tmp_path / "run"), debug=True).steps == 2


def test_student_and_teacher_start_equal_and_share_no_storage(config: Config) -> None:
    module = make_module(config)
    students, teachers = dict(module.student.named_parameters()), dict(module.teacher.named_parameters())
    assert students.keys() == teachers.keys()
    for name, student in students.items():
        assert torch.equal(student, teachers[name])
        assert student.data_ptr() != teachers[name].data_ptr()
        assert not teachers[name].requires_grad


def test_the_teacher_is_the_moving_average_of_the_formula(config: Config) -> None:
    module = make_module(config)
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    wanted = [0.9 * t + 0.1 * s for t, s in zip(module.teacher.parameters(), module.student.parameters(), strict=True)]
    module.update_teacher(0.9)
    for parameter, value in zip(module.teacher.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter, value)


def test_a_finished_run_is_left_alone(config: Config, tmp_path: Path) -> None:
    run = steps(config, 2, every=2, out=tmp_path / "run")
    train(run, debug=True)
    state_file = Path(checkpoints.checkpoint_uri(str(tmp_path / "run"), 2), checkpoints.STATE)
    written = state_file.stat().st_mtime_ns
    assert "already" in train(run, debug=True).summary[0]
    assert state_file.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--model.num_prototypes", "64"], "num_prototypes 32 .now 64"),
        (["--model.backbone", "vit_small_patch16_224"], r"backbone vit_tiny_patch16_224 \(now vit_small_patch16_224"),
        (["--train.batch", "8"], "batch 4 .now 8"),
        (["--augment.hue", "0.2"], r"augment.hue 0.1 \(now 0.2\).*--force"),
        (["--data.mpp", "{0.5: 1}"], r"data.mpp.1.0 1.0 \(now None\)"),
        (["--data.catalog", "OTHER"], r"the content of the catalog"),
    ],
)
def test_a_run_does_not_go_on_with_what_does_not_fit_it(
    config: Config, other_catalog: str, tmp_path: Path, overrides: list[str], named: str
) -> None:
    out = tmp_path / "run"
    train(steps(config, 2, every=2, out=out), debug=True)
    overrides = ["--train.steps", "2", *overrides]
    overrides = [other_catalog if word == "OTHER" else word for word in overrides]
    arguments = [*SMALL, "--data.catalog", config.data.catalog or "", "--run.out", str(out), *overrides]
    with pytest.raises(CheckpointError, match=named) as caught:
        train(read_config("debug", arguments), debug=True)
    assert "\n" not in str(caught.value)


def test_a_run_on_a_list_goes_on_with_the_same_list_wherever_it_lies_and_with_no_other(
    config: Config, tmp_path: Path
) -> None:
    plan = config.stream(Catalog.load(config.data.catalog or "")).plan
    places = [tmp_path / f"{name}.parquet" for name in ("list", "moved", "other")]
    for path, num in zip(places, (40, 40, 41), strict=True):
        write_list(str(path), drawn_tiles(plan, num), None)
    first, moved, other = (
        replace(steps(config, 2, every=2, out=tmp_path / "run"), data=replace(config.data, tiles=str(path)))
        for path in places
    )
    train(first, debug=True)
    assert "already" in train(moved, debug=True).summary[0]
    for run in (other, replace(first, data=config.data)):
        with pytest.raises(CheckpointError, match=r"the content of the catalog, or of data\.tiles"):
            train(run, debug=True)
    meta = checkpoints.read_meta(checkpoints.checkpoint_uri(str(tmp_path / "run"), 2))
    assert {value for source in meta.sources for value in source.mpp} == {1.0}


def test_debugging_several_ranks_is_refused(config: Config) -> None:
    run = replace(config, train=replace(config.train, ranks=2), mask=replace(config.mask, group_size=2))
    with pytest.raises(ConfigError, match=r"--train\.ranks 1"):
        train(run, debug=True)


def test_a_stream_that_gives_other_indices_than_the_step_s_stops_the_run(config: Config) -> None:
    stream = config.stream(Catalog.load(config.data.catalog or ""))
    batches = StepBatches(stream.local_batches(3, 4), 2, config)
    with pytest.raises(StreamError, match="step 2 was given 4 indices from 12 to 15, not 4 of 8 to 11"):
        next(iter(batches))


def test_errors_survive_the_way_through_ray() -> None:
    error = pickle.loads(pickle.dumps(StreamError("s3://b/a.svs: what and why")))
    outer = RuntimeError("wrapped")
    outer.__cause__ = error
    assert root_cause(outer) is error


def test_garbage_is_looked_for_at_steps_that_all_ranks_know_and_nowhere_else(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(after_step, "_COLLECT_EVERY", 2)
    looked = list[int]()

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and not gc.isenabled():
            looked.append(info["generation"])

    gc.callbacks.append(note)
    try:
        train(steps(config, 5, every=5, out=tmp_path / "run"), debug=True)
    finally:
        gc.callbacks.remove(note)
    assert looked == [2, 2], "all of it, after the second and the fourth step"
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
