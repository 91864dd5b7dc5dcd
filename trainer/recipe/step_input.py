"""All that a step needs beside the weights, drawn on the host from the tiles and their indices, cut on the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from trainer.recipe.augment import Crops, Draws
from trainer.recipe.masks import Masks


class Drawn(NamedTuple):
    """A micro-batch of B tiles, and all that is drawn for them, on the host: it goes to the device as one piece."""

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


class StepInput(NamedTuple):
    """The crops of such a micro-batch: the step is a function of it that draws, sends and asks for nothing itself."""

    crops: Crops
    sample_index: Tensor
    """int64 (B,)"""
    masks: Masks
    """of the global crops"""
    kept: tuple[Tensor, ...]
    """crops that each residual branch sees, as in `Drawn`"""
