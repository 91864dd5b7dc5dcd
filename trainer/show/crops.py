"""Crops as pictures."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming.slide.resample import Pixels
from trainer.recipe.augment import Augmentation

_HIDDEN = 128  # grey of a patch that is hidden from the student


def crop_pictures(crops: Tensor, augment: Augmentation) -> list[Pixels]:
    """Pictures of normalised crops (V, 3, size, size)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.mean, augment.std))
    pixels = ((crops * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
    return list(pixels.numpy())


def with_holes(picture: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """A square picture of a global crop as the student sees it; mask (N,) is true where a patch is hidden."""
    patches = math.isqrt(len(mask))
    hidden = np.kron(mask.reshape(patches, patches), np.ones((len(picture) // patches,) * 2)).astype(bool)
    holed = picture.copy()
    holed[hidden] = _HIDDEN
    return holed
