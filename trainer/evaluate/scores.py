"""Scores, and their intervals by resampling patients or slides: tiles of one patient are no independent evidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]
NUM_RESAMPLES = 1000
LEVEL = 0.95
_FEWEST_GROUPS = 2


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of a task, with the interval in which it lies if other patients had been drawn."""

    task: str
    metric: str
    value: float
    low: float
    """lower end of the 95 % interval; NaN where nothing could be resampled"""
    high: float
    """its upper end"""
    n: int
    """tiles, slides or points that were scored"""
    groups: int = 0
    """patients or slides that were resampled"""


def bootstrap(
    task: str,
    metric: str,
    parts: Floats,
    groups: Ints | None,
    statistic: Callable[[Floats], Floats],
    n: int | None = None,
    seed: int = 0,
) -> Score:
    """The score of a statistic of sums, its interval by the percentiles of 1,000 resamples of whole groups.

    parts (N, …) are what each sample adds to the sums, groups (N,) the patient (or slide) it is of; None: not known, so
    no interval. statistic maps sums (B, …) to values (B,); NaN where a resample has none.
    """
    value = float(statistic(parts.sum(axis=0)[None].astype(np.float64))[0])
    low, high, num_groups = math.nan, math.nan, 0
    if groups is not None:
        of_group = np.unique(groups, return_inverse=True)[1]
        num_groups = int(of_group.max()) + 1
        sums = np.zeros((num_groups, *parts.shape[1:]))
        np.add.at(sums, of_group, parts)
        if num_groups >= _FEWEST_GROUPS:
            low, high = _percentiles(statistic(np.tensordot(_resamples(num_groups, seed), sums, axes=1)))
    counted = len(parts) if n is None else n
    return Score(task=task, metric=metric, value=value, low=low, high=high, n=counted, groups=num_groups)


def _resamples(num_groups: int, seed: int) -> Floats:
    """How often each group is drawn, in each of the resamples; (NUM_RESAMPLES, num_groups)."""
    random = np.random.default_rng(seed)
    return random.multinomial(num_groups, np.full(num_groups, 1 / num_groups), NUM_RESAMPLES).astype(np.float64)


def _percentiles(values: Floats) -> tuple[float, float]:
    ends = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    low, high = np.nanquantile(values, ends) if np.isfinite(values).any() else (math.nan, math.nan)
    return float(low), float(high)


def balanced_accuracy(
    task: str, labels: Ints, predicted: Ints, groups: Ints | None, num_classes: int, seed: int = 0
) -> Score:
    """Mean over classes of the share of their samples that were recognised; labels and predicted (N,)."""
    cells = np.zeros((len(labels), num_classes, 2))
    rows = np.arange(len(labels))
    cells[rows, labels, 0] = labels == predicted
    cells[rows, labels, 1] = 1
    return bootstrap(task, "balanced accuracy", cells, groups, mean_of_shares, seed=seed)


def share(task: str, metric: str, hits: Floats, counts: Floats, groups: Ints | None, seed: int = 0) -> Score:
    """Hits among counts, summed over samples (N,) each."""
    return bootstrap(task, metric, np.stack([hits, counts], axis=1)[:, None], groups, mean_of_shares, seed=seed)


def mean_of_shares(sums: Floats) -> Floats:
    """Mean over K of hits / counts of sums (B, K, 2); a class that a resample has none of does not count."""
    hits, counts = sums[..., 0], sums[..., 1]
    shares = np.divide(hits, counts, out=np.zeros_like(hits), where=counts > 0)
    return _over(shares.sum(axis=1), (counts > 0).sum(axis=1))


def mean_f1(sums: Floats) -> Floats:
    """Mean over K of F1 = 2·TP / (2·TP + FP + FN), which is Dice for pixels, of sums (B, K, 3) of TP, FP, FN.

    A class that neither the truth nor the prediction has does not count.
    """
    twice_hit = 2 * sums[..., 0]
    total = twice_hit + sums[..., 1] + sums[..., 2]
    values = np.divide(twice_hit, total, out=np.zeros_like(total), where=total > 0)
    return _over(values.sum(axis=1), (total > 0).sum(axis=1))


def _over(sums: Floats, counts: Ints) -> Floats:
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def auroc(task: str, labels: Ints, probabilities: Floats, groups: Ints | None, seed: int = 0) -> Score:
    """Area under the ROC curve, macro one-against-rest for more than two classes; probabilities (N, K)."""
    num_classes = probabilities.shape[1]
    of_group = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    num_groups = int(of_group.max()) + 1
    member = np.eye(num_groups)[of_group]
    columns = range(1, 2) if num_classes == 2 else range(num_classes)
    # Pairs of a positive and a negative, added up by their groups: a resample weighs them by both.
    won, pairs = np.zeros((2, len(columns), num_groups, num_groups))
    for i, k in enumerate(columns):
        positive, values = labels == k, probabilities[:, k]
        above = np.sign(values[positive][:, None] - values[~positive]) / 2 + 0.5
        won[i] = member[positive].T @ above @ member[~positive]
        pairs[i] = np.outer(member[positive].sum(axis=0), member[~positive].sum(axis=0))

    def areas(times: Floats) -> Floats:
        sums = [np.einsum("bg,kgh,bh->bk", times, part, times, optimize=True) for part in (won, pairs)]
        return np.divide(*sums, out=np.full_like(sums[0], np.nan), where=sums[1] > 0).mean(axis=1)

    value, low, high = float(areas(np.ones((1, num_groups)))[0]), math.nan, math.nan
    if groups is not None and num_groups >= _FEWEST_GROUPS:
        low, high = _percentiles(areas(_resamples(num_groups, seed)))
    counted = 0 if groups is None else num_groups
    return Score(task=task, metric="AUROC", value=value, low=low, high=high, n=len(labels), groups=counted)


def match_points(truth: Floats, found: Floats, radius: float) -> tuple[int, int, int]:
    """Hits, false alarms and misses of points (n, 2) against (m, 2): as many pairs within the radius as there can be.

    Each point is used once; among pairings of equal number, the nearest.
    """
    if not len(truth) or not len(found):
        return 0, len(found), len(truth)
    distance = cdist(truth, found)
    # One pair out of reach costs more than all within it, so that the number of those within is the highest.
    far = (min(distance.shape) + 1) * max(radius, 1e-9)
    rows, columns = linear_sum_assignment(np.where(distance <= radius, distance, far))
    hits = int((distance[rows, columns] <= radius).sum())
    return hits, len(found) - hits, len(truth) - hits
