"""Stochastic depth as a pure function of (seed, sample index, view, branch): drawn on the host, before the step.

The blocks are told which crops each of their branches sees. So a step draws nothing: it can be compiled, its
activations can be computed anew, and no random number waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.recipe.counter_random import random_bits

_BRANCHES = 1 << 24  # first draw; those below are the augmentation's and the masks'


def kept_crops(index: Tensor, views: range, num_branches: int, rate: float, seed: int) -> Tensor:
    """Which of the crops of a micro-batch each residual branch sees: 1 − rate of them, rounded down, at least one.

    index int64 (B,) on the host; views are the numbered crops of a size; num_branches is two for each block. Returns
    int64 (branches, kept), ascending, of the V·B crops, view first. As DINOv2 does, a subset of constant size is taken
    of the crops that stand together in a micro-batch, here those with the lowest hash.
    """
    view = torch.arange(views.start, views.stop)[:, None]
    branch = _BRANCHES + torch.arange(num_branches)[:, None, None]
    order = random_bits(seed, index, view, branch).flatten(1)  # (branches, V·B)
    num_kept = max(int(order.shape[1] * (1 - rate)), 1)
    return order.argsort(dim=1, stable=True)[:, :num_kept].sort(dim=1).values
