"""Splits that keep a patient (or, where patients are not known, a slide) on one side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from streaming.errors import ConfigError
from trainer.evaluate.datasets import Samples

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Indices of samples to fit on, and of those to score."""

    train: Ints
    test: Ints


def make_folds(samples: Samples, num_folds: int = 5, seed: int = 0) -> list[Fold]:
    """The dataset's own split as one fold (scored on `test`, else on `val`), or a cross-validation by groups.

    Raises:
        ConfigError: the split puts one patient or slide on both sides, a side is empty, or there are too few groups.
    """
    if samples.parts is not None:
        check_leaks(samples)
        return [_given(samples)]
    groups = samples.groups
    groups = np.arange(len(samples)) if groups is None else groups
    num_groups = len(np.unique(groups))
    if num_groups < 2:
        raise ConfigError(
            f"{samples.source}: all {len(samples)} samples are of one patient or slide; a split needs two or more"
        )
    count, features = min(num_folds, num_groups), np.zeros((len(samples), 1))
    if samples.labels is None:
        parts = GroupKFold(count, shuffle=True, random_state=seed).split(features, groups=groups)
    else:
        _check_spread(samples, groups)
        rarest = int(np.bincount(samples.labels).min())
        count = min(count, max(rarest, 2))
        parts = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(features, samples.labels, groups)
    folds = [Fold(train=np.asarray(train), test=np.asarray(test)) for train, test in parts if len(test)]
    if samples.labels is not None:
        for fold in folds:
            _check_classes(samples, samples.labels, fold)
    return folds


def check_leaks(samples: Samples) -> None:
    """Refuses a given split that puts one patient, slide or file into two of its parts.

    Raises:
        ConfigError: naming one of them.
    """
    assert samples.parts is not None, "there is a split"
    files = np.array([f"{tile.uri} {tile.region or ''}".strip() for tile in samples.tiles])
    for kind, names in _kinds(samples, files):
        for one, other in combinations(sorted(set(samples.parts.tolist())), 2):
            both = np.intersect1d(names[samples.parts == one], names[samples.parts == other])
            if len(both):
                raise ConfigError(
                    f"{samples.source}: {kind} {both[0]} is in {one} and in {other} ({len(both)} such); "
                    f"a split must keep each {kind} on one side"
                )


def _kinds(samples: Samples, files: NDArray[np.str_]) -> Iterator[tuple[str, NDArray[np.str_]]]:
    if samples.patients is not None:
        yield "patient", samples.patients
    if samples.slides is not None:
        yield "slide", samples.slides
    yield "file", files


def _given(samples: Samples) -> Fold:
    assert samples.parts is not None, "there is a split"
    scored = "test" if (samples.parts == "test").any() else "val"
    fold = Fold(train=np.flatnonzero(samples.parts == "train"), test=np.flatnonzero(samples.parts == scored))
    if not len(fold.train) or not len(fold.test):
        found = ", ".join(sorted(set(samples.parts.tolist())))
        raise ConfigError(f"{samples.source}: the split has {found} alone; it needs train, and test or val")
    if samples.labels is not None:
        _check_classes(samples, samples.labels, fold)
    return fold


def _check_spread(samples: Samples, groups: Ints) -> None:
    assert samples.labels is not None, "they are labelled"
    for code, name in enumerate(samples.classes):
        own = np.unique(groups[samples.labels == code])
        if len(own) == 1:
            kind = "patient" if samples.patients is not None else "slide" if samples.slides is not None else "image"
            raise ConfigError(
                f"{samples.source}: class {name!r} comes from one {kind} alone, so that no split can have it on both "
                "sides; add others of it, or leave it out"
            )


def _check_classes(samples: Samples, labels: Ints, fold: Fold) -> None:
    missing = np.setdiff1d(labels[fold.test], labels[fold.train])
    if len(missing):
        raise ConfigError(
            f"{samples.source}: class {samples.classes[missing[0]]!r} is to be scored, and not to be learnt from; "
            "give a split column, or fewer --folds"
        )
    if len(np.unique(labels[fold.train])) < 2:
        raise ConfigError(f"{samples.source}: what is to be learnt from has one class; give another split column")
