"""Segmentation by the protocol of kaiko's eva 0.4.5: DINOv2's convolutional decoder, Dice as loss and as score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from trainer.evaluate.annotations import BACKGROUND
from trainer.evaluate.datasets import IGNORED, Samples
from trainer.evaluate.decoders import batches, tokens_of
from trainer.evaluate.eva import Setting, stdev, test_results
from trainer.evaluate.features import Features
from trainer.evaluate.scores import Score, share
from trainer.evaluate.scratch import Scratch
from trainer.evaluate.splits import Fold, Ints

PIXELS = Setting(lr=2e-3, batch=64, steps=2_000)
_SMOOTHED = 1e-5  # of MONAI's Dice loss
_CPU = torch.device("cpu")


def cropped_masks(samples: Samples, features: Features, room: Scratch) -> NDArray[np.uint8]:
    """The masks (N, side, side) of tiles that `resize_and_crop` made, mapped.

    Raises:
        ConfigError: a mask is none, or there is no room.
    """
    assert samples.masks is not None, "tiles have masks"
    found = room.array("masks", (len(samples), *features.side), np.uint8)
    for i, (mask, whole) in enumerate(zip(samples.masks, features.whole, strict=True)):
        found[i] = transforms.center_crop(torch.from_numpy(mask(*whole)), list(features.side)).numpy()
    return found


def pixel_decoder(width: int, num_classes: int) -> nn.Module:
    """Patch tokens (B, D, h, w) → logits (B, K, 4 h, 4 w): eva's `ConvDecoderMS`, after DINOv2's `+ms`."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(width, 64, 3, padding=1),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(64, num_classes, 3, padding=1),
    )


def pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 − Dice of logits (B, K, h, w) and classes (B, H, W): a batch's pixels added up, mean over the classes.

    As MONAI's `DiceLoss(softmax=True, batch=True)`; where nothing is known, as eva ignores a class.
    """
    logits = nn.functional.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)
    known = target != IGNORED
    truth = nn.functional.one_hot(target * known, logits.shape[1]).movedim(-1, 1).float()
    found = (logits * known[:, None]).softmax(dim=1)
    hit, total = (truth * found).sum(dim=(0, 2, 3)), truth.sum(dim=(0, 2, 3)) + found.sum(dim=(0, 2, 3))
    return (1 - (2 * hit + _SMOOTHED) / (total + _SMOOTHED)).mean()


def image_dice(truth: NDArray[np.integer], found: NDArray[np.integer], classes: Sequence[int]) -> NDArray[np.float64]:
    """Dice (n,) of images of classes (n, H, W): the mean of those classes that the truth has, NaN where it has none.

    Pixels where the truth is unknown do not count.
    """
    known = truth != IGNORED
    of_class = np.full((len(classes), len(truth)), np.nan)
    for row, k in zip(of_class, classes, strict=True):
        one, other = truth == k, (found == k) & known
        there, both = one.any(axis=(1, 2)), (one & other).sum(axis=(1, 2))
        row[there] = (2 * both / np.maximum(one.sum(axis=(1, 2)) + other.sum(axis=(1, 2)), 1))[there]
    count = (~np.isnan(of_class)).sum(axis=0)
    return np.divide(np.nansum(of_class, axis=0), count, out=np.full(len(truth), np.nan), where=count > 0)


def score_masks(
    features: Features,
    masks: NDArray[np.uint8],
    samples: Samples,
    fold: Fold,
    seed: int = 0,
    device: torch.device = _CPU,
    setting: Setting = PIXELS,
) -> list[Score]:
    """Dice of a convolutional decoder on patch tokens: the mean over images of that over the classes they show.

    The background does not count: class 0 of mask images, of annotations that of the name.
    """
    assert features.patches is not None, "patch tokens are kept"
    assert fold.val is not None, "there are samples to choose by"
    dim, num_classes, val = features.patches.shape[3], len(samples.classes), fold.val
    wanted = range(samples.classes[0] in ("0", BACKGROUND), num_classes)

    def target(chosen: Ints) -> Tensor:
        return torch.from_numpy(masks[chosen]).long().to(device)

    def loss(head: nn.Module, chosen: Ints) -> Tensor:
        return pixel_loss(head(tokens_of(features, chosen).to(device)), target(chosen))

    def dice(head: nn.Module, chosen: Ints) -> NDArray[np.float64]:
        parts: list[NDArray[np.float64]] = []
        for some in batches(chosen, setting.batch):
            truth = masks[some]
            logits = head(tokens_of(features, some).to(device))
            size = tuple(truth.shape[-2:])
            found = nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1)
            parts.append(image_dice(truth, found.cpu().numpy(), wanted))
        return np.concatenate(parts)

    def score(head: nn.Module) -> float:
        return _mean(dice(head, val))

    found = test_results(lambda: pixel_decoder(dim, num_classes), loss, score, dice, fold, seed, device, setting)
    groups = None if samples.groups is None else samples.groups[fold.test]
    there, mean = ~np.isnan(found[0]), np.nan_to_num(np.mean(found, axis=0))
    scored = share("segmentation", "Dice of an image", mean, there.astype(np.float64), groups, seed)
    return [replace(scored, stdev=stdev([_mean(one) for one in found]))]


def _mean(values: NDArray[np.float64]) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else -math.inf
