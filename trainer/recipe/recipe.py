"""All that decides what is trained, apart from tiles, seed and length."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.recipe.augment import Augmentation
from trainer.recipe.losses import LossConfig
from trainer.recipe.masks import Masking
from trainer.recipe.network import ModelConfig
from trainer.recipe.schedule import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How crops are cut and masked, the networks, their losses, and the optimiser."""

    augment: Augmentation
    mask: Masking
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
