"""Scores, and their intervals by resampling patients or slides: tiles of one patient are no independent evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
FEWEST_GROUPS = 10
"""with fewer patients or slides, the percentiles of their resamples say nothing"""
_AT_ONCE = 1 << 21  # weights of resamples that are held at a time


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of a task, with the interval in which it lies if others of the patients scored had been drawn.

    The interval is of the fitted heads as they are: that other patients to learn from would have given others is not in
    it.
    """

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
    """patients or slides that they are of"""
    stdev: float = math.nan
    """standard deviation over runs of the head; NaN where it was trained once"""


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
    no interval, as below ten groups. statistic maps sums (B, …) to values (B, K) of classes, NaN where there is nothing
    of one; the score is their mean.
    """
    of_group, num_groups = _groups(groups, len(parts))
    sums = np.zeros((num_groups, *parts.shape[1:]))
    np.add.at(sums, of_group, parts)
    value, low, high = _with_interval(
        lambda times: statistic(np.tensordot(times, sums, axes=1)), num_groups, seed, resampled=groups is not None
    )
    counted = len(parts) if n is None else n
    known = 0 if groups is None else num_groups
    return Score(task=task, metric=metric, value=value, low=low, high=high, n=counted, groups=known)


def _groups(groups: Ints | None, num: int) -> tuple[Ints, int]:
    """The index of each sample's group, and how many there are."""
    of_group = np.zeros(num, np.int64) if groups is None else np.unique(groups, return_inverse=True)[1].astype(np.int64)
    return of_group, int(of_group.max(initial=0)) + 1


def _with_interval(
    classes: Callable[[Floats], Floats], num_groups: int, seed: int, *, resampled: bool
) -> tuple[float, float, float]:
    """The mean over the classes, and the ends of its interval.

    classes maps how often each group counts, (B, num_groups), to a value of each class (B, K), NaN where there is
    nothing of it. A class that is nowhere does not count; a resample without one that counts is left out, as the mean
    of the others is another number.
    """
    found = classes(np.ones((1, num_groups)))[0]
    there = ~np.isnan(found)
    if not there.any():
        return math.nan, math.nan, math.nan
    value = float(found[there].mean())
    if not resampled or num_groups < FEWEST_GROUPS:
        return value, math.nan, math.nan
    random, left, values = np.random.default_rng(seed), NUM_RESAMPLES, list[Floats]()
    while left:
        count = min(left, max(1, _AT_ONCE // num_groups))
        times = random.multinomial(num_groups, np.full(num_groups, 1 / num_groups), count).astype(np.float64)
        values.append(classes(times)[:, there].mean(axis=1))
        left -= count
    every = np.concatenate(values)
    if not np.isfinite(every).any():
        return value, math.nan, math.nan
    low, high = np.nanquantile(every, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return value, float(low), float(high)


def balanced_accuracy(
    task: str, labels: Ints, predicted: Ints, groups: Ints | None, num_classes: int, seed: int = 0
) -> Score:
    """Mean over classes of the share of their samples that were recognised; labels and predicted (N,)."""
    cells = np.zeros((len(labels), num_classes, 2))
    rows = np.arange(len(labels))
    cells[rows, labels, 0] = labels == predicted
    cells[rows, labels, 1] = 1
    return bootstrap(task, "balanced accuracy", cells, groups, shares, seed=seed)


def share(task: str, metric: str, hits: Floats, counts: Floats, groups: Ints | None, seed: int = 0) -> Score:
    """Hits among counts, summed over samples (N,) each."""
    return bootstrap(task, metric, np.stack([hits, counts], axis=1)[:, None], groups, shares, seed=seed)


def shares(sums: Floats) -> Floats:
    """Hits / counts (B, K) of sums (B, K, 2); NaN where nothing is counted."""
    return _over(sums[..., 0], sums[..., 1])


def f1(sums: Floats) -> Floats:
    """F1 = 2·TP / (2·TP + FP + FN), which is Dice for pixels, (B, K) of sums (B, K, 3) of TP, FP, FN.

    NaN of a class that neither the truth nor the prediction has.
    """
    twice_hit = 2 * sums[..., 0]
    return _over(twice_hit, twice_hit + sums[..., 1] + sums[..., 2])


def _over(hits: Floats, counts: Floats) -> Floats:
    return np.divide(hits, counts, out=np.full(hits.shape, np.nan), where=counts > 0)


def auroc(task: str, labels: Ints, probabilities: Floats, groups: Ints | None, folds: Ints, seed: int = 0) -> Score:
    """Area under the ROC curve, macro one-against-rest for more than two classes; probabilities (N, K).

    folds (N,) tells which model each sample was scored by. Areas are those within a fold, averaged over the folds that
    have both sides: models' probabilities are not to be ranked against each other (without any signal, one that has
    seen fewer of a class gives it less in the very fold that has more of it, and pooled folds come out below 0.5).
    """
    num_classes = probabilities.shape[1]
    of_group, num_groups = _groups(groups, len(labels))
    ranked = [
        [_Ranked.of(labels[own] == k, probabilities[own, k], of_group[own]) for own in _by_value(folds)]
        for k in (range(1, 2) if num_classes == 2 else range(num_classes))
    ]

    def areas(times: Floats) -> Floats:
        # Samples of a group are drawn together.
        step = max(1, _AT_ONCE // len(labels))
        return np.concatenate([_mean_areas(ranked, times[at : at + step]) for at in range(0, len(times), step)])

    value, low, high = _with_interval(areas, num_groups, seed, resampled=groups is not None)
    counted = 0 if groups is None else num_groups
    return Score(task=task, metric="AUROC", value=value, low=low, high=high, n=len(labels), groups=counted)


def _by_value(codes: Ints) -> list[Ints]:
    return [np.flatnonzero(codes == code) for code in np.unique(codes)]


@dataclass(frozen=True, kw_only=True)
class _Ranked:
    """Samples of one fold in the order of their probability of one class."""

    positive: NDArray[np.bool_]
    group: Ints
    first: Ints
    """of each, the place of the first of equal probability"""
    behind: Ints
    """of each, the place after the last of equal probability"""

    @classmethod
    def of(cls, positive: NDArray[np.bool_], probability: Floats, group: Ints) -> _Ranked:
        order = np.argsort(probability, kind="stable")
        ordered = probability[order]
        first, behind = (np.searchsorted(ordered, ordered, side=side) for side in ("left", "right"))
        return cls(positive=positive[order], group=group[order], first=first, behind=behind)

    def areas(self, times: Floats) -> Floats:
        """Areas (B,) where groups count so often, (B, num_groups); NaN without both sides."""
        weight = times[:, self.group]
        negative = np.zeros((len(times), len(self.group) + 1))
        np.cumsum(np.where(self.positive, 0, weight), axis=1, out=negative[:, 1:])
        weight, first, behind = weight[:, self.positive], self.first[self.positive], self.behind[self.positive]
        # Of each positive, the negatives below it, and half of those beside it.
        won = (weight * (negative[:, first] + negative[:, behind])).sum(axis=1) / 2
        return _over(won, weight.sum(axis=1) * negative[:, -1])


def _mean_areas(ranked: Sequence[Sequence[_Ranked]], times: Floats) -> Floats:
    """Means (B, classes) over the folds that have both sides."""
    found = np.stack([[fold.areas(times) for fold in folds] for folds in ranked])  # classes, folds, B
    there = ~np.isnan(found)
    return _over(np.where(there, found, 0).sum(axis=1), there.sum(axis=1)).T


def match_points(truth: Floats, found: Floats, radius: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the points (n, 2), and of (m, 2), have a partner within the radius: as many pairs as there can be.

    Each point is used once; among pairings of equal number, the nearest.
    """
    hit, right = np.zeros(len(truth), dtype=bool), np.zeros(len(found), dtype=bool)
    if not len(truth) or not len(found):
        return hit, right
    distance = cdist(truth, found)
    # One pair out of reach costs more than all within it, so that the number of those within is the highest.
    far = (min(distance.shape) + 1) * max(radius, 1e-9)
    rows, columns = linear_sum_assignment(np.where(distance <= radius, distance, far))
    near = distance[rows, columns] <= radius
    hit[rows[near]] = right[columns[near]] = True
    return hit, right
