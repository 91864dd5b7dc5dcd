import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from streaming.catalog import Catalog
from streaming.errors import CatalogError, ConfigError, PlanError
from streaming.plan import TilePlan
from streaming.plan.census import census
from streaming.plan.strata import Strata
from streaming.plan.universe import Universe
from tests.streaming.plan.test_plan import catalog, row

ORGANS = ["lung"] * 9 + ["skin"] * 4 + [""]


def organs(sites: Sequence[str] = ("A7",) * 14) -> Catalog:
    """Fourteen slides of two organs and of none."""
    return catalog(
        [
            row(f"s{i}", 0.25, i, json.dumps({"organ": organ, "site": site, "patient": f"p{i // 2}"}))
            for i, (organ, site) in enumerate(zip(ORGANS, sites, strict=True))
        ]
    )


CATALOG = organs()
OF_SLIDE = np.array(
    [ORGANS[int(slide.removeprefix("s3://bucket/s").removesuffix(".svs"))] for slide in CATALOG.slides()]
)


@pytest.mark.parametrize(
    "universe", [Universe(), Universe(tiles_per_slide=1000), Universe(window=500, window_slides=9)]
)
@pytest.mark.parametrize(
    ("power", "expected"), [(1.0, [9, 4, 1]), (0.5, [3, 2, 1]), (0.0, [1, 1, 1])], ids=["slides", "root", "alike"]
)
def test_a_stratum_is_drawn_as_its_number_of_slides_to_a_power(
    universe: Universe, power: float, expected: list[float]
) -> None:
    plan = TilePlan(CATALOG, universe=universe, strata=Strata(columns=("organ",), power=power))
    drawn = OF_SLIDE[plan.specs(np.arange(300_000)).slide]
    counts = np.array([np.count_nonzero(drawn == organ) for organ in ("lung", "skin", "")])
    wanted = np.array(expected) / sum(expected)
    assert stats.chisquare(counts, wanted * len(drawn)).pvalue > 1e-4
    shares = [plan.shares[organ == OF_SLIDE].sum() for organ in ("lung", "skin", "")]
    assert shares == pytest.approx(wanted)


def test_within_a_stratum_all_slides_are_alike() -> None:
    slides = TilePlan(CATALOG, strata=Strata(columns=("organ",), power=0.0)).specs(np.arange(200_000)).slide
    counts = np.bincount(slides, minlength=14)
    for organ in ("lung", "skin"):
        assert stats.chisquare(counts[organ == OF_SLIDE]).pvalue > 1e-4


def test_weights_by_value_are_those_of_cohorts_and_leave_others_out() -> None:
    plan = TilePlan(CATALOG, strata=Strata(columns=("organ",), weights={"skin": 3, "lung": 1}))
    drawn = OF_SLIDE[plan.specs(np.arange(100_000)).slide]
    assert np.mean(drawn == "skin") == pytest.approx(0.75, abs=0.01)
    assert not (drawn == "").any()
    assert plan.specs(np.arange(64)).x.tolist() == (
        TilePlan(_called(CATALOG, "organ", "cohort"), cohorts={"lung": 1, "skin": 3}).specs(np.arange(64)).x.tolist()
    )


def _called(of: Catalog, name: str, other: str) -> Catalog:
    rows = [row(f"s{i}", 0.25, i, json.dumps({other: organ} if organ else {})) for i, organ in enumerate(ORGANS)]
    made = catalog(rows)
    assert made.metadata(other) == [value or None for value in of.metadata(name)]
    return made


def test_several_columns_make_strata_of_their_products() -> None:
    both = organs([f"B{i % 2}" for i in range(14)])
    specs = TilePlan(both, strata=Strata(columns=("organ", "site"), power=0.0)).specs(np.arange(100_000))
    names = [f"{a or 'none'}/{b}" for a, b in zip(both.metadata("organ"), both.metadata("site"), strict=True)]
    _, counts = np.unique(np.array(names)[specs.slide], return_counts=True)
    assert len(counts) == 5
    assert stats.chisquare(counts).pvalue > 1e-4


def test_the_order_of_slides_decides_nothing() -> None:
    rows = [row(f"s{i}", 0.25, i, json.dumps({"organ": organ})) for i, organ in enumerate(ORGANS)]
    strata = Strata(columns=("organ",), power=0.5)
    one, two = (TilePlan(catalog(some), strata=strata).specs(np.arange(500)) for some in (rows, rows[::-1]))
    assert np.array_equal(one.x, two.x)
    assert np.array_equal(one.slide, two.slide)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"columns": ("organ",), "power": 2.0}, ConfigError, "power is 2.0"),
        ({"columns": (), "weights": {"lung": 1}}, ConfigError, "no strata.columns"),
        ({"columns": ("organ",), "power": 0.5, "weights": {"lung": 1}}, ConfigError, "give one of them"),
        ({"columns": ("organ",), "weights": {"lung": 0}}, ConfigError, "above 0"),
        ({"columns": ("organs",)}, CatalogError, "no metadata column 'organs'; it has: organ"),
        (
            {"columns": ("organ",), "weights": {"lungs": 1}},
            PlanError,
            "no slide of organ 'lungs'.* there are: lung, skin",
        ),
    ],
)
def test_what_makes_no_strata_is_told(given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        TilePlan(CATALOG, strata=Strata(**given))


def test_cohorts_and_strata_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        TilePlan(CATALOG, cohorts={"a": 1}, strata=Strata(columns=("organ",)))


def test_other_values_of_a_stratum_s_column_are_another_catalog_for_a_run() -> None:
    moved = organs(["A8", *["A7"] * 13])
    assert moved.fingerprint == CATALOG.fingerprint
    assert moved.identity(("organ",)) == CATALOG.identity(("organ",))
    assert moved.identity(("site",)) != CATALOG.identity(("site",))
    assert CATALOG.identity(("cohort", "patient")) == CATALOG.identity(()) == CATALOG.fingerprint


def test_a_census_counts_what_is_drawn() -> None:
    plan = TilePlan(CATALOG, strata=Strata(columns=("organ",), power=0.0))
    found = census(plan, CATALOG, 20_000)
    specs = plan.specs(np.arange(20_000))
    assert (found.num_tiles, found.num_slides, found.num_patients) == (20_000, 14, 7)
    by_organ = {drawn.value: drawn for drawn in found.columns["organ"]}
    for organ in ("lung", "skin"):
        assert by_organ[organ].share == pytest.approx(np.mean(OF_SLIDE[specs.slide] == organ))
        assert by_organ[organ].num_slides == np.count_nonzero(organ == OF_SLIDE)
    assert [drawn.value for drawn in found.columns["µm/px"]] == ["0.25", "0.5", "1", "2"]
    assert sum(drawn.share for drawn in found.columns["µm/px"]) == pytest.approx(1)
    # Half of the draws come from the one slide without an organ, and some of skin.
    assert found.half_from == 3
    assert found.most_of_a_slide == pytest.approx(1 / 3, abs=0.02)
    assert any("20,000 tiles of 14 slides and 7 patients" in line for line in found.lines())


def test_a_census_of_a_range_has_bands_that_hold_all_tiles() -> None:
    found = census(TilePlan(CATALOG, mpp={"uniform": [0.25, 2.0]}), CATALOG, 20_000)
    assert len(found.columns["µm/px"]) == 8
    assert sum(drawn.share for drawn in found.columns["µm/px"]) == pytest.approx(1)
