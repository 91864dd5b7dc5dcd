"""Segmentation and detection: small heads on frozen patch tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.evaluate.datasets import IGNORED, Samples
from trainer.evaluate.features import Features
from trainer.evaluate.scores import Score, bootstrap, match_points, mean_f1
from trainer.evaluate.splits import Fold

_LR, _WEIGHT_DECAY, _BATCH = 1e-3, 1e-2, 16
_WIDTH = 64
_STRIDE_PX = 4  # of a heatmap, whose peaks are then sharp to some 2 px
_THRESHOLDS = np.linspace(0.05, 0.95, 19)
# Of the penalty-reduced focal loss: arXiv 1904.07850, equation 1.
_FOCUS, _FORGIVE = 2, 4
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


def _upsampling(features: Features, stride_px: int) -> int:
    """The power of two that brings patches to about that stride."""
    assert features.patches is not None, "patch tokens are kept"
    patch_px = features.side[0] / features.patches.shape[1]
    return 2 ** max(0, round(math.log2(patch_px / stride_px)))


def _tokens(features: Features, chosen: NDArray[np.int64]) -> Tensor:
    """Patch tokens of some tiles, float32 (B, D, h, w)."""
    assert features.patches is not None, "patch tokens are kept"
    return torch.from_numpy(features.patches[chosen].astype(np.float32)).permute(0, 3, 1, 2)


def _batches(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for at in range(0, len(indices), size):
        yield indices[at : at + size]


def _fit(
    make: Callable[[], nn.Module],
    features: Features,
    chosen: NDArray[np.int64],
    targets: Targets,
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    seed: int,
) -> nn.Module:
    """Trains a head on the chosen tiles: AdamW, learning rate 1e-3 to 0 by cosine, batches of 16."""
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = make().train()
    optimiser = torch.optim.AdamW(head.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * math.ceil(len(chosen) / _BATCH))
    for _ in range(epochs):
        for some in _batches(random.permutation(chosen), _BATCH):
            value = loss(head(_tokens(features, some)), targets(some))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
    return head.eval()


def score_segmentation(
    features: Features, samples: Samples, folds: Sequence[Fold], epochs: int, seed: int
) -> list[Score]:
    """Dice of a linear and of a convolutional decoder, mean over the classes, pixels of all tiles added up."""
    assert samples.masks is not None, "tiles have masks"
    assert features.patches is not None, "patch tokens are kept"
    masks, (height, width) = samples.masks, features.side
    num_classes, dim = len(samples.classes), features.patches.shape[3]
    up = _upsampling(features, _STRIDE_PX)

    def targets(chosen: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.stack([masks[i](height, width) for i in chosen])).long()

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
            head = _fit(make, features, fold.train, targets, loss, epochs, seed)
            with torch.inference_mode():
                for some in _batches(fold.test, _BATCH):
                    target = targets(some)
                    found = _to(head(_tokens(features, some)), target).argmax(dim=1)
                    parts.append(_overlaps(target.numpy(), found.numpy(), num_classes))
        scores.append(bootstrap("segmentation", f"Dice, {name}", np.concatenate(parts), groups, mean_f1, seed=seed))
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


def heatmaps(points: Sequence[NDArray[np.float64]], num_classes: int, grid: tuple[int, int], scale: float) -> Tensor:
    """Gaussians of σ one cell around points (x, y, class), whose cell is 1; (B, K, rows, columns) in 0..1.

    `scale` is cells per pixel.
    """
    found = np.zeros((len(points), num_classes, *grid), dtype=np.float32)
    rows, columns = np.indices(grid)
    for i, tile in enumerate(points):
        for x, y, kind in tile:
            row, column = min(int(y * scale), grid[0] - 1), min(int(x * scale), grid[1] - 1)
            bump = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 2).astype(np.float32)
            np.maximum(found[i, int(kind)], bump, out=found[i, int(kind)])
    return torch.from_numpy(found)


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced pixelwise logistic regression with focus, per point: arXiv 1904.07850, equation 1."""
    probability, peak = logits.sigmoid(), target == 1
    hit = -nn.functional.logsigmoid(logits) * (1 - probability) ** _FOCUS
    miss = -nn.functional.logsigmoid(-logits) * probability**_FOCUS * (1 - target) ** _FORGIVE
    return torch.where(peak, hit, miss).sum() / peak.sum().clamp(min=1)


def peaks(heatmap: Tensor, radius_cells: float, least: float) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The highest within a radius of each map of (B, rows, columns): x, y (n, 2) in cells, and their heights."""
    reach = max(1, round(radius_cells))
    highest = nn.functional.max_pool2d(heatmap[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0]
    found: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for own, top in zip(heatmap, highest, strict=True):
        rows, columns = torch.nonzero((own == top) & (own >= least), as_tuple=True)
        places = torch.stack([columns, rows], dim=1).double().numpy() + 0.5
        found.append((places, own[rows, columns].double().numpy()))
    return found


def score_detection(
    features: Features, samples: Samples, folds: Sequence[Fold], radius_px: float, epochs: int, seed: int
) -> list[Score]:
    """F1 of points found within a radius of true ones, by a heatmap of each class; mean over the classes.

    The height from which on a peak counts is the one with the best F1 on what the head was trained on.
    """
    assert samples.points is not None, "tiles have points"
    assert features.patches is not None, "patch tokens are kept"
    points = samples.points
    num_classes, dim, up = len(samples.classes), features.patches.shape[3], _upsampling(features, _STRIDE_PX)
    grid = (features.patches.shape[1] * up, features.patches.shape[2] * up)
    scale = grid[0] / features.side[0]

    def make() -> nn.Module:
        head = conv_decoder(dim, num_classes, up)
        last = [module for module in head.modules() if isinstance(module, nn.Conv2d)][-1]
        assert last.bias is not None, "a convolution's default"
        nn.init.constant_(last.bias, -math.log(99))  # points are rare: start at a probability of 1 %
        return head

    def targets(chosen: NDArray[np.int64]) -> Tensor:
        return heatmaps([points[i] for i in chosen], num_classes, grid, scale)

    def counted(head: nn.Module, chosen: NDArray[np.int64], thresholds: Sequence[float]) -> NDArray[np.float64]:
        """TP, FP and FN (n, thresholds, K, 3)."""
        with torch.inference_mode():
            maps = torch.cat([head(_tokens(features, some)).sigmoid() for some in _batches(chosen, _BATCH)])
        parts = np.zeros((len(chosen), len(thresholds), num_classes, 3))
        for k in range(num_classes):
            for i, (places, heights) in enumerate(peaks(maps[:, k], radius_px * scale, min(thresholds))):
                truth = points[chosen[i]]
                truth = truth[truth[:, 2] == k, :2]
                for t, least in enumerate(thresholds):
                    parts[i, t, k] = match_points(truth, places[heights >= least] / scale, radius_px)
        return parts

    parts: list[NDArray[np.float64]] = []
    for fold in folds:
        head = _fit(make, features, fold.train, targets, focal_loss, epochs, seed)
        best = mean_f1(counted(head, fold.train, _THRESHOLDS.tolist()).sum(axis=0))
        parts.append(counted(head, fold.test, [float(_THRESHOLDS[np.nan_to_num(best).argmax()])])[:, 0])
    tested = np.concatenate([fold.test for fold in folds])
    groups = None if samples.groups is None else samples.groups[tested]
    num_points = sum(len(points[i]) for i in tested)
    metric = f"F1 within {radius_px:g} px"
    return [bootstrap("detection", metric, np.concatenate(parts), groups, mean_f1, num_points, seed)]
