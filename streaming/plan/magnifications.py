"""Which µm/px tiles have, and how often: a few, or any of a range, given by a density.

A range is taken in steps of 1 %, each a magnification of its own: far below what a random crop changes, and so a plan
knows of each which slides serve it, of which level, at what cost. All is made by additions, multiplications and square
roots, which round alike on every machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from streaming.errors import ConfigError

# The four magnifications of arXiv 2404.15217; their weights are not published, so equal.
DEFAULT_MPP: Mapping[float, float] = {0.25: 1, 0.5: 1, 1.0: 1, 2.0: 1}

_STEP = 1.01
_BANDS = 8
_RANGES = ("uniform", "log_uniform", "density")

Mpp = Mapping[float, float] | Mapping[str, Any]
"""Weights by µm/px, or a range: `{"uniform": [0.25, 2.0]}`, `{"log_uniform": [0.25, 2.0]}` (each doubling as often as
the next) or `{"density": {0.25: 1, 0.5: 3, 2.0: 0}}` (per µm/px, in straight lines between the values)."""


def mpp_weights(mpp: Mpp) -> dict[float, float]:
    """The weight of each µm/px, in rising order; of a range, of the middles of its steps.

    Raises:
        ConfigError: no or negative weights, or a range that is none.
    """
    if not _is_range(mpp):
        return _discrete(cast("Mapping[float, float]", mpp))
    (kind, asked), *others = mpp.items()
    if others or kind not in _RANGES:
        raise ConfigError(
            f"mpp is {dict(mpp)}; it is weights by µm/px, such as {{0.25: 1, 0.5: 1}}, or one of "
            f"{', '.join(_RANGES)}, such as {{uniform: [0.25, 2.0]}}"
        )
    if kind == "density":
        return _spread(*_knots(asked))
    low, high = _ends(str(kind), asked)
    edges = _edges(low, high)
    middles = [math.sqrt(a * b) for a, b in itertools.pairwise(edges)]
    if kind == "uniform":
        return dict(zip(middles, np.diff(edges).tolist(), strict=True))
    # All steps are alike but the last, which ends with the range.
    last = min(1.0, (edges[-1] / edges[-2] - 1) / (_STEP - 1))
    return dict.fromkeys(middles, 1.0) | {middles[-1]: last}


def mpp_named(mpp: Mpp) -> list[float]:
    """The µm/px that somebody named, in rising order: those with a weight; of a range, its ends and knots."""
    named: Any = next(iter(mpp.values())) if _is_range(mpp) else mpp
    return sorted(float(value) for value in named)


def mpp_text(mpp: Mpp) -> str:
    """As one would say it: `0.25, 0.5`, or `0.25 to 2 (log-uniform)`."""
    named = mpp_named(mpp)
    if not _is_range(mpp):
        return ", ".join(f"{value:g}" for value in named)
    return f"{named[0]:g} to {named[-1]:g} ({str(next(iter(mpp))).replace('_', '-')})"


def bands(magnifications: NDArray[np.float64]) -> tuple[list[str], NDArray[np.float64]]:
    """Names and upper ends of bands of rising µm/px, for people: each is one, where there are few."""
    if len(magnifications) <= _BANDS:
        return [f"{value:.4g}" for value in magnifications.tolist()], magnifications
    at = np.linspace(0, len(magnifications) - 1, _BANDS + 1).round().astype(int)
    ends = magnifications[at]
    return [f"{a:.3g} to {b:.3g}" for a, b in itertools.pairwise(ends.tolist())], ends[1:]


def _is_range(mpp: Mpp) -> bool:
    return any(isinstance(key, str) for key in mpp)


def _discrete(mpp: Mapping[float, float]) -> dict[float, float]:
    if not mpp or any(not weight > 0 for weight in mpp.values()):
        raise ConfigError(f"mpp weights are {dict(mpp)}; give at least one, all above 0")
    if not all(0 < float(value) < math.inf for value in mpp):
        raise ConfigError(f"mpp values are {sorted(mpp)}; they are µm/px, above 0")
    # The order in which somebody wrote the mix must not change the tiles.
    return {value: mpp[value] for value in sorted(mpp)}


def _ends(kind: str, asked: object) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in cast("Sequence[Any]", asked))
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low < high < math.inf:
        raise ConfigError(f"mpp {kind} is {asked}; it is the least and the most µm/px, such as [0.25, 2.0]")
    return low, high


def _knots(asked: object) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rising µm/px, and the density there."""
    try:
        pairs = sorted((float(at), float(weight)) for at, weight in cast("Mapping[Any, Any]", asked).items())
    except (AttributeError, TypeError, ValueError):
        pairs = []
    at, weight = (np.array([pair[i] for pair in pairs]) for i in (0, 1))
    if len(at) < 2 or not (at[0] > 0 and np.isfinite(at).all() and (np.diff(at) > 0).all()):
        raise ConfigError(f"mpp density is {asked}; it has at least two µm/px and a weight of each, {{0.25: 1, 2: 1}}")
    if not (np.isfinite(weight).all() and (weight >= 0).all() and weight.any()):
        raise ConfigError(f"mpp density is {asked}; its weights are 0 or more, and not all 0")
    return at, weight


def _edges(low: float, high: float) -> list[float]:
    edges = [low]
    while edges[-1] * _STEP < high:
        edges.append(edges[-1] * _STEP)
    return [*edges, high]


def _spread(at: NDArray[np.float64], density: NDArray[np.float64]) -> dict[float, float]:
    """The weight of each step of a density that has straight lines between its knots: its area there."""
    edges = np.array(_edges(float(at[0]), float(at[-1])))
    points = np.union1d(edges, at)
    heights = np.interp(points, at, density)
    areas = np.diff(points) * (heights[1:] + heights[:-1]) / 2
    until = np.concatenate([[0.0], np.cumsum(areas)])
    weights = np.diff(until[np.searchsorted(points, edges)]).tolist()
    middles = np.sqrt(edges[:-1] * edges[1:]).tolist()
    return {middle: weight for middle, weight in zip(middles, weights, strict=True) if weight > 0}
