"""What changes during training, as pure functions of the optimiser step, and the parameter groups it applies to.

Steps are optimiser steps, never micro-steps: accumulation must not speed a schedule up.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

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
class Schedules:
    """All schedules of a run; constants are DINOv2's where a default is given."""

    total_steps: int
    """Optimiser steps of the run."""
    lr: float
    """Highest learning rate, after scaling by the batch (`scaled_lr`)."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    warmup_steps: int = 0
    """Optimiser steps of linear learning-rate warm-up from 0."""
    weight_decay: float = 0.04
    """Weight decay at the start."""
    weight_decay_end: float = 0.4
    """Weight decay at the end."""
    momentum: float = 0.992
    """Momentum of the teacher's moving average at the start."""
    momentum_end: float = 1.0
    """Momentum of the teacher's moving average at the end."""
    teacher_temp_start: float = 0.04
    """Teacher temperature at step 0."""
    teacher_temp: float = 0.07
    """Teacher temperature after its warm-up."""
    teacher_temp_warmup_steps: int = 0
    """Optimiser steps of linear teacher-temperature warm-up."""
    freeze_last_layer_steps: int = 1250
    """Optimiser steps during which the heads' last layers have learning rate 0."""

    def __post_init__(self) -> None:
        steps = ("warmup_steps", "teacher_temp_warmup_steps", "freeze_last_layer_steps")
        rates = ("lr", "min_lr", "weight_decay", "weight_decay_end")
        momenta, temperatures = ("momentum", "momentum_end"), ("teacher_temp_start", "teacher_temp")
        value = vars(self).__getitem__
        wrong = [f"{name}={value(name)} must not be negative" for name in (*steps, *rates) if value(name) < 0]
        wrong += [f"{name}={value(name)} must be in [0, 1]" for name in momenta if not 0 <= value(name) <= 1]
        wrong += [f"{name}={value(name)} must be above 0" for name in temperatures if value(name) <= 0]
        if self.total_steps < 1:
            wrong.append(f"total_steps={self.total_steps} must be at least 1")
        if self.warmup_steps > self.total_steps:
            wrong.append(f"warmup_steps={self.warmup_steps} exceeds total_steps={self.total_steps}")
        if wrong:
            raise ValueError("; ".join(wrong))

    def at(self, step: int) -> StepValues:
        """Values for optimiser step `step`, counted from 0; `momentum` is for the update after that step."""
        total = self.total_steps
        lr = cosine(step, self.lr, self.min_lr, total, self.warmup_steps)
        return StepValues(
            lr=lr,
            last_layer_lr=0.0 if step < self.freeze_last_layer_steps else lr,
            weight_decay=cosine(step, self.weight_decay, self.weight_decay_end, total),
            momentum=cosine(step, self.momentum, self.momentum_end, total),
            teacher_temp=linear_warmup(
                step, self.teacher_temp_start, self.teacher_temp, self.teacher_temp_warmup_steps
            ),
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
