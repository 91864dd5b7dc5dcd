import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from streaming.errors import ConfigError
from streaming.plan import TilePlan
from streaming.plan.magnifications import mpp_named, mpp_text, mpp_weights
from streaming.plan.universe import Universe
from tests.streaming.plan.test_plan import CATALOG
from trainer.run.config import parse_config

UNIFORM = {"uniform": [0.25, 2.0]}


def areas(at: np.ndarray) -> np.ndarray:
    """Distribution of µm/px under the density of `DENSITY`, by its triangles."""
    rising = 0.5 * 12 * np.clip(at - 0.25, 0, 0.25) ** 2
    left = np.clip(2.0 - np.maximum(at, 0.5), 0, 1.5)
    falling = 0.5 * 3 * 1.5 - 0.5 * 2 * left**2
    return (rising + np.where(at > 0.5, falling, 0)) / (0.5 * 12 * 0.0625 + 2.25)


DENSITY = {"density": {0.25: 0, 0.5: 3, 2.0: 0}}


@pytest.mark.parametrize(
    ("mpp", "distribution"),
    [
        (UNIFORM, stats.uniform(0.25, 1.75).cdf),
        ({"log_uniform": [0.25, 2.0]}, stats.loguniform(0.25, 2.0).cdf),
        (DENSITY, areas),
    ],
)
def test_a_million_draws_of_a_range_follow_its_density(mpp: dict, distribution) -> None:
    drawn = TilePlan(CATALOG, mpp=mpp, mpp_tolerance=0.0).specs(np.arange(1_000_000)).mpp
    values, counts = np.unique(drawn, return_counts=True)
    assert len(values) > 200
    edges = np.minimum(0.25 * 1.01 ** np.arange(len(values) + 1), 2.0)
    expected = np.diff(distribution(edges)) * 1_000_000
    assert (np.abs(values / np.sqrt(edges[1:] * edges[:-1]) - 1) < 1e-12).all()
    often = expected > 50
    assert stats.chisquare(counts[often], expected[often] * counts[often].sum() / expected[often].sum()).pvalue > 1e-4


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 10), st.floats(1.0001, 100), st.sampled_from(["uniform", "log_uniform"]))
def test_a_range_has_steps_of_one_percent_within_its_ends(low: float, times: float, kind: str) -> None:
    high = low * times
    weights = mpp_weights({kind: [low, high]})
    values = list(weights)
    assert low < values[0]
    assert values[-1] < high
    assert all(0 < after / before - 1 <= 0.0101 for before, after in itertools.pairwise(values))
    assert all(weight > 0 for weight in weights.values())
    if kind == "uniform":
        assert sum(weights.values()) == pytest.approx(high - low)


def test_a_flat_density_is_uniform() -> None:
    flat, uniform = mpp_weights({"density": {0.25: 2, 2.0: 2}}), mpp_weights(UNIFORM)
    assert list(flat) == list(uniform)
    assert list(flat.values()) == pytest.approx([2 * weight for weight in uniform.values()], rel=1e-9)


def test_an_index_of_a_range_gives_the_same_tile_alone_and_among_others_and_in_any_part() -> None:
    plan = TilePlan(CATALOG, mpp=UNIFORM)
    specs = plan.specs(np.arange(300))
    for index in (0, 17, 299):
        alone = plan[index]
        assert (alone.x, alone.y, alone.mpp) == (specs.x[index], specs.y[index], specs.mpp[index])
        assert plan.slides[specs.slide[index]] == alone.slide


def test_a_bounded_universe_of_a_range_lies_within_a_larger_one() -> None:
    def tiles(number: int) -> set[tuple]:
        plan = TilePlan(CATALOG, mpp=UNIFORM, universe=Universe(tiles_per_slide=number, replacement=False))
        specs = plan.specs(np.arange(number * 3))
        return set(zip(specs.slide.tolist(), specs.x.tolist(), specs.y.tolist(), specs.mpp.tolist(), strict=True))

    few, many = tiles(20), tiles(60)
    assert len(few) == 60
    assert few < many


def test_own_pixels_are_taken_within_the_tolerance_and_the_very_ones_without() -> None:
    index = np.arange(3_000)
    exact = TilePlan(CATALOG, mpp=UNIFORM, mpp_tolerance=0.0).specs(index)
    assert np.array_equal(exact.own_mpp, exact.mpp)
    own = TilePlan(CATALOG, mpp=UNIFORM, mpp_tolerance=0.05).specs(index)
    off = own.own_mpp / own.mpp - 1
    assert np.abs(off).max() <= 0.05 + 1e-9
    assert np.count_nonzero(off) > 100


@pytest.mark.parametrize(
    ("mpp", "said"),
    [
        ({"uniform": [2.0, 0.25]}, "the least and the most"),
        ({"uniform": 0.5}, "the least and the most"),
        ({"uniform": [0.25, 1, 2]}, "the least and the most"),
        ({"uniform": ["a", "b"]}, "the least and the most"),
        ({"log_uniform": [0, 1]}, "the least and the most"),
        ({"gauss": [0.25, 1]}, "one of uniform, log_uniform, density"),
        ({"uniform": [0.25, 1], "density": {0.5: 1, 1: 1}}, "one of uniform"),
        ({"density": {0.5: 1}}, "at least two"),
        ({"density": [0.5, 1]}, "at least two"),
        ({"density": {0.5: 0, 1: 0}}, "not all 0"),
        ({"density": {0.5: -1, 1: 2}}, "0 or more"),
    ],
)
def test_what_is_no_range_is_refused_in_one_line(mpp: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        mpp_weights(mpp)
    assert "\n" not in str(told.value)


def test_a_configuration_holds_a_range_as_it_was_written() -> None:
    config = parse_config({"data": {"mpp": UNIFORM}}, [])
    assert config.data.mpp == UNIFORM
    assert "uniform:\n    - 0.25" in config.to_yaml()
    with pytest.raises(ConfigError, match="least and the most"):
        parse_config({"data": {"mpp": {"uniform": [2, 1]}}}, [])


def test_a_range_is_named_by_its_ends() -> None:
    assert mpp_text({0.5: 1, 0.25: 2}) == "0.25, 0.5"
    assert mpp_text(UNIFORM) == "0.25 to 2 (uniform)"
    assert mpp_named(DENSITY) == [0.25, 0.5, 2.0]


def test_a_mix_is_told_by_bands_and_of_the_slides_that_are_drawn() -> None:
    few = TilePlan(CATALOG, mpp={0.25: 1, 2.0: 3}).mix_lines()
    assert few == [
        # At 0.25 µm/px a slide of 0.5 is enlarged twice, which is just allowed.
        "0.25 µm/px: 25% of the tiles, from 3 slides of 3 patients",
        "2 µm/px: 75% of the tiles, from 3 slides of 3 patients",
    ]
    bands = TilePlan(CATALOG, mpp={"log_uniform": [0.2, 2.0]}, cohorts={"tcga": 1}).mix_lines()
    assert len(bands) == 8
    assert all("12% of the tiles, from 2 slides of 2 patients" in line or "13%" in line for line in bands)
    assert bands[0].startswith("0.201 to 0.268 µm/px")
    assert TilePlan(CATALOG, mpp={0.2: 1}).mix_lines()[-1] == "serves none: s3://bucket/c.svs: too coarse, 0.5 µm/px"
    # A slide that no stratum has is not missed.
    assert len(TilePlan(CATALOG, mpp={0.2: 1}, cohorts={"tcga": 1}).mix_lines()) == 1
