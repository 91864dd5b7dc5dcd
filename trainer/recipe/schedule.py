"""What changes during training, as pure functions of the optimiser step, and the parameter groups it applies to.

Steps are optimiser steps, never micro-steps: accumulation must not speed a schedule up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

# Of the teacher's moving average at the end of a run (DINOv2's `final_momentum_teacher`).
_LAST_MOMENTUM = 1.0

_PHASES = ("warmup_steps", "freeze_last_layer_steps", "teacher_temp_warmup_steps")

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:pos_embed|patch_embed|mask_token|cls_token|reg_token)(?:\.|$)")


def linear_warmup(step: int, start: float, end: float, warmup: int) -> float:
    """Straight line from start at step 0 to end at step `warmup`, end from there on."""
    return end if step >= warmup else start + (end - start) * step / warmup


def cosine(step: int, start: float, end: float, total: int, warmup: int = 0, warmup_start: float = 0.0) -> float:
    """Linear from warmup_start to start in `warmup` steps, half a cosine from there to end at step `total`, then end.

    Source: DINOv2's `CosineScheduler`, whose warm-up reaches its top one step earlier.
    """
    if step < warmup:
        return linear_warmup(step, warmup_start, start, warmup)
    if step >= total:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def scaled_lr(base: float, global_batch: int) -> float:
    """Learning rate by the square-root rule, base × sqrt(global batch / 1024) (DINOv2's `sqrt_wrt_1024`)."""
    return base * math.sqrt(global_batch / 1024)


class StepValues(NamedTuple):
    """What the schedules say at one optimiser step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and schedules, all in optimiser steps."""

    schedule_steps: int | None = None
    """steps over which the schedules go, where the run ends before they do; none: those of the run"""
    base_lr: float = 2e-4
    """learning rate at batch 1024; scaled by the square root of batch / 1024"""
    min_lr: float = 1e-6
    """learning rate at the end"""
    warmup_steps: int = 100
    """steps of linear learning-rate warm-up"""
    beta2: float = 0.999
    """adamW's second momentum"""
    weight_decay: float = 0.04
    """weight decay at the start"""
    weight_decay_end: float = 0.4
    """weight decay at the end"""
    layer_decay: float = 0.9
    """factor of the learning rate from a block to the one below"""
    patch_embed_lr_mult: float = 0.2
    """factor of the patch embedding's learning rate"""
    clip: float = 3.0
    """highest gradient norm of the backbone and of each head"""
    freeze_last_layer_steps: int = 0
    """steps before the heads' last layers learn"""
    momentum: float = 0.994
    """the teacher's momentum at the start; 1 at the end"""
    teacher_temp_start: float = 0.04
    """teacher's temperature at step 0"""
    teacher_temp: float = 0.07
    """teacher's temperature after its warm-up"""
    teacher_temp_warmup_steps: int = 0
    """steps of that warm-up"""

    def __post_init__(self) -> None:
        value = vars(self).__getitem__
        counts = ("warmup_steps", "teacher_temp_warmup_steps", "freeze_last_layer_steps")
        rates = ("base_lr", "min_lr", "weight_decay", "weight_decay_end")
        temperatures = ("teacher_temp_start", "teacher_temp")
        wrong = [f"{name}={value(name)} must not be negative" for name in (*counts, *rates) if value(name) < 0]
        wrong += [f"momentum={self.momentum} must be in [0, 1]"] if not 0 <= self.momentum <= 1 else []
        wrong += [f"{name}={value(name)} must be above 0" for name in temperatures if value(name) <= 0]
        if wrong:
            raise ValueError("; ".join(wrong))


@dataclass(frozen=True)
class Schedules:
    """The schedules of a run: an optimiser's constants over a number of optimiser steps of a global batch.

    A warm-up or freeze that is longer than all of them, as of a preset that is tried for two steps, is shortened.
    """

    optim: OptimConfig
    run_steps: int
    batch: int

    @property
    def total_steps(self) -> int:
        """Steps over which they go."""
        return self.optim.schedule_steps or self.run_steps

    def __post_init__(self) -> None:
        if self.run_steps < 1:
            raise ValueError(f"a run of {self.run_steps} steps; it must have at least 1")
        if self.total_steps < self.run_steps:
            raise ValueError(f"schedule_steps {self.total_steps} is below the run's {self.run_steps} steps; raise it")

    def _phase(self, steps: int) -> int:
        """Steps of a phase: those that are asked for, or a fifth of the schedules' where these end before it."""
        return steps if steps <= self.total_steps else self.total_steps // 5

    @property
    def shortened(self) -> list[str]:
        """A line for each phase that does not fit, and is shorter than asked for."""
        asked = {name: getattr(self.optim, name) for name in _PHASES}
        return [
            f"optim.{name} {steps:,} is over the schedules' {self.total_steps:,} steps: taken as {self._phase(steps):,}"
            for name, steps in asked.items()
            if self._phase(steps) != steps
        ]

    @property
    def lr(self) -> float:
        """The highest learning rate."""
        return scaled_lr(self.optim.base_lr, self.batch)

    def at(self, step: int) -> StepValues:
        """Values for optimiser step `step`, counted from 0; `momentum` is for the update after that step."""
        optim, total = self.optim, self.total_steps
        warmup, freeze, temp_warmup = (self._phase(getattr(optim, name)) for name in _PHASES)
        lr = cosine(step, self.lr, optim.min_lr, total, warmup)
        return StepValues(
            lr=lr,
            last_layer_lr=0.0 if step < freeze else lr,
            weight_decay=cosine(step, optim.weight_decay, optim.weight_decay_end, total),
            momentum=cosine(step, optim.momentum, _LAST_MOMENTUM, total),
            teacher_temp=linear_warmup(step, optim.teacher_temp_start, optim.teacher_temp, temp_warmup),
        )


def parameter_groups(
    modules: Mapping[str, nn.Module], *, layer_decay: float, patch_embed_lr_mult: float
) -> list[dict[str, Any]]:
    """Optimiser groups of DINOv2's recipe, for the trainable parameters of the named modules, each parameter once.

    With L blocks, block i learns at layer_decay^(L−i), embeddings and tokens at layer_decay^(L+1), the patch embedding
    also × patch_embed_lr_mult, everything else (norm, heads) at 1. Each group is a dict of `params`, `lr_scale`,
    `wd_scale` (0 for biases, norms and layer scales, 1 for matrices), `is_last_layer` (frozen at first) and `name`.
    Source: DINOv2's `get_params_groups_with_decay`.
    """
    groups: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for module_name, module in modules.items():
        named = list(module.named_parameters())
        num_blocks = max((int(m[1]) + 1 for name, _ in named if (m := _BLOCK.search(name))), default=0)
        for name, parameter in named:
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            layer, lr_scale = _layer(name, num_blocks, layer_decay, patch_embed_lr_mult)
            # Biases, norms and layer scales are exactly the parameters of one dimension.
            wd_scale = 0.0 if parameter.ndim <= 1 else 1.0
            key = f"{module_name}.{layer}.{'decay' if wd_scale else 'no_decay'}"
            group = {"lr_scale": lr_scale, "wd_scale": wd_scale, "is_last_layer": layer == "last_layer", "name": key}
            groups.setdefault(key, {"params": [], **group})["params"].append(parameter)
    return list(groups.values())


def _layer(name: str, num_blocks: int, layer_decay: float, patch_embed_lr_mult: float) -> tuple[str, float]:
    """Group and learning-rate scale of a parameter by its name."""
    if block := _BLOCK.search(name):
        return f"block{block[1]}", layer_decay ** (num_blocks - int(block[1]))
    if embedding := _EMBEDDING.search(name):
        scale = layer_decay ** (num_blocks + 1)
        return ("patch_embed", scale * patch_embed_lr_mult) if "patch_embed" in embedding[0] else ("tokens", scale)
    return ("last_layer" if "last_layer" in name else "rest"), 1.0


def set_group_values(groups: Iterable[dict[str, Any]], values: StepValues) -> None:
    """Writes learning rate and weight decay of a step into an optimiser's `param_groups`, by each group's scales."""
    for group in groups:
        group["lr"] = (values.last_layer_lr if group["is_last_layer"] else values.lr) * group["lr_scale"]
        group["weight_decay"] = values.weight_decay * group["wd_scale"]
