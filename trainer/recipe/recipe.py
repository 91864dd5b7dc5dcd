"""All that decides what is trained, apart from tiles, seed and length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.recipe.augment import Augmentation, Crops
from trainer.recipe.losses import LossConfig
from trainer.recipe.masks import Masking, block_masks
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

    def views(self, tiles: Tensor, index: Tensor, patch_grid: tuple[int, int], seed: int) -> tuple[Crops, Tensor]:
        """What the networks see of tiles uint8 (B, S, S, 3): their crops, and masks bool (2, B, N) of the global ones.

        index int64 (B,); patch_grid: rows and columns of patches of a global crop.
        """
        # The masks on the host: the number of their rounds depends on the data, which a GPU would have to wait for.
        masks = block_masks(index.cpu(), patch_grid, self.mask, seed).to(index.device)
        return self.augment.multi_crop(tiles, index, seed), masks
