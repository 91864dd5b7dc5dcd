"""Tiles drawn from a list, and lists written."""

import json
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from streaming import storage
from streaming.errors import CatalogError, ConfigError, PlanError, StorageError
from streaming.plan import TilePlan
from streaming.plan.alias import alias_table
from streaming.plan.list_packing import packed_list
from streaming.plan.universe import HeldOut, Universe
from streaming.storage.staging import Staging
from tests.streaming.plan.test_plan import catalog, row
from trainer.cli import main

FOLDER = tempfile.TemporaryDirectory()
CATALOG = catalog([row(f"s{i}", 0.25, i, json.dumps({"patient": f"p{i // 2}"})) for i in range(12)])
RANDOM = np.random.default_rng(5)
NUM = 900


def columns(num: int = NUM) -> dict[str, Any]:
    """Tiles of all slides, named in three ways, at two magnifications; none is twice there."""
    slide = RANDOM.integers(0, 12, num)
    names = [("s3://bucket/s{}.svs", "s{}.svs", "s{}")[i % 3].format(n) for i, n in enumerate(slide)]
    x = RANDOM.permutation(8000)[:num]
    return {"slide": names, "x": x, "y": RANDOM.integers(0, 6000, num), "mpp": RANDOM.choice([0.5, 1.0], num)}


def written(found: dict[str, Any], name: str = "") -> str:
    path = Path(tempfile.mkdtemp(dir=FOLDER.name)) / (name or "list.parquet")
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(found), path)
    return str(path)


PLAIN = columns()
WEIGHTS = {**columns(), "weight": RANDOM.lognormal(0, 1.5, NUM)}
CLUSTERS = {**columns(), "cluster": RANDOM.choice(["a", "b", "c", "d"], NUM, p=[0.7, 0.2, 0.08, 0.02])}
LISTS = {"plain": written(PLAIN), "weights": written(WEIGHTS), "clusters": written(CLUSTERS)}
OF = {"plain": PLAIN, "weights": WEIGHTS, "clusters": CLUSTERS}


def plan(kind: str = "plain", seed: int = 0, held_out: HeldOut | None = None, **universe: Any) -> TilePlan:
    return TilePlan(CATALOG, seed, tiles=LISTS[kind], universe=Universe(**universe), held_out=held_out)


def tiles(of: TilePlan, index: np.ndarray, attempt: int = 0) -> list[tuple[int, int, int, float]]:
    specs = of.specs(index, np.full(len(index), attempt, np.int32))
    return list(zip(specs.slide.tolist(), specs.x.tolist(), specs.y.tolist(), specs.mpp.tolist(), strict=True))


def rows_of(found: dict[str, Any]) -> list[tuple[int, int, int, float]]:
    """What a list names, as `tiles` has it."""
    slides = [f"s3://bucket/{Path(name).stem}.svs" for name in found["slide"]]
    slide = [CATALOG.slides().index(uri) for uri in slides]
    return list(zip(slide, found["x"].tolist(), found["y"].tolist(), found["mpp"].tolist(), strict=True))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60))
def test_an_alias_table_has_the_weights_that_it_was_made_of(weights: list[float]) -> None:
    keep, other = alias_table(np.array(weights))
    assert ((keep >= 0) & (keep <= 1)).all()
    found = keep.copy()
    np.add.at(found, other, 1 - keep)
    assert found / len(weights) == pytest.approx(np.array(weights) / sum(weights), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", ["plain", "weights", "clusters"])
def test_a_million_draws_come_by_weight_evenly_over_clusters_or_all_alike(kind: str) -> None:
    wanted = {
        "plain": np.ones(NUM),
        "weights": np.asarray(OF[kind].get("weight")),
        "clusters": np.array([1 / Counter(CLUSTERS["cluster"].tolist())[name] for name in CLUSTERS["cluster"]]),
    }[kind]
    number = {tile: i for i, tile in enumerate(rows_of(OF[kind]))}
    counts = np.bincount([number[tile] for tile in tiles(plan(kind), np.arange(1_000_000))], minlength=NUM)
    expected = wanted / wanted.sum() * 1_000_000
    often = expected > 20
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-4
    by_slide = np.bincount([tile[0] for tile in rows_of(OF[kind])], wanted, minlength=12)
    assert plan(kind).shares == pytest.approx(by_slide / by_slide.sum())


@pytest.mark.parametrize("kind", ["plain", "weights", "clusters"])
@pytest.mark.parametrize(
    "universe", [{}, {"tiles_per_slide": 6}, {"slides": 0.5}, {"tiles_per_slide": 6, "replacement": False}]
)
def test_an_index_gives_the_same_tile_alone_in_any_part_in_any_process(kind: str, universe: dict) -> None:
    if kind != "plain" and not universe.get("replacement", True):
        return
    index = np.array([0, 10**12, 7, 5000, 7])
    one = plan(kind, 3, **universe)
    for attempt in (0, 1, 9):
        many = tiles(one, index, attempt)
        for copy in (one, pickle.loads(pickle.dumps(one)), plan(kind, 3, **universe)):
            assert [tiles(copy, np.array([i]), attempt)[0] for i in index.tolist()] == many
        assert set(many) <= set(rows_of(OF[kind]))
    assert tiles(plan(kind, 4, **universe), np.arange(50)) != tiles(one, np.arange(50))
    spec = one[7]
    assert (CATALOG.slides().index(spec.slide), spec.x, spec.y, spec.mpp) == tiles(one, np.array([7]))[0]


@pytest.mark.parametrize("kind", ["plain", "weights", "clusters"])
def test_smaller_parts_lie_within_larger_ones_and_all_in_the_list(kind: str) -> None:
    index = np.arange(20_000)
    whole = set(rows_of(OF[kind]))
    few, more = (set(tiles(plan(kind, 1, tiles_per_slide=k), index)) for k in (4, 20))
    assert few < more < whole
    assert max(Counter(slide for slide, *_ in few).values()) <= 4
    if kind == "plain":
        assert set(Counter(slide for slide, *_ in few).values()) == {4}
        assert plan(kind, tiles_per_slide=4).num_tiles == 48
    quarter, half = (set(tiles(plan(kind, 1, slides=share), index)) for share in (0.25, 0.5))
    assert half < whole
    assert len({slide for slide, *_ in half}) == 6
    assert {slide for slide, *_ in quarter} < {slide for slide, *_ in half}
    # Which tiles these are depends on neither the run's seed nor the order.
    assert set(tiles(plan(kind, 2, tiles_per_slide=4), index)) == few


def test_more_tiles_of_a_slide_than_it_has_are_those_that_it_has() -> None:
    num = 500 * 12
    assert set(tiles(plan(tiles_per_slide=500), np.arange(3 * num))) == set(rows_of(PLAIN))
    assert plan(tiles_per_slide=500).num_tiles == NUM


@pytest.mark.parametrize("tiles_per_slide", [None, 5])
def test_without_replacement_each_tile_comes_once_an_epoch(tiles_per_slide: int | None) -> None:
    exhaustive = plan(tiles_per_slide=tiles_per_slide, replacement=False)
    num = exhaustive.num_tiles
    assert num == (NUM if tiles_per_slide is None else 60)
    first, second = tiles(exhaustive, np.arange(num)), tiles(exhaustive, np.arange(num, 2 * num))
    assert len(set(first)) == num
    assert set(first) == set(second)
    assert first != second
    assert tiles_per_slide or set(first) == set(rows_of(PLAIN))


def test_held_out_patients_are_not_drawn() -> None:
    index = np.arange(5000)
    drawn, apart = ({t[0] for t in tiles(plan(held_out=HeldOut(0.3, is_drawn=d)), index)} for d in (False, True))
    assert drawn
    assert apart
    assert not drawn & apart
    assert not {slide // 2 for slide in drawn} & {slide // 2 for slide in apart}


def test_a_replacement_is_of_the_same_slide_and_mpp_at_first_and_then_of_any() -> None:
    index = np.arange(3000)
    first, second, late = (tiles(plan("weights"), index, attempt) for attempt in (0, 2, 5))
    assert [(t[0], t[3]) for t in first] == [(t[0], t[3]) for t in second]
    assert np.mean([a == b for a, b in zip(first, second, strict=True)]) < 0.3
    assert np.mean([a[0] == b[0] for a, b in zip(first, late, strict=True)]) < 0.3


def test_neither_the_order_of_rows_nor_how_many_are_made_at_once_matters() -> None:
    order = RANDOM.permutation(NUM)
    for kind in LISTS:
        shuffled = written({name: np.asarray(values)[order] for name, values in OF[kind].items()})
        folder = Path(tempfile.mkdtemp(dir=FOLDER.name)) / "parts"
        folder.mkdir()
        for part in range(3):
            found = {name: np.asarray(values)[part::3] for name, values in OF[kind].items()}
            pq.write_table(pa.table(found), folder / f"{part}.parquet")
        whole = packed_list(LISTS[kind], CATALOG, 256, 0.05, 2.0)
        for uri in (shuffled, str(folder)):
            other = packed_list(uri, CATALOG, 256, 0.05, 2.0, part_rows=50)
            assert other.digest == whole.digest
            assert Path(other.file.info.uri).read_bytes() == Path(whole.file.info.uri).read_bytes()


def test_what_a_list_names_and_nobody_can_draw_is_counted() -> None:
    found = {
        "slide": ["s0"] * 6 + ["gone.svs", "away.svs", "gone.svs", "s1"],
        "x": [0, -4000, 10**6, 10**12, 0, 11_500, 0, 0, 0, 0],
        "y": [0, 0, 0, 0, -(10**4), 0, 0, 0, 0, 0],
        "mpp": [0.5] * 6 + [0.5] * 3 + [0.1],
        "weight": [1.0] * 10,
    }
    made = TilePlan(CATALOG, tiles=written(found))
    assert made.num_tiles == 2  # the first, and the one of which nearly all is on the slide
    assert [line.partition(".parquet: ")[2] for line in made.mix_lines()[1:]] == [
        "2 of its slides are not in the catalog, so 3 tiles are left out (first: away.svs); add them: "
        "`tilestream catalog`",
        "4 tiles are left out whose centre is not on their slide; x and y are level-0 pixels",
        "1 tiles are left out whose slide is too coarse for their mpp; raise data.max_upsampling (--max-upsampling) "
        "to have them enlarged",
    ]
    with pytest.raises(PlanError, match=r"no tile of it can be drawn: 1 of its slides are not in the catalog"):
        TilePlan(CATALOG, tiles=written({"slide": ["t"], "x": [0], "y": [0], "mpp": [0.5]}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mpp": None}, "mpp is missing"),
        ({"weight": [1.0] * NUM, "cluster": [1] * NUM}, "keep one of these columns"),
        ({"weight": [-1.0] * NUM}, "a weight is -1"),
        ({"weight": [float("nan")] * NUM}, "a weight is nan"),
        ({"mpp": [0.0] * NUM}, "an mpp is 0"),
        ({"x": ["a"] * NUM}, "the column x is string; it holds numbers"),
        ({"cluster": [None, *["a"] * (NUM - 1)]}, "1 rows have no cluster"),
    ],
)
def test_what_is_no_list_is_told_in_one_line_and_nothing_is_left_behind(changes: dict, said: str) -> None:
    found = {name: values for name, values in {**PLAIN, **changes}.items() if values is not None}
    uri = written(found)
    with pytest.raises(ConfigError, match=said) as told:
        TilePlan(CATALOG, tiles=uri)
    assert "\n" not in str(told.value)
    assert [path.name for path in Path(uri).parent.iterdir()] == ["list.parquet"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cohorts": {"a": 1}}, "leave out strata or cohorts"),
        ({"corners": "blocks"}, "leave out corners"),
        ({"universe": Universe(window=10)}, "not drawn by windows"),
    ],
)
def test_what_a_list_decides_by_itself_is_not_given_beside_it(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TilePlan(CATALOG, tiles=LISTS["plain"], **given)


def test_weights_without_replacement_are_refused() -> None:
    with pytest.raises(ConfigError, match="come with replacement"):
        plan("weights", replacement=False)
    with pytest.raises(ConfigError, match="tiles_per_slide"):
        TilePlan(CATALOG, universe=Universe(replacement=False))


def test_a_damaged_list_and_one_that_is_no_parquet_are_told() -> None:
    uri = written(PLAIN)
    made = packed_list(uri, CATALOG, 256, 0.05, 2.0)
    Path(made.file.info.uri).write_bytes(b"x" * 200)
    with pytest.raises(CatalogError, match="remove it"):
        packed_list(uri, CATALOG, 256, 0.05, 2.0)
    Path(uri).write_bytes(b"no parquet")
    with pytest.raises(StorageError, match="not a whole Parquet"):
        packed_list(uri, CATALOG, 256, 0.05, 2.0)


def test_a_list_that_nothing_can_be_written_beside_is_told(make_disk: Callable[[int], Path]) -> None:
    content = Path(LISTS["plain"]).read_bytes()
    uri = make_disk(-(-len(content) // 4096) * 4096 + 4096) / "list.parquet"
    uri.write_bytes(content)
    with pytest.raises(StorageError, match="copy it to where you may write"):
        packed_list(str(uri), CATALOG, 256, 0.05, 2.0)
    assert len(list(uri.parent.iterdir())) == 1


def test_another_content_of_a_list_is_another_digest() -> None:
    uri = written(PLAIN)
    before = TilePlan(CATALOG, tiles=uri).digest
    pq.write_table(pa.table({**PLAIN, "x": np.asarray(PLAIN["x"]) + 1}), uri)
    assert TilePlan(CATALOG, tiles=uri).digest != before
    pq.write_table(pa.table(PLAIN), uri)
    assert TilePlan(CATALOG, tiles=uri).digest == before
    assert TilePlan(CATALOG).digest is None


def test_the_first_draws_of_a_plan_as_a_list_are_those_draws() -> None:
    out = written(PLAIN)
    mix = ("--seed", "3", "--mpp", "0.5,1.0", "--slides", "0.5")
    assert main(["tiles", CATALOG.uri, "--out", out, "--draws", "500", *mix]) == 0
    found = pq.read_table(out).to_pydict()
    source = TilePlan(CATALOG, 3, {0.5: 1, 1.0: 1}, universe=Universe(slides=0.5))
    specs = source.specs(np.arange(500))
    assert found["index"] == list(range(500))
    assert found["slide"] == [source.slides[row] for row in specs.slide]
    assert (found["x"], found["y"], found["mpp"]) == (specs.x.tolist(), specs.y.tolist(), specs.mpp.tolist())
    assert set(found["size"]) == {256}
    again = tiles(TilePlan(CATALOG, tiles=out, universe=Universe(replacement=False)), np.arange(500))
    assert Counter(again) == Counter(tiles(source, np.arange(500)))


def test_a_grid_covers_the_tissue_edge_to_edge(capsys: pytest.CaptureFixture[str]) -> None:
    out = written(PLAIN)
    assert main(["tiles", CATALOG.uri, "--out", out, "--mpp", "0.5,1.0"]) == 0
    found = pq.read_table(out).to_pandas()
    assert f"{len(found):,} tiles of 12 slides" in capsys.readouterr().out
    for (slide, mpp), of_slide in found.groupby(["slide", "mpp"]):
        side = 256 * mpp / 0.25
        assert not (of_slide["x"] % side).any()
        assert not (of_slide["y"] % side).any()
        assert not of_slide.duplicated(["x", "y"]).any()
        # As many as the area of tissue has room for, but for those at its edge.
        cells = CATALOG.tissue_grid(CATALOG.row_of(slide)).fraction
        assert len(of_slide) == pytest.approx(cells.sum() / 255 * 64**2 / (256 * mpp) ** 2, rel=0.35)
    assert main(["tiles", CATALOG.uri, "--out", out, "--mpp", "uniform:0.25:2"]) == 2
    assert "a grid at 209 magnifications" in capsys.readouterr().err


def test_a_stream_of_a_list_tells_what_it_draws_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["stream", CATALOG.uri, "--tiles", LISTS["plain"], "--dry-run", "--no-replacement", "--batch", "9"]) == 0
    )
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "universe: 900 tiles, an epoch is 100.0 steps"
    share = np.mean(np.asarray(PLAIN["mpp"]) == 0.5)
    assert told[2] == f"0.5 µm/px: {share:.0%} of the tiles, from 12 slides of 6 patients"
    assert main(["stream", CATALOG.uri, "--tiles", LISTS["plain"], "--dry-run", "--mpp", "0.5"]) == 2
    assert "leave out --mpp" in capsys.readouterr().err
    assert main(["stream", CATALOG.uri, "--tiles", LISTS["weights"], "--census", "2000"]) == 0
    assert "2,000 tiles of 12 slides and 6 patients" in capsys.readouterr().out


def test_a_list_in_a_bucket_gives_the_same_tiles(s3_bucket: str, tmp_path: Path) -> None:
    uri = f"{s3_bucket}/lists/list.parquet"
    storage.write_bytes(uri, Path(LISTS["weights"]).read_bytes())
    far = replace(CATALOG, staging=Staging(folder=str(tmp_path)))
    one = TilePlan(far, 3, tiles=uri)
    assert tiles(one, np.arange(2000)) == tiles(plan("weights", 3), np.arange(2000))
    assert one.digest == plan("weights").digest
    assert len(storage.list_names(f"{s3_bucket}/lists")) == 2
