"""A catalog's tissue: mapped where it lies, never carried along, the same from anywhere."""

import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.inspection import Inspected
from streaming.catalog.schema import SlideRow
from streaming.catalog.tissue import TissueGrid
from streaming.catalog.tissue_map import TissueMap, file_nbytes, write_tissue
from streaming.catalog.writing import merge, part_of, write
from streaming.errors import CatalogError
from streaming.plan import TilePlan
from streaming.storage.staging import Staging

SIDE = 100


def slide(name: str, fraction: np.ndarray, version: str = "v") -> Inspected:
    rows, columns = fraction.shape
    row = SlideRow(
        slide=f"s3://bucket/{name}.svs",
        size=1,
        version=version,
        vendor="aperio",
        mpp=0.25,
        width=columns * 256,
        height=rows * 256,
        bounds=(0, 0, columns * 256, rows * 256),
        levels=[{"width": columns * 256, "height": rows * 256, "downsample": 1.0}],
        backend="blocks",
        index=None,
        index_nbytes=0,
        tissue_rows=rows,
        tissue_columns=columns,
        tissue_threshold=20.0,
        tissue_mm2=1.0,
    )
    return Inspected(row, TissueGrid(fraction, 20.0))


def noise(seed: int, rows: int = SIDE, columns: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns)).astype(np.uint8)


@settings(max_examples=40, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5))
def test_grids_come_back_one_after_the_other_with_the_sums_of_whole_chunks(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("map") / "tissue"
    tissue = [noise(i, *shape) for i, shape in enumerate(shapes)]
    with open(path, "wb") as file:
        write_tissue(file, tissue)
    found = TissueMap(storage.ObjectInfo(str(path), path.stat().st_size, ""))
    assert path.stat().st_size == file_nbytes(len(found.cells))
    at = 0
    for cells in tissue:
        assert np.array_equal(found.cells[at : at + cells.size], cells.ravel())
        at += -(-cells.size // 64) * 64
    assert at == len(found.cells)
    assert np.array_equal(found.sums, [found.cells[:end].sum(dtype=int) for end in range(0, at + 1, 64)])


def test_a_plan_and_a_catalog_cross_processes_without_their_tissue(tmp_path: Path) -> None:
    slides = [slide(f"{i:03}", noise(i)) for i in range(200)]
    write(str(tmp_path), *merge([part_of(slides)], None), None)
    catalog = Catalog.load(str(tmp_path))
    plan = TilePlan(catalog, seed=1)
    index = np.arange(3000)
    before = plan.specs(index)
    pickled = pickle.dumps((plan, catalog))
    assert len(pickled) < 200 * 1000  # the tissue is 200 × 10,000 bytes
    again, _ = pickle.loads(pickled)
    assert np.array_equal(again.specs(index).x, before.x)
    assert "tissue_fraction" not in catalog.to_arrow().column_names
    assert np.array_equal(catalog.tissue_grid(7).fraction, noise(7))


def test_a_remote_catalog_gives_the_same_tiles_by_a_copy_of_what_is_read(s3_bucket: str, tmp_path: Path) -> None:
    slides = [slide(name, noise(i)) for i, name in enumerate("abc")]
    plans = []
    for out in (str(tmp_path / "local"), f"{s3_bucket}/made-catalog"):
        write(out, *merge([part_of(slides)], None), None)
        plans.append(TilePlan(Catalog.load(out, None, Staging(folder=str(tmp_path / "staged"))), seed=3))
    local, remote = (plan.specs(np.arange(2000)) for plan in (plans[0], pickle.loads(pickle.dumps(plans[1]))))
    for name in ("slide", "x", "y", "mpp"):
        assert np.array_equal(getattr(local, name), getattr(remote, name))
    (copy,) = (tmp_path / "staged").glob("*/data")
    assert copy.stat().st_size == next((tmp_path / "local").glob("tissue-*")).stat().st_size


def test_of_remote_tissue_those_slides_come_that_tiles_are_drawn_on(s3_bucket: str, tmp_path: Path) -> None:
    slides = [slide(f"{i:03}", noise(i)) for i in range(100)]  # of 10,000 cells each
    out = f"{s3_bucket}/tissue-in-parts"
    write(out, *merge([part_of(slides)], None), None)
    catalog = Catalog.load(out, None, Staging(folder=str(tmp_path)))
    (copy,) = tmp_path.glob("*/data") if TilePlan(catalog, seed=3).specs(np.arange(2)) else ()
    assert copy.stat().st_size > 10**6
    assert copy.stat().st_blocks * 512 <= 8 * 2**16
    # A sum, a grid, and all of it are what was written, whatever has come before.
    assert np.array_equal(catalog.tissue_grid(77).fraction, noise(77))
    padding = -10_000 % 64
    assert np.array_equal(
        catalog.tissue.cells, np.concatenate([np.pad(noise(i).ravel(), (0, padding)) for i in range(100)])
    )


def test_places_are_drawn_in_proportion_to_their_tissue(tmp_path: Path) -> None:
    fraction = np.zeros((SIDE, SIDE), np.uint8)
    fraction[20:40, 10:90], fraction[60:80, 10:90] = 120, 240
    write(str(tmp_path), *merge([part_of([slide("a", fraction)])], None), None)
    plan = TilePlan(Catalog.load(str(tmp_path)), mpp={0.25: 1}, size=64, min_tissue=0.01)
    y = plan.specs(np.arange(30_000)).y / 256
    assert np.mean(y > 50) == pytest.approx(2 / 3, abs=0.02)


def test_a_catalog_that_is_extended_keeps_the_tissue_it_had_and_serves_those_who_read_it_before(tmp_path: Path) -> None:
    out = str(tmp_path)
    write(out, *merge([part_of([slide("a", noise(0)), slide("c", noise(1))])], None), None)
    first = Catalog.load(out)
    parts = part_of([slide("b", noise(2, 7, 9)), slide("c", noise(3), "new")])
    write(out, *merge([first.table, parts], first.tissue), None)
    second = Catalog.load(out)
    assert second.fingerprint != first.fingerprint
    assert [len(catalog) for catalog in (first, second)] == [2, 3]
    for catalog, seeds in ((first, (0, 1)), (second, (0, None, 3))):
        for row, seed in enumerate(seeds):
            wanted = noise(2, 7, 9) if seed is None else noise(seed)
            assert np.array_equal(pickle.loads(pickle.dumps(catalog)).tissue_grid(row).fraction, wanted)
    write(out, *merge([second.table], second.tissue), None)  # the same again
    assert len(list(tmp_path.glob("tissue-*"))) == 1
    assert Catalog.load(out).fingerprint == second.fingerprint


def test_tissue_that_is_missing_or_cut_is_told(tmp_path: Path) -> None:
    write(str(tmp_path), *merge([part_of([slide("a", noise(0))])], None), None)
    (path,) = tmp_path.glob("tissue-*")
    content = path.read_bytes()
    for broken, message in ((content[:-8], "not 11,"), (b"x" + content[1:], "no tissue of this version")):
        path.write_bytes(broken)
        with pytest.raises(CatalogError, match=message):
            TilePlan(Catalog.load(str(tmp_path)))[0]
    path.unlink()
    with pytest.raises(CatalogError, match="build the catalog anew"):
        TilePlan(Catalog.load(str(tmp_path)))[0]


def test_merging_holds_one_part_s_tissue_at_a_time(tmp_path: Path) -> None:
    cells = noise(0, 1000, 1000)
    before = str(tmp_path / "before")
    write(before, *merge([part_of([slide(f"old{i}", cells) for i in range(70)])], None), None)
    old = Catalog.load(before)
    held = list[int]()

    def parts() -> Iterator[pa.Table]:
        yield old.table
        for number in range(20):
            held.append(pa.total_allocated_bytes())
            yield part_of([slide(f"new{number}-{i}", cells) for i in range(4)])

    tracemalloc.start()
    rows, tissue = merge(parts(), old.tissue)
    with open(tmp_path / "tissue", "wb") as file:
        write_tissue(file, tissue)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.num_rows == 150
    assert (tmp_path / "tissue").stat().st_size > 150e6
    assert max(held) - held[0] < 10e6
    assert peak < 30e6
