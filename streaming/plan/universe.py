"""Which tiles a run may draw, and in what order: arithmetic on numbers of slides and tiles, for `TilePlan`.

Data-scaling studies shrink the universe (a share of the patients, so many distinct tiles of each slide); runs without
replacement go through it tile by tile; runs on slides that must be staged go through it in windows of few slides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from streaming.errors import ConfigError
from streaming.plan.counter_random import Indices, hashed, permuted, text_keys
from streaming.plan.decisions import Decision

_MAX_BLOCK = 10_000


@dataclass(frozen=True, kw_only=True)
class Universe:
    """The part of the catalog's tiles that a run may draw, and the order."""

    slides: float = 1.0
    """share of the slides, chosen by patient (metadata column `patient`); smaller shares lie within larger ones"""
    tiles_per_slide: int | None = None
    """distinct tiles of each slide; fewer lie within more; none: no bound"""
    replacement: bool = True
    """whether a tile may come again before all others came; false needs `tiles_per_slide`, or a list of tiles"""
    seed: int = 0
    """decides which slides and tiles, whatever the seed of the run"""
    window: int | None = None
    """tiles in a row that come from few slides, so that each staged slide is fetched once; none: from all slides"""
    window_slides: int = 64
    """slides of a window; the staging cache should hold those of two windows"""

    def __post_init__(self) -> None:
        if not 0 < self.slides <= 1:
            raise ConfigError(f"universe.slides is {self.slides} (--slides); it is a share above 0 and up to 1")
        for name in ("tiles_per_slide", "window", "window_slides"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"universe.{name} is {value} (--{name.replace('_', '-')}); it must be at least 1")
        if not self.replacement and self.window is not None:
            raise ConfigError(
                "universe.window (--window) draws with replacement; set universe.replacement true (leave out "
                "--no-replacement), or leave out the window"
            )

    def check_ends(self) -> None:
        """Refuses to go without replacement through tiles that have no end, as all on tissue are.

        Raises:
            ConfigError: naming what bounds them.
        """
        if not self.replacement and self.tiles_per_slide is None:
            raise ConfigError(
                "universe.replacement is false (--no-replacement), but without universe.tiles_per_slide "
                "(--tiles-per-slide) the tiles have no end; set it"
            )

    @property
    def draws_tiles(self) -> bool:
        """Whether the plan picks a slide's tile first and then asks for its magnification."""
        return self.tiles_per_slide is not None or self.window is not None


@dataclass(frozen=True)
class HeldOut:
    """Slides that are kept apart for good, chosen by patient with the universe's seed."""

    share: float
    """of all slides, above 0 and below 1"""
    is_drawn: bool = False
    """whether they are drawn instead of the others"""


def chosen_slides(slides: Sequence[str], patients: Sequence[str | None], share: float, seed: int) -> NDArray[np.bool_]:
    """Which slides a share of them is, bool (n,): all slides of the first patients in the order of their hashes.

    A slide without patient is a patient of its own. Patients are taken until they have that share of the slides.
    """
    if share >= 1:
        return np.ones(len(slides), dtype=np.bool_)
    ids = patient_ids(slides, patients)
    counts = np.bincount(ids)
    # A patient's place must not depend on who else is in the catalog.
    names = np.empty(len(counts), dtype=object)
    names[ids] = [_name(slide, patient) for slide, patient in zip(slides, patients, strict=True)]
    keys = hashed(seed, Decision.PATIENT, text_keys([str(name) for name in names]))
    order = np.argsort(keys, kind="stable")
    wanted = share * len(slides) * (1 - 1e-12)
    taken = np.concatenate([[0], np.cumsum(counts[order])[:-1]]) < wanted
    return np.isin(ids, order[taken])


def drawn_slides(
    slides: Sequence[str], patients: Sequence[str | None], universe: Universe, held_out: HeldOut | None
) -> NDArray[np.bool_]:
    """Which slides are drawn from, bool (n,). What is held out are the last patients in the order of hashes.

    Raises:
        ConfigError: something is to be held out, but the first patients have all slides.
    """
    chosen = chosen_slides(slides, patients, universe.slides, universe.seed)
    if held_out is None:
        return chosen
    held = ~chosen_slides(slides, patients, 1 - held_out.share, universe.seed)
    if not held.any():
        num_patients = len(np.unique(patient_ids(slides, patients)))
        raise ConfigError(
            f"validation_slides {held_out.share} of {len(slides)} slides of {num_patients} patients would hold nobody "
            "out; raise it, or set it to 0"
        )
    return held if held_out.is_drawn else chosen & ~held


def patient_ids(slides: Sequence[str], patients: Sequence[str | None]) -> Indices:
    """A number for each slide's patient, int64 (n,)."""
    names = [_name(slide, patient) for slide, patient in zip(slides, patients, strict=True)]
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)


def _name(slide: str, patient: str | None) -> str:
    return f"patient {patient}" if patient else f"slide {slide}"


def block_quotas(weights: Sequence[float]) -> Indices:
    """How many of the indices of one block each choice gets: the smallest whole numbers in the ratio of the weights.

    Raises:
        ConfigError: no block of at most 10,000 indices has that ratio.
    """
    ratios = [Fraction(weight).limit_denominator(1_000_000) for weight in weights]
    whole = math.lcm(*(ratio.denominator for ratio in ratios))
    counts = [int(ratio * whole) for ratio in ratios]
    common = math.gcd(*counts)
    quotas = np.array([count // max(1, common) for count in counts], dtype=np.int64)
    if quotas.min() < 1 or quotas.sum() > _MAX_BLOCK:
        raise ConfigError(
            f"weights {list(weights)} without replacement need blocks of {quotas.sum():,} tiles; give ratios of small "
            f"whole numbers (at most {_MAX_BLOCK:,} together), such as 3 and 1"
        )
    return quotas


def exhaustive(index: Indices, quotas: Indices, sizes: Indices, seed: int) -> tuple[Indices, Indices]:
    """The stratum of each index and its position in it, so that each position comes once per epoch of its stratum.

    Every block of sum(quotas) indices has quotas[s] of stratum s, in an order of its own; each epoch of sizes[s]
    positions has an order of its own.
    """
    block_size = quotas.sum()
    starts = np.concatenate([[0], np.cumsum(quotas)])
    block, place = index // block_size, index % block_size
    if block_size > 1:
        place = permuted(place, block_size, hashed(seed, Decision.BLOCK_ORDER, block))
    stratum = np.searchsorted(starts, place, side="right") - 1
    count = block * quotas[stratum] + place - starts[stratum]
    size = sizes[stratum]
    key = hashed(seed, Decision.EPOCH_ORDER, stratum, count // size)
    return stratum, permuted(count % size, size, key)


def window_shares(window_slides: int, weights: NDArray[np.float64], sizes: Indices) -> Indices:
    """How many of a window's slides each stratum gets: in proportion to its weight, at least one, at most all it has.

    Raises:
        ConfigError: there are more strata than slides in a window.
    """
    if window_slides < len(weights):
        raise ConfigError(
            f"universe.window_slides (--window-slides) is {window_slides}, but there are {len(weights)} strata; "
            "take at least that many"
        )
    total = math.fsum(weights.tolist())
    shares = np.maximum(1, np.floor(window_slides * weights / total + 1e-9)).astype(np.int64)
    return np.minimum(shares, sizes)


def dealt(window: Indices, slot: Indices, stratum: Indices, shares: Indices, sizes: Indices, seed: int) -> Indices:
    """The position in its stratum of the slide that lies in a window's slot; all (n,).

    A stratum's slides are dealt to the windows one after the other in a random order, then anew in another.
    """
    count, size = window * shares[stratum] + slot, sizes[stratum]
    return permuted(count % size, size, hashed(seed, Decision.WINDOW_DEAL, stratum, count // size))


@dataclass(frozen=True, kw_only=True)
class ShuffleQuality:
    """How many slides and patients a batch mixes, against independent draws."""

    batch: int
    slides: float
    """distinct slides of a batch, mean"""
    patients: float
    """distinct patients of a batch, mean"""
    independent_slides: float
    """distinct slides of as many independent draws, expectation"""
    independent_patients: float
    """distinct patients of as many independent draws, expectation"""

    def line(self) -> str:
        """The numbers in one line."""
        return (
            f"a batch of {self.batch} tiles mixes {self.slides:.1f} slides of {self.patients:.1f} patients: "
            f"{self.slides / self.independent_slides:.0%} and {self.patients / self.independent_patients:.0%} of what "
            f"independent draws would ({self.independent_slides:.1f} and {self.independent_patients:.1f})"
        )


def shuffle_quality(
    batches: Iterable[NDArray[np.int32]], shares: NDArray[np.float64], patients: Indices
) -> ShuffleQuality:
    """The quality of batches, each the slides (rows of the catalog) of its tiles; at least one, all of one size.

    shares is each slide's share of all draws (float64, sums to 1), patients the number of its patient.
    """
    found = [(len(rows), len(np.unique(rows)), len(np.unique(patients[rows]))) for rows in batches]
    size = found[0][0]
    by_patient = np.bincount(patients, weights=shares)
    return ShuffleQuality(
        batch=size,
        slides=float(np.mean([slides for _, slides, _ in found])),
        patients=float(np.mean([several for _, _, several in found])),
        independent_slides=float((1 - (1 - shares) ** size).sum()),
        independent_patients=float((1 - (1 - np.minimum(1, by_patient)) ** size).sum()),
    )
