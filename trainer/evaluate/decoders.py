"""Small heads on frozen patch tokens: what they are made of, and how they are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.evaluate.features import Features

BATCH = 16
"""tiles that a head sees at once"""
_LR, _WEIGHT_DECAY = 1e-3, 1e-2
_WIDTH = 64
_STRIDE_PX = 4  # of what a convolutional head puts out: places are then sharp to some 2 px
Targets = Callable[[NDArray[np.int64]], Tensor]


def linear_decoder(width: int, num_classes: int) -> nn.Module:
    """Patch tokens (B, D, h, w) → logits (B, K, h, w) by one linear layer."""
    return nn.Conv2d(width, num_classes, 1)


def conv_decoder(width: int, num_classes: int, upsampling: int) -> nn.Module:
    """Patch tokens (B, D, h, w) → logits (B, K, h · up, w · up): steps of × 2, each with a 3 × 3 convolution."""
    layers: list[nn.Module] = [nn.Conv2d(width, _WIDTH, 1), nn.GELU()]
    for _ in range(round(math.log2(upsampling))):
        layers += [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(_WIDTH, num_classes, 1))


def upsampling(features: Features) -> int:
    """The power of two that brings patches to a stride of about 4 px."""
    assert features.patches is not None, "patch tokens are kept"
    patch_px = features.side[0] / features.patches.shape[1]
    return 2 ** max(0, round(math.log2(patch_px / _STRIDE_PX)))


def tokens_of(features: Features, chosen: NDArray[np.int64]) -> Tensor:
    """Patch tokens of some tiles, float32 (B, D, h, w)."""
    assert features.patches is not None, "patch tokens are kept"
    return torch.from_numpy(features.patches[chosen].astype(np.float32)).permute(0, 3, 1, 2)


def batches(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Pieces of `size` of some indices, in order."""
    for at in range(0, len(indices), size):
        yield indices[at : at + size]


def fit(
    make: Callable[[], nn.Module],
    features: Features,
    chosen: NDArray[np.int64],
    targets: Targets,
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """Trains a head on the chosen tiles, on that device: AdamW, learning rate 1e-3 to 0 by cosine, batches of 16."""
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = make().train().to(device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * math.ceil(len(chosen) / BATCH))
    for _ in range(epochs):
        for some in batches(random.permutation(chosen), BATCH):
            some = np.sort(some)  # as they lie in the file
            value = loss(head(tokens_of(features, some).to(device)), targets(some).to(device))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
    return head.eval()
