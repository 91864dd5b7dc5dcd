"""Detection: points from frozen patch tokens, by the peaks of one heatmap a class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.evaluate.datasets import Samples
from trainer.evaluate.decoders import BATCH, batches, conv_decoder, fit, tokens_of, upsampling
from trainer.evaluate.features import Features
from trainer.evaluate.scores import Score, bootstrap, f1, match_points
from trainer.evaluate.splits import Fold, held_out

_THRESHOLDS = np.linspace(0.05, 0.95, 19)
_RARE_ODDS = 99  # to one against a point, says an untrained head: points are rare
# Of the penalty-reduced focal loss: arXiv 1904.07850, equation 1.
_FOCUS, _FORGIVE = 2, 4
Points = NDArray[np.float64]
_CPU = torch.device("cpu")


def heatmaps(points: Sequence[NDArray[np.float64]], num_classes: int, shape: tuple[int, int], scale: float) -> Tensor:
    """Gaussians around points (n, 3) of x, y, class, each 1 where its point lies; (B, K, rows, columns) in 0..1.

    shape is rows and columns; `scale` of them, which is also σ, make a tile's pixel.
    """
    found = np.zeros((len(points), num_classes, *shape), dtype=np.float32)
    rows, columns = np.indices(shape)
    for i, tile in enumerate(points):
        for x, y, kind in tile:
            row, column = min(int(y * scale), shape[0] - 1), min(int(x * scale), shape[1] - 1)
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


@dataclass(frozen=True, kw_only=True)
class _Maps:
    """The heatmaps of a dataset's tiles."""

    features: Features
    points: Sequence[Points]
    """(n, 3) of each tile: x, y in its pixels, index of the class"""
    num_classes: int
    radius_px: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        assert self.features.patches is not None, "patch tokens are kept"
        up = upsampling(self.features)
        return self.features.patches.shape[1] * up, self.features.patches.shape[2] * up

    @property
    def scale(self) -> float:
        """Cells of a map per pixel of a tile."""
        return self.shape[0] / self.features.side[0]

    def head(self) -> nn.Module:
        """An untrained head."""
        assert self.features.patches is not None, "patch tokens are kept"
        head = conv_decoder(self.features.patches.shape[3], self.num_classes, upsampling(self.features))
        last = [module for module in head.modules() if isinstance(module, nn.Conv2d)][-1]
        assert last.bias is not None, "a convolution's default"
        nn.init.constant_(last.bias, -math.log(_RARE_ODDS))
        return head

    def targets(self, chosen: NDArray[np.int64]) -> Tensor:
        """What a head is to say of some tiles."""
        return heatmaps([self.points[i] for i in chosen], self.num_classes, self.shape, self.scale)

    def counted(self, head: nn.Module, chosen: NDArray[np.int64], thresholds: Sequence[float]) -> NDArray[np.float64]:
        """Hits, false alarms and misses (n, thresholds, K, 3) of peaks that reach each threshold."""
        device = next(head.parameters()).device
        parts: list[NDArray[np.float64]] = []
        for some in batches(chosen, BATCH):
            with torch.inference_mode():
                maps = head(tokens_of(self.features, some).to(device)).sigmoid().cpu()
            parts.append(self._counted(maps, some, thresholds))
        return np.concatenate(parts)

    def _counted(self, maps: Tensor, chosen: NDArray[np.int64], thresholds: Sequence[float]) -> NDArray[np.float64]:
        parts = np.zeros((len(chosen), len(thresholds), self.num_classes, 3))
        for k in range(self.num_classes):
            for i, (places, heights) in enumerate(peaks(maps[:, k], self.radius_px * self.scale, min(thresholds))):
                truth = self.points[chosen[i]]
                truth = truth[truth[:, 2] == k, :2]
                for t, least in enumerate(thresholds):
                    parts[i, t, k] = self._matched(truth, places[heights >= least] / self.scale)
        return parts

    def _matched(self, truth: Points, found: Points) -> tuple[int, int, int]:
        """Hits, false alarms and misses, but for those so near the tile's edge that their partner may lie beyond it."""
        hit, right = match_points(truth, found, self.radius_px)
        height, width = self.features.side
        border = min(self.radius_px, height / 4, width / 4)  # a small tile keeps its middle
        inner, found_inner = (
            ((places >= border) & (places < (width - border, height - border))).all(axis=1) for places in (truth, found)
        )
        return int((hit & inner).sum()), int((~right & found_inner).sum()), int((~hit & inner).sum())


def score_detection(
    features: Features,
    samples: Samples,
    folds: Sequence[Fold],
    radius_px: float,
    epochs: int,
    seed: int,
    device: torch.device = _CPU,
) -> list[Score]:
    """F1 of points found within a radius of true ones, by a heatmap of each class; mean over the classes.

    The height from which on a peak counts is the one with the best F1 on patients (or slides) that the head did not
    see: the split's `val`, else a fifth of those to be learnt from.
    """
    assert samples.points is not None, "tiles have points"
    points = samples.points
    maps = _Maps(features=features, points=points, num_classes=len(samples.classes), radius_px=radius_px)
    parts: list[NDArray[np.float64]] = []
    for fold in (held_out(samples, fold, seed) for fold in folds):
        assert fold.val is not None, "it was held out"
        head = fit(maps.head, features, fold.train, maps.targets, focal_loss, epochs, seed, device)
        best = np.nan_to_num(f1(maps.counted(head, fold.val, _THRESHOLDS.tolist()).sum(axis=0))).mean(axis=1)
        threshold = float(_THRESHOLDS[best.argmax()])
        parts.append(maps.counted(head, fold.test, [threshold])[:, 0])
    tested = np.concatenate([fold.test for fold in folds])
    groups = None if samples.groups is None else samples.groups[tested]
    num_points = sum(len(points[i]) for i in tested)
    metric = f"F1 within {radius_px:g} px"
    return [bootstrap("detection", metric, np.concatenate(parts), groups, f1, num_points, seed)]
