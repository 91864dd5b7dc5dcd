import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainer.recipe.backbone import create_backbone
from trainer.recipe.heads import DINOHead
from trainer.recipe.schedule import (
    OptimConfig,
    Schedules,
    cosine,
    linear_warmup,
    parameter_groups,
    scaled_lr,
    set_group_values,
)


def test_cosine_equals_its_closed_form_between_the_ends() -> None:
    steps = np.arange(11)
    expected = 0.2 + (1.0 - 0.2) * np.cos(np.pi * steps / 20) ** 2  # half-angle form of the cosine
    np.testing.assert_allclose([cosine(int(s), 1.0, 0.2, 10) for s in steps], expected)


def test_cosine_starts_at_the_start_and_stays_at_the_end() -> None:
    assert [cosine(s, 0.04, 0.4, 100) for s in (0, 100, 101, 10_000)] == pytest.approx([0.04, 0.4, 0.4, 0.4])
    assert cosine(50, 0.04, 0.4, 100) == pytest.approx(0.22)


def test_cosine_warms_up_in_a_line_and_begins_its_descent_at_the_top() -> None:
    values = [cosine(s, 1.0, 0.0, 30, warmup=10, warmup_start=0.5) for s in range(31)]
    np.testing.assert_allclose(values[:11], np.linspace(0.5, 1.0, 11))
    assert values[20] == pytest.approx(0.5)
    assert values[30] == 0.0
    assert max(values) == values[10] == 1.0


def test_warmup_may_fill_the_whole_run() -> None:
    assert [cosine(s, 1.0, 0.3, 4, warmup=4) for s in (0, 2, 4)] == [0.0, 0.5, 0.3]


def test_linear_warmup_holds_its_end_and_may_be_absent() -> None:
    assert [linear_warmup(s, 0.04, 0.07, 30) for s in (0, 15, 30, 31)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert linear_warmup(0, 0.04, 0.07, 0) == 0.07


def test_learning_rate_grows_with_the_square_root_of_the_batch() -> None:
    assert scaled_lr(3.5e-4, 1024) == 3.5e-4
    assert scaled_lr(3.5e-4, 256) == pytest.approx(1.75e-4)


def schedules(**fields: Any) -> Schedules:
    optim = {"base_lr": 1e-3, "warmup_steps": 10, "teacher_temp_warmup_steps": 20, "momentum": 0.992}
    run_steps = fields.pop("run_steps", 100)
    return Schedules(OptimConfig(**optim | {"freeze_last_layer_steps": 5} | fields), run_steps, batch=1024)


def test_schedules_give_all_values_of_a_step() -> None:
    first, later, last = (schedules().at(step) for step in (0, 10, 100))
    assert first == pytest.approx((0.0, 0.0, 0.04, 0.992, 0.04))
    assert later.lr == later.last_layer_lr == 1e-3
    assert later.teacher_temp == pytest.approx(0.055)
    assert later.momentum == pytest.approx(1 - 0.008 * math.cos(math.pi / 20) ** 2)
    assert last == (1e-6, 1e-6, 0.4, 1.0, 0.07)


def test_schedules_that_go_on_past_the_run_are_those_of_the_longer_run() -> None:
    cut, longer = schedules(schedule_steps=4000), schedules(run_steps=4000)
    assert [cut.at(step) for step in range(100)] == [longer.at(step) for step in range(100)]
    assert cut.at(99).lr > 0.99 * cut.lr


def test_the_last_layer_is_frozen_for_exactly_the_first_steps() -> None:
    frozen = [schedules().at(step).last_layer_lr == 0 and step > 0 for step in range(100)]
    assert [step for step, is_frozen in enumerate(frozen) if is_frozen] == [1, 2, 3, 4]


def test_phases_that_are_longer_than_the_schedules_are_shortened_and_told() -> None:
    fits = schedules(run_steps=100, warmup_steps=100, freeze_last_layer_steps=100, teacher_temp_warmup_steps=100)
    assert fits.shortened == []
    assert fits.at(99).last_layer_lr == 0
    long = schedules(run_steps=100, warmup_steps=101, freeze_last_layer_steps=1250, teacher_temp_warmup_steps=30)
    assert [line.split(": taken as ")[1] for line in long.shortened] == ["20", "20"]
    assert long.shortened[1].startswith("optim.freeze_last_layer_steps 1,250 is over the schedules' 100 steps")
    asked = schedules(run_steps=100, warmup_steps=20, freeze_last_layer_steps=20, teacher_temp_warmup_steps=30)
    assert [long.at(step) for step in range(100)] == [asked.at(step) for step in range(100)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"run_steps": 0, "warmup_steps": 0}, "a run of 0 steps; it must have at least 1"),
        ({"schedule_steps": 99}, "schedule_steps 99 is below the run's 100 steps; raise it"),
        ({"momentum": 1.5, "base_lr": -1.0}, r"base_lr=-1\.0 must not be negative; momentum=1\.5 must be in \[0, 1\]"),
        ({"teacher_temp": 0.0}, r"teacher_temp=0\.0 must be above 0"),
    ],
)
def test_impossible_schedules_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedules(**fields)


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32, num_registers=2)
    backbone.vit.blocks = backbone.vit.blocks[:3]
    return {"backbone": backbone, "dino_head": DINOHead(192, 10, 16, 8)}


def by_parameter(modules: dict[str, nn.Module], groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    names = {id(p): f"{m}.{name}" for m, module in modules.items() for name, p in module.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_every_parameter_is_in_exactly_one_group(modules: dict[str, nn.Module]) -> None:
    shared = modules | {"ibot_head": modules["dino_head"]}  # one head under two names
    groups = parameter_groups(shared, layer_decay=0.9, patch_embed_lr_mult=0.2)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for module in modules.values() for p in module.parameters())
    assert len({group["name"] for group in groups}) == len(groups)
    assert all(group.keys() == {"params", "lr_scale", "wd_scale", "is_last_layer", "name"} for group in groups)


def test_learning_rates_decay_with_depth_below_the_output(modules: dict[str, nn.Module]) -> None:
    scales = {
        name: group["lr_scale"]
        for name, group in by_parameter(
            modules, parameter_groups(modules, layer_decay=0.5, patch_embed_lr_mult=0.2)
        ).items()
    }
    assert scales["backbone.vit.blocks.0.attn.qkv.weight"] == 0.5**3
    assert scales["backbone.vit.blocks.2.mlp.fc1.bias"] == 0.5
    for token in ("vit.cls_token", "vit.reg_token", "vit.pos_embed", "mask_token"):
        assert scales[f"backbone.{token}"] == 0.5**4
    assert scales["backbone.vit.patch_embed.proj.weight"] == pytest.approx(0.2 * 0.5**4)
    assert scales["backbone.vit.norm.weight"] == scales["dino_head.mlp.0.weight"] == 1


def test_biases_norms_and_layer_scales_do_not_decay(modules: dict[str, nn.Module]) -> None:
    groups = by_parameter(modules, parameter_groups(modules, layer_decay=1.0, patch_embed_lr_mult=0.2))
    free = {name for name, group in groups.items() if group["wd_scale"] == 0}
    assert free == {n for n in groups if n.endswith(".bias") or "norm" in n or n.endswith(".gamma")}
    last_layer = {f"dino_head.last_layer.{name}" for name in ("weight", "scale")}
    assert {name for name, group in groups.items() if group["is_last_layer"]} == last_layer
    assert not last_layer & free, "the reference decays the prototypes' norms, too"


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    groups = parameter_groups({"model": model}, layer_decay=1.0, patch_embed_lr_mult=1.0)
    assert sum(len(group["params"]) for group in groups) == 2


def test_an_optimiser_receives_scaled_values(modules: dict[str, nn.Module]) -> None:
    groups = parameter_groups(modules, layer_decay=0.5, patch_embed_lr_mult=0.2)
    optimiser = torch.optim.AdamW(groups, lr=0.0)
    set_group_values(optimiser.param_groups, schedules().at(4))
    found = by_parameter(modules, optimiser.param_groups)
    weight_decay = 0.4 - 0.36 * math.cos(math.pi * 4 / 200) ** 2
    assert found["dino_head.last_layer.weight"]["lr"] == 0
    assert found["backbone.vit.blocks.2.mlp.fc1.weight"]["lr"] == pytest.approx(0.5 * 4e-4)
    assert found["backbone.vit.blocks.2.mlp.fc1.weight"]["weight_decay"] == pytest.approx(weight_decay)
    assert found["backbone.vit.norm.weight"]["weight_decay"] == 0
