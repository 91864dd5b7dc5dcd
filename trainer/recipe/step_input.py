"""All that a step needs beside the weights, made on the host from the tiles and their indices."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from trainer.recipe.augment import Draws
from trainer.recipe.masks import Masks


class StepInput(NamedTuple):
    """A micro-batch of B tiles, and what is drawn for them: the step is a function of it that draws nothing itself.

    Made beside the training and sent to the device as one piece, it leaves the step nothing to upload or to ask for.
    """

    tile: Tensor
    """uint8 (B, S, S, 3)"""
    local_tile: tuple[Tensor, ...]
    """those that local crops are cut from, if they are others"""
    sample_index: Tensor
    """int64 (B,)"""
    masks: Masks
    """of the global crops"""
    draws: Draws
    """of the crops and their colours"""
    kept: tuple[Tensor, ...]
    """crops that each residual branch sees, int64 (branches, kept) for each crop size; empty: all see all"""
