"""Segmentation: classes of pixels from frozen patch tokens, by a linear and by a convolutional decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.evaluate.datasets import IGNORED, Samples
from trainer.evaluate.decoders import BATCH, batches, conv_decoder, fit, linear_decoder, tokens_of, upsampling
from trainer.evaluate.features import Features
from trainer.evaluate.scores import Score, bootstrap, f1
from trainer.evaluate.scratch import Scratch
from trainer.evaluate.splits import Fold

_CPU = torch.device("cpu")


def painted(samples: Samples, side: tuple[int, int], scratch: Scratch) -> NDArray[np.uint8]:
    """The masks (N, height, width) of tiles of that side, each painted once and mapped.

    Raises:
        ConfigError: a mask is none, or there is no room.
    """
    assert samples.masks is not None, "tiles have masks"
    found = scratch.array("masks", (len(samples), *side), np.uint8)
    for i, mask in enumerate(samples.masks):
        found[i] = mask(*side)
    return found


def score_segmentation(
    features: Features,
    masks: NDArray[np.uint8],
    samples: Samples,
    folds: Sequence[Fold],
    epochs: int,
    seed: int,
    device: torch.device = _CPU,
) -> list[Score]:
    """Dice of a linear and of a convolutional decoder, mean over the classes, pixels of all tiles added up.

    masks (N, height, width) are what `painted` gave; heads are trained on the device.
    """
    assert features.patches is not None, "patch tokens are kept"
    num_classes, dim = len(samples.classes), features.patches.shape[3]
    up = upsampling(features)

    def targets(chosen: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(masks[chosen]).long()

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        # A batch in which nothing is known has no mean.
        total = nn.functional.cross_entropy(_to(logits, target), target, ignore_index=IGNORED, reduction="sum")
        return total / (target != IGNORED).sum().clamp(min=1)

    makers = {
        "linear": lambda: linear_decoder(dim, num_classes),
        "convolutional": lambda: conv_decoder(dim, num_classes, up),
    }
    tested, scores = np.concatenate([fold.test for fold in folds]), list[Score]()
    groups = None if samples.groups is None else samples.groups[tested]
    for name, make in makers.items():
        parts: list[NDArray[np.float64]] = []
        for fold in folds:
            head = fit(make, features, fold.train, targets, loss, epochs, seed, device)
            with torch.inference_mode():
                for some in batches(fold.test, BATCH):
                    target = targets(some)
                    found = _to(head(tokens_of(features, some).to(device)), target).argmax(dim=1).cpu()
                    parts.append(_overlaps(target.numpy(), found.numpy(), num_classes))
        scores.append(bootstrap("segmentation", f"Dice, {name}", np.concatenate(parts), groups, f1, seed=seed))
    return scores


def _to(logits: Tensor, target: Tensor) -> Tensor:
    """Logits at the target's resolution."""
    size = tuple(target.shape[-2:])
    return nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _overlaps(truth: NDArray[Any], found: NDArray[Any], num_classes: int) -> NDArray[np.float64]:
    """True and false positives and misses (n, K, 3) in pixels, where the truth is known."""
    known = truth != IGNORED
    rows = [(truth == k, (found == k) & known) for k in range(num_classes)]
    counts = [[t & f, f & ~t, t & ~f] for t, f in rows]
    return np.stack([[part.sum(axis=(1, 2)) for part in parts] for parts in counts]).transpose(2, 0, 1).astype(float)
