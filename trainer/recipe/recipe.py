"""All that decides what is trained, apart from tiles, seed and length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.recipe.augment import NUM_GLOBAL, Augmentation, Crops
from trainer.recipe.losses import LossConfig
from trainer.recipe.masks import Masking, block_masks, located
from trainer.recipe.network import ModelConfig, Network, build_backbone
from trainer.recipe.schedule import OptimConfig
from trainer.recipe.step_input import Drawn
from trainer.recipe.stochastic_depth import kept_crops


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How crops are cut and masked, the networks, their losses, and the optimiser."""

    augment: Augmentation
    mask: Masking
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig

    def network(self, seed: int) -> Network:
        """The student with its first weights, which the seed decides.

        Raises:
            ValueError: a model or crops that make no sense.
        """
        torch.manual_seed(seed)
        return Network(build_backbone(self.model, self.augment.global_size), self.model, self.loss.patch)

    def views(
        self,
        tiles: Tensor,
        index: Tensor,
        patch_grid: tuple[int, int],
        seed: int,
        local_tiles: Tensor | None = None,
    ) -> tuple[Crops, Tensor]:
        """What the networks see of tiles uint8 (B, S, S, 3): their crops, and masks bool (2, B, N) of the global ones.

        index int64 (B,); patch_grid: rows and columns of patches of a global crop.
        """
        masks = block_masks(index.cpu(), patch_grid, self.mask, seed).to(index.device)
        return self.augment.multi_crop(tiles, index, seed, local_tiles=local_tiles), masks

    def drawn(
        self,
        tiles: Tensor,
        index: Tensor,
        patch_grid: tuple[int, int],
        num_branches: int,
        seed: int,
        local_tiles: Tensor | None = None,
    ) -> Drawn:
        """Tiles and indices on the host with all that is drawn for a step on them; `views` says the shapes.

        num_branches: the residual branches of the backbone.
        """
        augment, rate = self.augment, self.model.drop_path
        sizes = [range(NUM_GLOBAL), augment.local_views][: 2 if augment.num_local else 1]
        return Drawn(
            tiles,
            () if local_tiles is None else (local_tiles,),
            index,
            # On the host: how many rounds these take, and which patches they hide, a GPU would have to be asked.
            located(block_masks(index, patch_grid, self.mask, seed)),
            augment.draws(index, seed, tiles.shape[2]),
            tuple(kept_crops(index, views, num_branches, rate, seed) for views in sizes) if rate else (),
        )
