"""Which tiles a run may draw, and in what order."""

import hashlib
import json
import pickle
import tempfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streaming.catalog import Catalog
from streaming.catalog.writing import merge, part_of, write
from streaming.errors import ConfigError, PlanError
from streaming.plan import TilePlan
from streaming.plan.universe import HeldOut, Universe, block_quotas, chosen_slides, drawn_slides, shuffle_quality
from tests.streaming.plan.test_plan import row
from trainer.cli import main

FOLDER = tempfile.TemporaryDirectory()


def made_catalog() -> Catalog:
    """24 slides of 10 patients, some without one; two cohorts of 18 and 6 slides; one slide too coarse for 0.25."""
    found = []
    for i in range(24):
        metadata = {"cohort": "own" if i % 4 == 0 else "tcga"} | ({"patient": f"p{i % 10}"} if i % 7 else {})
        found.append(row(f"slide{i:02}", 0.6 if i == 5 else 0.25, i, json.dumps(metadata), rows=20, columns=25))
    folder = tempfile.mkdtemp(dir=FOLDER.name)
    write(folder, *merge([part_of(found)], None), None)
    return Catalog.load(folder)


CATALOG = made_catalog()
PATIENTS = CATALOG.metadata("patient")
MPP = {0.25: 1.0, 0.5: 3.0}
COHORTS = {"own": 1.0, "tcga": 1.0}


def plan(run_seed: int = 0, /, *, cohorts: dict | None = None, **universe: object) -> TilePlan:
    return TilePlan(CATALOG, run_seed, MPP, 64, cohorts=cohorts, universe=Universe(**universe))


def tiles(of: TilePlan, index: np.ndarray, attempt: int = 0) -> list[tuple[int, int, int, float]]:
    specs = of.specs(index, np.full(len(index), attempt, np.int32))
    return list(zip(specs.slide.tolist(), specs.x.tolist(), specs.y.tolist(), specs.mpp.tolist(), strict=True))


names = st.lists(st.sampled_from("abcdefgh") | st.none(), min_size=1, max_size=40)


@settings(deadline=None)
@given(names, st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 2**40))
def test_smaller_shares_of_slides_lie_within_larger_ones_and_no_patient_is_split(
    patients: list[str | None], one: float, two: float, seed: int
) -> None:
    slides = [f"s{i}" for i in range(len(patients))]
    small, large = (chosen_slides(slides, patients, share, seed) for share in sorted([one, two]))
    assert small.any()
    assert not (small & ~large).any()
    assert small.sum() >= min(one, two) * len(slides) * (1 - 1e-9)
    for taken in (small, large):
        for patient in {name for name in patients if name}:
            assert len({bool(t) for t, name in zip(taken, patients, strict=True) if name == patient}) == 1


@settings(deadline=None)
@given(names, st.floats(0.01, 0.99), st.floats(0.01, 1), st.integers(0, 2**40))
def test_patients_that_are_held_out_are_whole_and_the_same_whatever_is_drawn_of_the_others(
    patients: list[str | None], held: float, share: float, seed: int
) -> None:
    slides = [f"s{i}" for i in range(len(patients))]
    others = chosen_slides(slides, patients, 1 - held, seed)
    assume(not others.all())
    apart, drawn = (
        drawn_slides(slides, patients, Universe(slides=share, seed=seed), HeldOut(held, is_drawn=is_drawn))
        for is_drawn in (True, False)
    )
    assert np.array_equal(apart, ~others)
    assert apart.sum() <= held * len(slides) * (1 + 1e-9)
    assert not (apart & drawn).any()
    assert np.array_equal(drawn, chosen_slides(slides, patients, share, seed) & others)
    for patient in {name for name in patients if name}:
        assert len({bool(t) for t, name in zip(apart, patients, strict=True) if name == patient}) == 1


def test_a_plan_never_draws_from_whom_it_holds_out_and_one_of_them_from_them_alone() -> None:
    index = np.arange(2000)
    drawn, apart = (
        set(TilePlan(CATALOG, 3, MPP, 64, held_out=HeldOut(0.3, is_drawn=is_drawn)).slides_of(index).tolist())
        for is_drawn in (False, True)
    )
    assert not drawn & apart
    assert drawn | apart == set(plan(3).slides_of(index).tolist())
    with pytest.raises(ConfigError, match="would hold nobody out; raise it"):
        TilePlan(CATALOG, 3, MPP, 64, held_out=HeldOut(1e-9))


def test_a_choice_does_not_depend_on_the_order_of_slides_and_other_seeds_choose_others() -> None:
    slides, patients = [f"s{i}" for i in range(200)], [f"p{i // 2}" for i in range(200)]
    taken = chosen_slides(slides, patients, 0.1, 0)
    assert taken.sum() == 20
    assert np.array_equal(chosen_slides(slides[::-1], patients[::-1], 0.1, 0)[::-1], taken)
    assert not np.array_equal(chosen_slides(slides, patients, 0.1, 1), taken)


@pytest.mark.parametrize("universe", [{}, {"tiles_per_slide": 20}, {"tiles_per_slide": 9, "replacement": False}])
def test_a_part_of_the_slides_is_all_that_is_drawn_also_as_replacements(universe: dict) -> None:
    taken = set(np.flatnonzero(chosen_slides(CATALOG.slides(), PATIENTS, 0.3, 5)).tolist())
    part = plan(slides=0.3, seed=5, **universe)
    index = np.arange(3000)
    assert {slide for slide, *_ in tiles(part, index)} == taken
    for attempt in (1, 6, 30):
        assert {slide for slide, *_ in tiles(part, index, attempt)} <= taken


def test_an_unbounded_universe_is_the_plan_without_one() -> None:
    index = np.concatenate([np.arange(500), 10**14 + np.arange(500)])
    for cohorts in (None, COHORTS):
        whole = TilePlan(CATALOG, 3, MPP, 64, cohorts=cohorts)
        assert tiles(whole, index) == tiles(plan(3, cohorts=cohorts, slides=1.0), index)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 12), st.integers(0, 50), st.sampled_from([None, COHORTS, {"own": 1, "tcga": 3}]), st.integers(0, 9)
)
def test_without_replacement_each_tile_comes_once_an_epoch(
    num: int, epoch: int, cohorts: dict | None, seed: int
) -> None:
    exhaustive = plan(seed, cohorts=cohorts, tiles_per_slide=num, replacement=False)
    assert exhaustive.num_tiles == 24 * num
    if cohorts == COHORTS:
        # 6 of own and 18 of tcga as often as each other: two epochs of own, and half of one of the others, and so on.
        first = np.arange(36 * num * epoch, 36 * num * (epoch + 1))
        found = Counter(tiles(exhaustive, first))
        by_slide = Counter[int]()
        for (slide, *_), times in found.items():
            by_slide[slide] += times
        assert {by_slide[slide] for slide in range(0, 24, 4)} == {3 * num}
        assert {by_slide[slide] for slide in range(24) if slide % 4} == {num}
        return
    one_epoch = np.arange(24 * num * epoch, 24 * num * (epoch + 1))
    found = tiles(exhaustive, one_epoch)
    assert len(set(found)) == 24 * num
    assert set(Counter(slide for slide, *_ in found).values()) == {num}


@pytest.mark.parametrize(
    ("universe", "digest"),
    [
        ({}, "320b3ab8c3b163e013edb98f99cf7660b2b5b450fbf3ae01efc4569c57cc2b18"),
        (
            {"slides": 0.5, "tiles_per_slide": 7, "replacement": False},
            "6a144ea959c51d0be094e92b685f2273e47a4bf0ee0a9efcc973543feb3f659d",
        ),
        ({"window": 64, "window_slides": 4}, "8a87e9e2808fbd76fbbe78514cb417f4c95bd2ba4bbc0eea44391b48c8666696"),
    ],
)
def test_known_universes_give_known_tiles_in_every_version(universe: dict, digest: str) -> None:
    found = hashlib.sha256()
    for attempt in (0, 5):
        specs = plan(3, cohorts=COHORTS, **universe).specs(np.arange(1000), np.full(1000, attempt, np.int32))
        for column in (specs.slide, specs.x, specs.y, specs.mpp):
            found.update(column.tobytes())
    assert found.hexdigest() == digest


def test_epochs_have_orders_of_their_own_and_the_same_tiles() -> None:
    exhaustive = plan(tiles_per_slide=10, replacement=False)
    first, second = tiles(exhaustive, np.arange(240)), tiles(exhaustive, np.arange(240, 480))
    assert set(first) == set(second)
    assert first != second
    other = tiles(plan(1, tiles_per_slide=10, replacement=False), np.arange(240))
    assert set(other) == set(first)
    assert other != first


@pytest.mark.parametrize("replacement", [True, False])
def test_fewer_tiles_a_slide_lie_within_more_and_none_else_is_drawn(replacement: bool) -> None:
    some = set(tiles(plan(tiles_per_slide=5, replacement=replacement), np.arange(3000)))
    more = set(tiles(plan(tiles_per_slide=50, replacement=False), np.arange(1200)))
    assert len(some) == 24 * 5
    assert len(more) == 24 * 50
    assert some <= more
    assert not some <= set(tiles(plan(tiles_per_slide=50, seed=1, replacement=False), np.arange(1200)))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=2), st.integers(0, 10**9))
def test_every_block_has_exactly_the_cohorts_quotas(weights: list[int], block: int) -> None:
    quotas = block_quotas(weights)
    size = int(quotas.sum())
    cohorts = dict(zip(("own", "tcga"), map(float, weights), strict=True))
    specs = plan(cohorts=cohorts, tiles_per_slide=7, replacement=False).specs(
        np.arange(block * size, (block + 1) * size)
    )
    own = np.array([name == "own" for name in CATALOG.metadata("cohort")])[specs.slide]
    assert (own.sum(), (~own).sum()) == tuple(quotas)
    assert quotas[0] * weights[1] == quotas[1] * weights[0]


def test_quotas_of_a_tenth_and_shares_that_have_none() -> None:
    assert block_quotas([0.1, 0.7, 0.2]).tolist() == [1, 7, 2]
    assert block_quotas([1.0]).tolist() == [1]
    with pytest.raises(ConfigError, match="whole"):
        block_quotas([1.0, 0.123457])


@pytest.mark.parametrize(
    "universe",
    [{"tiles_per_slide": 40}, {"tiles_per_slide": 40, "replacement": False}, {"window": 96, "window_slides": 6}],
)
def test_magnifications_keep_their_weights_where_a_slide_is_drawn_first(universe: dict) -> None:
    specs = plan(**universe).specs(np.arange(9600))
    serves_both = specs.slide != 5
    assert np.mean(specs.mpp[serves_both] == 0.25) == pytest.approx(0.25, abs=0.02)
    assert set(specs.mpp[~serves_both]) == {0.5}
    assert np.bincount(specs.slide, minlength=24) / 9600 == pytest.approx([1 / 24] * 24, abs=0.012)


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.integers(0, 2**60), min_size=1, max_size=20),
    st.sampled_from(
        [{"slides": 0.4}, {"tiles_per_slide": 6}, {"tiles_per_slide": 6, "replacement": False}, {"window": 50}]
    ),
)
def test_a_tile_is_the_same_alone_in_a_batch_and_after_pickling(index: list[int], universe: dict) -> None:
    one = plan(cohorts={"own": 1, "tcga": 2}, **universe)
    copy = pickle.loads(pickle.dumps(one))
    batch = tiles(one, np.array(index))
    assert batch == [tiles(copy, np.array([i]))[0] for i in index]


def test_a_window_draws_from_few_slides_also_as_replacements_and_all_slides_get_their_turn() -> None:
    windowed = plan(window=100, window_slides=4)
    turns = Counter[int]()
    for window in range(18):
        index = np.arange(window * 100, window * 100 + 100)
        here = {slide for slide, *_ in tiles(windowed, index)}
        assert len(here) <= 4
        for attempt in (1, 5, 12):
            assert {slide for slide, *_ in tiles(windowed, index, attempt)} <= here
        turns.update(here)
        if window % 6 == 5:
            assert set(turns.values()) == {(window + 1) // 6}
    specs = windowed.specs(np.arange(100), np.full(100, 3, np.int32))
    assert np.array_equal(specs.mpp, windowed.specs(np.arange(100)).mpp)


def test_a_window_has_slides_of_each_cohort_in_proportion() -> None:
    windowed = plan(cohorts={"own": 1, "tcga": 3}, window=200, window_slides=8)
    own = np.array([name == "own" for name in CATALOG.metadata("cohort")])
    drawn = windowed.specs(np.arange(200)).slide
    assert (len(set(drawn[own[drawn]])), len(set(drawn[~own[drawn]]))) == (2, 6)
    whole = windowed.specs(np.arange(20_000)).slide
    assert np.mean(own[whole]) == pytest.approx(0.25, abs=0.015)


def test_shuffle_quality_is_one_for_independent_draws_and_says_what_a_window_costs() -> None:
    free, windowed = plan(cohorts=COHORTS), plan(cohorts=COHORTS, window=320, window_slides=4)
    for of, slides in ((free, 0.99), (windowed, 0.3)):
        drawn = of.specs(np.arange(32 * 400)).slide.reshape(400, 32)
        quality = of.shuffle_quality(drawn)
        share = quality.slides / quality.independent_slides
        assert share > 0.98 if slides > 0.5 else share < 0.35
        assert quality.patients <= quality.slides
        if slides > 0.5:
            assert quality.independent_patients == pytest.approx(quality.patients, rel=0.02)
            assert "100%" in quality.line()
    uniform = shuffle_quality([np.array([0, 0, 1], np.int32)], np.array([0.5, 0.5]), np.array([0, 0]))
    assert (uniform.slides, uniform.patients, uniform.independent_slides) == (2, 1, 1.75)


@pytest.mark.parametrize(
    ("universe", "named"),
    [
        ({"slides": 0.0}, r"universe\.slides"),
        ({"slides": 1.5}, r"universe\.slides"),
        ({"tiles_per_slide": 0}, "tiles_per_slide"),
        ({"window": 0}, "window"),
        ({"replacement": False}, "tiles_per_slide"),
        ({"replacement": False, "tiles_per_slide": 3, "window": 10}, "window"),
        ({"window": 10, "window_slides": 1}, "2 strata"),
    ],
)
def test_what_cannot_be_combined_is_refused(universe: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        plan(cohorts=COHORTS, **universe)


def test_a_share_that_leaves_a_cohort_without_slides_is_told() -> None:
    small = next(seed for seed in range(99) if not plan_has_own(seed))
    with pytest.raises(PlanError, match=r"'own'.*universe\.slides"):
        plan(cohorts=COHORTS, slides=0.05, seed=small)


def plan_has_own(seed: int) -> bool:
    taken = chosen_slides(CATALOG.slides(), PATIENTS, 0.05, seed)
    return any(CATALOG.metadata("cohort")[i] == "own" for i in np.flatnonzero(taken))


def test_a_dry_run_tells_of_a_universe_without_reading(capsys: pytest.CaptureFixture[str]) -> None:
    mix = ("--size", "64", "--mpp", "0.25,0.5", "--cohorts", "own=1,tcga=3", "--batch", "24", "--steps", "0:40")
    assert not main(["stream", CATALOG.uri, *mix, "--dry-run", "--tiles-per-slide", "10", "--no-replacement"])
    universe, mixed, *of_mpp = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in of_mpp] == [
        "0.25 µm/px: 50% of the tiles",
        "0.5 µm/px: 50% of the tiles",
    ]
    assert universe == "universe: 240 tiles, an epoch is 10.0 steps"
    assert "a batch of 24 tiles mixes" in mixed
    assert main(["stream", CATALOG.uri, *mix, "--dry-run", "--no-replacement"]) == 2
    assert "universe.tiles_per_slide" in capsys.readouterr().err
