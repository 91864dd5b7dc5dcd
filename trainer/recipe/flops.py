"""What a step of a recipe costs in floating-point operations, counted by torch without memory for the networks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.recipe.augment import NUM_GLOBAL
from trainer.recipe.module import DinoModule
from trainer.recipe.recipe import Recipe
from trainer.recipe.stochastic_depth import kept_crops


class StepFlops(NamedTuple):
    """Floating-point operations of an optimiser step, a multiplication and an addition as two."""

    student: int
    """forward and backward"""
    teacher: int
    """forward"""

    @property
    def total(self) -> int:
        """Of both."""
        return self.student + self.teacher


def step_flops(recipe: Recipe, batch: int) -> StepFlops:
    """Counts the products of matrices, convolutions and attention in the networks, of `batch` tiles a step.

    Counted by torch's `FlopCounterMode`, with stochastic depth. Crops, targets and losses, the optimiser, and what
    activation checkpointing computes again are left out. Ranks and rounds of accumulation change nothing.
    """
    with torch.device("meta"):
        module = DinoModule(recipe, 0, steps=1, batch=batch)
    depth = len(module.student.backbone.vit.blocks)
    # Every block costs the same.
    two, one = (_flops_of_depth(module, blocks, recipe, batch) for blocks in (2, 1))
    return StepFlops(*(first + (depth - 1) * (both - first) for first, both in zip(one, two, strict=True)))


def _flops_of_depth(module: DinoModule, num_blocks: int, recipe: Recipe, batch: int) -> StepFlops:
    """Of a module on the meta device, of which later blocks are taken away."""
    augment = recipe.augment
    for network in (module.student, module.teacher):
        network.backbone.vit.blocks = network.backbone.vit.blocks[:num_blocks]
    with torch.device("meta"):
        images = [
            torch.empty(views * batch, 3, side, side)
            for views, side in ((NUM_GLOBAL, augment.global_size), (augment.num_local, augment.local_size))
            if views
        ]
    num_patches = module.patch_grid[0] * module.patch_grid[1]
    of_group = torch.tensor(recipe.mask.tokens_per_crop(num_patches))
    hidden = of_group.repeat(-(-NUM_GLOBAL * batch // len(of_group)))[: NUM_GLOBAL * batch]
    chosen = torch.arange(int(hidden.sum()), device="meta")
    masks = [torch.zeros(NUM_GLOBAL * batch, num_patches, dtype=torch.bool, device="meta"), None][: len(images)]
    index, views = torch.arange(batch), [range(NUM_GLOBAL), augment.local_views][: len(images)]
    rate, branches = recipe.model.drop_path, module.student.backbone.num_branches
    kept = [kept_crops(index, views_, branches, rate, 0).to("meta") for views_ in views] if rate else []
    with FlopCounterMode(display=False) as student:
        cls, logits, patches = module.student(images, masks, chosen, kept)
        torch.stack([part.sum() for part in (*cls, *logits, patches)]).sum().backward()
    with FlopCounterMode(display=False) as teacher, torch.no_grad():
        module.teacher(images[:1], [None], chosen)
    return StepFlops(student.get_total_flops(), teacher.get_total_flops())
