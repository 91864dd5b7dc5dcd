"""Splits that keep a patient (or, where patients are not known, a slide) on one side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, GroupShuffleSplit, StratifiedGroupKFold

from streaming.errors import ConfigError
from trainer.evaluate.datasets import Samples

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Indices of samples to fit on, and of those to score."""

    train: Ints
    test: Ints
    val: Ints | None = None
    """samples of neither, to choose a threshold by; None where the dataset names none"""


def make_folds(samples: Samples, num_folds: int = 5, seed: int = 0) -> list[Fold]:
    """The dataset's own split as one fold (scored on `test`, else on `val`), or a cross-validation by groups.

    Raises:
        ConfigError: the split puts one patient or slide on both sides, a side is empty, or there are too few groups.
    """
    if samples.parts is not None:
        check_leaks(samples)
        return [_given(samples)]
    files = np.unique(_files(samples), return_inverse=True)[1].astype(np.int64)
    groups = files if samples.groups is None else samples.groups
    _check_owners(samples, files, groups)
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
        # Each fold's test is to have a patient of every class.
        rarest = min(len(np.unique(groups[samples.labels == code])) for code in range(len(samples.classes)))
        count = min(count, max(rarest, 2))
        parts = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(features, samples.labels, groups)
    folds = [Fold(train=np.asarray(train), test=np.asarray(test)) for train, test in parts if len(test)]
    if samples.labels is not None:
        for fold in folds:
            _check_classes(samples, samples.labels, fold)
    return folds


def held_out(samples: Samples, fold: Fold, seed: int = 0) -> Fold:
    """The fold with samples to choose a threshold by: the split's `val`, or a fifth of its training groups.

    Raises:
        ConfigError: all that is to be learnt from is of one patient or slide.
    """
    if fold.val is not None:
        return fold
    groups = fold.train if samples.groups is None else samples.groups[fold.train]
    if len(np.unique(groups)) < 2:
        raise ConfigError(
            f"{samples.source}: what is to be learnt from is of one patient or slide, and a threshold must be chosen "
            "on another one; add patients, or rows of split val"
        )
    (parts,) = GroupShuffleSplit(1, test_size=0.2, random_state=seed).split(fold.train, groups=groups)
    return Fold(train=fold.train[parts[0]], test=fold.test, val=fold.train[parts[1]])


def leak_warning(samples: Samples) -> str | None:
    """What is to be told of samples that are split without knowing whose they are."""
    if samples.parts is not None or samples.groups is not None:
        return None
    return (
        f"{samples.source}: THE SCORES MAY LEAK: neither patient nor slide of its tiles is known, so they are split at "
        "random, and tiles of one slide are learnt from and scored; give a column patient or slide, or folders "
        "CLASS/PATIENT"
    )


def check_leaks(samples: Samples) -> None:
    """Refuses a given split that puts one patient, slide or file into two of its parts.

    Raises:
        ConfigError: naming one of them.
    """
    assert samples.parts is not None, "there is a split"
    for kind, names in _kinds(samples):
        for one, other in combinations(sorted(set(samples.parts.tolist())), 2):
            both = np.intersect1d(names[samples.parts == one], names[samples.parts == other])
            if len(both):
                raise ConfigError(
                    f"{samples.source}: {kind} {both[0]} is in {one} and in {other} ({len(both)} such); "
                    f"a split must keep each {kind} on one side"
                )


def _files(samples: Samples) -> NDArray[np.str_]:
    """What each sample is read from; the same name twice is the same pixels."""
    return np.array([f"{tile.uri} {tile.region or ''}".strip() for tile in samples.tiles])


def _check_owners(samples: Samples, files: Ints, groups: Ints) -> None:
    """Refuses a file of two patients (or slides): folds by these would have it on both sides.

    Raises:
        ConfigError: naming one.
    """
    first = np.unique(files, return_index=True)[1][files]
    if len(other := np.flatnonzero(groups != groups[first])):
        names = samples.patients if samples.patients is not None else samples.slides
        assert names is not None, "without, each file is a group"
        kind = "patients" if samples.patients is not None else "slides"
        i = int(other[0])
        raise ConfigError(
            f"{samples.source}: {samples.tiles[i].uri} is of two {kind}, {names[first[i]]} and {names[i]} "
            f"({len(other)} such rows); keep one of them"
        )


def _kinds(samples: Samples) -> Iterator[tuple[str, NDArray[np.str_]]]:
    if samples.patients is not None:
        yield "patient", samples.patients
    if samples.slides is not None:
        yield "slide", samples.slides
    yield "file", _files(samples)


def _given(samples: Samples) -> Fold:
    assert samples.parts is not None, "there is a split"
    scored = "test" if (samples.parts == "test").any() else "val"
    val = np.flatnonzero(samples.parts == "val") if scored == "test" else np.zeros(0, np.int64)
    fold = Fold(
        train=np.flatnonzero(samples.parts == "train"),
        test=np.flatnonzero(samples.parts == scored),
        val=val if len(val) else None,
    )
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
            "give another split, or fewer --folds"
        )
    if len(np.unique(labels[fold.train])) < 2:
        raise ConfigError(f"{samples.source}: what is to be learnt from has one class; give another split column")
