"""Groups of slides that are drawn by weights of their own: by cohort, by organ, by any columns of the catalog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from streaming.catalog import Catalog
from streaming.errors import ConfigError

_NAMELESS = "none"
_SEPARATOR = "/"


@dataclass(frozen=True, kw_only=True)
class Strata:
    """Slides that have the same values in some columns of the catalog are a stratum, which has a share of all draws."""

    columns: tuple[str, ...] = ()
    """columns of metadata whose values together name a stratum, such as organ and site; empty: all slides are one"""
    power: float = 1.0
    """a stratum is drawn as its number of slides to this power: 1 all slides alike, 0 all strata alike"""
    weights: dict[str, float] = field(default_factory=dict)
    """weights by stratum (`lung`, of several columns `lung/A7`) in place of the power; others are not drawn"""

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise ConfigError(f"strata.power is {self.power}; it is from 0 (all strata alike) to 1 (all slides alike)")
        if self.weights and not self.columns:
            raise ConfigError(f"strata.weights are {self.weights}, but no strata.columns say whose values these are")
        if self.weights and self.power != 1:
            raise ConfigError(f"strata.power is {self.power} and strata.weights are {self.weights}; give one of them")
        if any(not weight > 0 for weight in self.weights.values()):
            raise ConfigError(f"strata weights are {self.weights}; they are all above 0; leave out what is not drawn")


def of_cohorts(cohorts: Mapping[str, float] | None, strata: Strata) -> Strata:
    """The strata of a run: those given, or its cohorts.

    Raises:
        ConfigError: both are given, or cohorts without any.
    """
    if cohorts is None:
        return strata
    if strata.columns:
        raise ConfigError(f"cohorts {dict(cohorts)} and strata by {', '.join(strata.columns)}; give one of them")
    if not cohorts:
        raise ConfigError("cohorts weights are {}; give at least one, all above 0")
    return Strata(columns=("cohort",), weights=dict(cohorts))


@dataclass(frozen=True)
class Members:
    """Whose slides are of which stratum."""

    names: list[str]
    weights: NDArray[np.float64]
    """(strata,)"""
    stratum: NDArray[np.int64]
    """(slides,); -1: of none that is drawn"""
    left_out: NDArray[np.bool_]
    """(slides,), those of strata that have no weight"""


def members(catalog: Catalog, strata: Strata, serves: NDArray[np.bool_]) -> Members:
    """The strata of a catalog; serves, bool (slides,), are those slides that can give tiles at all.

    The order of strata is that of their names, so that neither the slides' order nor that of the weights matters.

    Raises:
        CatalogError: it lacks a column.
    """
    if not strata.columns:
        return Members(["all"], np.ones(1), np.zeros(len(serves), np.int64), np.zeros(len(serves), np.bool_))
    of_slide = _names(catalog, strata)
    if strata.weights:
        names = sorted(strata.weights)
    else:
        names = sorted({name for name, can in zip(of_slide, serves.tolist(), strict=True) if can})
    at = {name: number for number, name in enumerate(names)}
    stratum = np.array([at.get(name, -1) for name in of_slide], dtype=np.int64)
    if strata.weights:
        return Members(names, np.array([strata.weights[name] for name in names]), stratum, stratum < 0)
    counts = np.bincount(stratum[serves], minlength=len(names))
    # Decimal's power is the same to the last digit on every machine; that of a mathematical library need not be.
    power = Decimal(repr(strata.power))
    weights = np.array([float(Decimal(count) ** power) for count in counts.tolist()])
    return Members(names, weights, stratum, np.zeros(len(serves), np.bool_))


def known_names(catalog: Catalog, strata: Strata) -> Sequence[str]:
    """All names that strata of a catalog have, the most frequent first, for messages."""
    found, counts = np.unique(np.array(_names(catalog, strata)), return_counts=True)
    return [str(name) for name in found[np.argsort(-counts, kind="stable")]]


def _names(catalog: Catalog, strata: Strata) -> list[str]:
    """Each slide's stratum."""
    values = [catalog.metadata(column) for column in strata.columns]
    return [_SEPARATOR.join(value or _NAMELESS for value in row) for row in zip(*values, strict=True)]
