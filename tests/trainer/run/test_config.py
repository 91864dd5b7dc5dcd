from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest
import yaml

from streaming.errors import ConfigError
from trainer.configs import presets
from trainer.recipe.flops import step_flops
from trainer.recipe.schedule import Schedules
from trainer.run.config import Config, leaves, parse_config, read_config
from trainer.run.execution import TrainConfig
from trainer.run.fit import check_model
from trainer.run.fitted import fitted
from trainer.run.guard import WatchConfig
from trainer.run.resuming import recipe_changes


@pytest.mark.parametrize("preset", presets())
def test_every_preset_resolves_and_survives_a_round_trip_through_yaml(preset: str) -> None:
    config = read_config(preset, [])
    assert parse_config(yaml.safe_load(config.to_yaml()), []) == config


def test_an_override_sets_any_field_and_leaves_the_others() -> None:
    base = read_config("debug", [])
    changed = read_config(
        "debug", ["--optim.base_lr", "1e-4", "--data.readers", "[1, 3]", "--data.hsv_rule.min_share=0"]
    )
    assert changed.optim.base_lr == 1e-4
    assert changed.data.readers == (1, 3)
    assert changed.data.hsv_rule.min_share == 0
    assert changed.model == base.model
    assert changed.train == base.train


def test_a_yaml_file_takes_the_place_of_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("optim: {base_lr: 1e-4}\ntrain: {steps: 200}\ndata: {mpp: {0.5: 2, 1.0: 1}}\n")
    config = read_config(str(path), [])
    assert config.optim.base_lr == 1e-4  # PyYAML alone would read a string here
    assert config.train.steps == 200
    assert config.data.mpp == {0.5: 2, 1.0: 1}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--train.bach", "10"], ["train.bach", "train.batch"]),
        (["--data.katalog=x"], ["data.katalog", "data.catalog"]),
        (["--train.batch", "many"], ["train.batch is 'many'; give a whole number"]),
        (["--train.gpu", "maybe"], ["train.gpu is 'maybe'; give true or false"]),
        (["--train.ranks", "some"], ["give a whole number, or a list of 2, [a, b], each a whole number"]),
        (["--model.ffn", "relu"], ["model.ffn is 'relu'; give one of mlp, swiglu, or null"]),
        (["--run.loggers", "[tensorbord]"], ["'tensorbord'; give a list", "csv, tensorboard, wandb, mlflow"]),
        (["--train.rank_labels", "a"], ["train.rank_labels is 'a'; give a map"]),
        (["--train.batch", "10", "--train.ranks", "4"], ["batch 10", "4 ranks", "8 or 12"]),
        (["--train.batch", "64", "--train.ranks", "[3,8]"], ["[3, 8]", "batch of 64", "4, 8 can"]),
        (["--train.batch", "64", "--train.ranks", "[8,4]"], ["(8, 4)", "the least first"]),
        (["--train.batch", "64", "--train.ranks", "[0,4]"], ["(0, 4)", "at least 1"]),
        (["--train.ranks", "[1,2]", "--train.rank_labels", "{role: trainer}"], ["[1, 2]", "rank_resources"]),
        (["--train.batch", "64", "--train.ranks", "[4,8]", "--train.max_micro_batch", "4"], ["max_micro_batch", "8"]),
        (["--data.stall_s", "1200"], ["collective_minutes 20", "data.stall_s 1200"]),
        (["--train.collective_minutes", "0"], ["collective_minutes"]),
        (["--train.steps", "0"], ["steps"]),
        (["--train.rank_cpus", "-1"], ["rank_cpus is -1.0"]),
        (["--data.hsv_rule.min_share", "3"], ["min_share", "3"]),
        (["--data.max_failed_share", "2"], ["max_failed_share"]),
        (["--data.universe.slides", "2"], ["universe.slides"]),
        (["--data.universe.replacement", "false"], ["universe.tiles_per_slide"]),
        (["--data.requests_in_flight", "0"], ["requests_in_flight"]),
        (["--augment.global_scale", "[0.9, 0.1]"], ["global_scale"]),
        (["--optim.schedule_steps", "59"], ["schedule_steps 59", "60 steps"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_override_is_told_in_one_line_with_its_name(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config("debug", overrides)
    assert "\n" not in str(caught.value)
    for part in named:
        assert part in str(caught.value)


def test_whatever_type_a_field_has_a_wrong_value_is_told_without_python_s_words_for_it() -> None:
    one_of_each = {str(leaf.kind): leaf for leaf in leaves() if str not in (leaf.kind, *get_args(leaf.kind))}
    assert len(one_of_each) > 10
    for leaf in one_of_each.values():
        with pytest.raises(ConfigError) as caught:
            read_config("debug", [f"--{leaf.key}", "-, ["])
        told = str(caught.value)
        assert leaf.key in told, told
        assert not any(word in told for word in ("<class", "typing", "Parser", "Union")), told


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {stepz: 5}", ["train.stepz", "train.steps"]),
        ("trian: {steps: 5}", ["trian.steps", "train.steps"]),
        ("train: 5", ["train"]),
        ("- a\n- b", ["sections"]),
        ("a: [", ["YAML"]),
        (b"run: \xff", ["YAML", "byte 5"]),
    ],
)
def test_a_wrong_file_is_told_in_one_line_with_its_path(tmp_path: Path, text: str | bytes, named: list[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        read_config(str(path), [])
    assert "\n" not in str(caught.value)
    for part in [str(path), *named]:
        assert part in str(caught.value)


def test_an_unknown_preset_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"vitg99.*debug.*vits14"):
        read_config("vitg99", [])


def test_defaults_alone_make_a_configuration() -> None:
    assert Config().train == TrainConfig()


def test_only_what_changes_the_training_counts_as_another_recipe() -> None:
    base = read_config("debug", [])
    free = ["--run.out", "x", "--data.readers", "[1, 3]", "--train.ranks", "2", "--watch.patience", "9"]
    assert recipe_changes(base, read_config("debug", [*free, "--train.strategy", "fsdp"])) == ([], [])
    forced, fixed = recipe_changes(base, read_config("debug", ["--train.steps", "90", "--model.head_hidden", "256"]))
    assert forced == ["train.steps 60 (now 90)"]
    assert fixed == ["model.head_hidden 512 (now 256)"]


def test_another_strategy_is_another_recipe_in_bfloat16_alone() -> None:
    for precision, changed in (("32-true", []), ("bf16-mixed", ["train.strategy ddp (now fsdp)"])):
        ddp, fsdp = (
            read_config("debug", ["--train.precision", precision, "--train.strategy", strategy])
            for strategy in ("ddp", "fsdp")
        )
        assert recipe_changes(ddp, fsdp) == (changed, [])


def test_weights_in_bfloat16_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="bf16-true: weights and teacher would hardly move; take bf16-mixed"):
        check_model(read_config("debug", ["--train.precision", "bf16-true"]))


def test_groups_of_masks_that_do_not_fit_the_micro_batch_are_made_to_and_told() -> None:
    config, (line,) = fitted(read_config("debug", ["--train.batch", "12", "--train.ranks", "2"]))
    assert config.mask.group_size == 2
    assert line.startswith("mask.group_size 4 does not divide the 6 tiles of a micro-batch: taken as 2")
    assert fitted(config) == (config, [])


@pytest.mark.parametrize("preset", presets())
def test_two_steps_of_any_preset_are_a_training(preset: str) -> None:
    base = read_config(preset, [])
    config, lines = fitted(read_config(preset, ["--train.steps", "2"]))
    schedules = Schedules(config.optim, 2, config.train.batch)
    if base.optim.schedule_steps:  # the first two of many: so it was asked for
        assert lines == []
        return
    assert any("optim.warmup_steps" in line for line in lines) == (base.optim.warmup_steps > 2)
    values = [schedules.at(step) for step in range(2)]
    assert all(value.last_layer_lr == value.lr > 0 for value in values)


def test_steps_follow_from_floating_point_operations() -> None:
    base = read_config("debug", [])
    of_step = step_flops(base.recipe, base.train.batch).total
    config, (line,) = fitted(read_config("debug", ["--train.flops", str(70.5 * of_step)]))
    assert config.train.steps == 70
    assert line.startswith("train.flops ")
    assert "are 70 steps" in line
    for cut in (["--train.ranks", "2"], ["--train.accumulate", "4"]):
        assert fitted(read_config("debug", ["--train.flops", str(70.5 * of_step), *cut]))[0].train.steps == 70
    with pytest.raises(ConfigError, match=r"train\.flops 1e\+03: a step takes .*; raise it"):
        fitted(read_config("debug", ["--train.flops", "1e3"]))


def test_the_fields_that_are_free_are_those_that_do_not_change_what_is_trained() -> None:
    free = {leaf.key for leaf in leaves() if leaf.is_free}
    assert free == {
        "run.out",
        *(
            f"data.{name}"
            for name in ("catalog", "tiles", "storage_options", "max_failed_share", "readers", "reader_cpus")
        ),
        *(f"data.{name}" for name in ("reader_labels", "segment_minutes", "segment_blocks", "stall_s")),
        *(f"data.{name}" for name in ("staging", "staging_gb")),
        "data.requests_in_flight",
        "data.mirrors",
        "model.init",
        *(f"train.{name}" for name in ("ranks", "gpu", "rank_cpus", "rank_labels", "rank_resources", "strategy")),
        *(f"train.{name}" for name in ("ranks_per_stream", "max_micro_batch", "few_kernels", "collective_minutes")),
        *(f"train.{name}" for name in ("compile", "activation_checkpointing", "log_every", "checkpoint_every")),
        "train.shard_ranks",
        *(f"train.{name}" for name in ("checkpoint_minutes", "keep_checkpoints", "max_restarts")),
        *(f"watch.{name}" for name in asdict(WatchConfig()) if name != "validation_slides"),
    }


def test_dictionaries_of_any_section_take_keys_of_their_own() -> None:
    values = {
        "data": {"mpp": {0.5: 1}, "cohorts": {"a": 2}, "storage_options": {"anon": True}, "reader_labels": {"b": "c"}},
        "train": {"rank_labels": {"d": "e"}, "rank_resources": {"f": 1.0}},
    }
    config = parse_config(values, [])
    for section, entries in values.items():
        for name, value in entries.items():
            assert getattr(getattr(config, section), name) == value
