"""From a slide's bytes to a batch: OpenSlide is the oracle for pixels."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.tissue import thumbnail, tissue_of_thumbnail, window_fraction
from streaming.delivery.failures import FailureBudget
from streaming.errors import SlideError, StorageError, StreamError
from streaming.plan import TilePlan
from streaming.reading.batch import counters_of, failures_of, pack_replaced
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.slide import open_slide
from streaming.storage.staging import Staging
from streaming.synthetic.layout import SyntheticSlide, tissue_classes
from streaming.synthetic.svs import write_slide
from streaming.vision import cv2
from tests.conftest import write_catalog
from tests.faulty_server import FaultyServer
from tests.tiff_files import STAGED, write_tiff


def oracle(path: Path, x: int, y: int, level: int, side: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((x, y), level, (side, side)).convert("RGB"))


def test_a_tile_at_native_resolution_is_openslide_s_region(slides: list[Path]) -> None:
    slide = open_slide(str(slides[0]))
    assert slide.backend == "blocks"
    assert slide.mpp == 0.25
    assert np.array_equal(slide.read_tile(700, 500, 0.25, 256), oracle(slides[0], 700, 500, 0, 256))
    assert np.array_equal(slide.read_region((1900, 1400), 0, (300, 300)), oracle(slides[0], 1900, 1400, 0, 300))


def test_a_coarser_tile_is_the_area_average_of_the_finer_level(slides: list[Path]) -> None:
    fine = oracle(slides[0], 400, 400, 0, 512).astype(float)
    wanted = fine.reshape(256, 2, 256, 2, 3).mean(axis=(1, 3))
    slide = open_slide(str(slides[0]))
    assert np.abs(slide.read_tile(400, 400, 0.5, 256, exact=True) - wanted).max() <= 1
    # Decoded at half size: within the DCT's rounding of the full decode's average, on all but sharp chroma edges.
    reduced = slide.read_tile(400, 400, 0.5, 256)
    assert 10 * np.log10(255**2 / np.mean((reduced - wanted) ** 2)) > 45


def test_a_pyramid_level_is_read_where_it_has_the_resolution(slides: list[Path]) -> None:
    got = open_slide(str(slides[0])).read_tile(400, 400, 1.0, 128)
    assert np.array_equal(got, oracle(slides[0], 400, 400, 1, 128))


def test_a_slide_on_s3_is_read_by_its_blocks_and_never_copied(
    s3_slides: str, slides: list[Path], tmp_path: Path
) -> None:
    staging = Staging(folder=str(tmp_path / "staged"))
    slide = open_slide(f"{s3_slides}/{slides[0].name}", staging=staging)
    assert slide.backend == "blocks"
    for level, (width, height) in enumerate(slide.level_dimensions):
        for location, size in (((700, 500), (256, 256)), ((width // 4 * 4 - 60, height // 4 * 4 - 88), (128, 128))):
            got = slide.read_region(location, level, size)
            with openslide.OpenSlide(slides[0]) as wanted:
                region = np.asarray(wanted.read_region(location, level, size))[:, :, :3]
            assert np.array_equal(got, region)
    assert not (tmp_path / "staged").exists()


def test_a_slide_on_s3_that_only_openslide_reads_is_staged_once_and_gives_the_same_pixels(
    s3_bucket: str, tmp_path: Path
) -> None:
    path = write_tiff(STAGED, tmp_path / "staged.svs")
    storage.write_bytes(f"{s3_bucket}/staged.svs", path.read_bytes())
    staging = Staging(folder=str(tmp_path / "staged"))
    for _ in range(2):
        slide = open_slide(f"{s3_bucket}/staged.svs", staging=staging)
        assert slide.backend == "openslide"
        assert np.array_equal(slide.read_region((0, 0), 1, (256, 200)), np.asarray(oracle(path, 0, 0, 1, 256))[:200])
    assert len(list(Path(staging.folder).glob("*/*.svs"))) == 1


def test_a_slide_replaced_under_a_running_job_is_an_error_not_a_wrong_pixel(
    s3_bucket: str, slides: list[Path], tmp_path: Path
) -> None:
    for uri in (str(tmp_path / "a.svs"), f"{s3_bucket}/replaced/a.svs"):
        storage.write_bytes(uri, slides[0].read_bytes())
        slide = open_slide(uri)
        slide.read_tile(700, 500, 0.25, 256)
        storage.write_bytes(uri, slides[0].read_bytes()[::-1])
        with pytest.raises(SlideError, match=r"a\.svs: changed since it was catalogued"):
            slide.read_tile(700, 500, 0.25, 256)
        storage.remove(uri)
        with pytest.raises(StorageError, match=r"a\.svs: not found"):
            slide.read_tile(700, 500, 0.25, 256)


def test_the_least_recently_used_copy_makes_room(s3_slides: str, slides: list[Path], tmp_path: Path) -> None:
    infos = [storage.stat(f"{s3_slides}/{path.name}") for path in slides]
    staging = Staging(folder=str(tmp_path), max_bytes=infos[0].size + infos[1].size + infos[2].size - 1)
    first, second = (Path(staging.fetch(info, None)) for info in infos[:2])
    staging.fetch(infos[0], None)
    third = Path(staging.fetch(infos[2], None))
    assert [path.exists() for path in (first, second, third)] == [True, False, True]
    with pytest.raises(StorageError, match="raise staging_gb"):
        Staging(folder=str(tmp_path), max_bytes=10).fetch(infos[1], None)


def test_what_is_no_slide_or_changed_or_has_no_mpp_is_told(slides: list[Path], tmp_path: Path) -> None:
    letter = tmp_path / "letter.svs"
    letter.write_text("Dear reader")
    with pytest.raises(SlideError, match=r"letter\.svs: not a slide"):
        open_slide(str(letter))
    stale = storage.ObjectInfo(str(slides[0]), 5, "old")
    with pytest.raises(SlideError, match="changed since it was catalogued"):
        open_slide(str(slides[0]), expected=stale)
    bare = tmp_path / "bare.svs"
    write_slide(SyntheticSlide(width=1024, height=768, downsamples=(1,), write_mpp=False), bare)
    with pytest.raises(SlideError, match="no mpp"):
        open_slide(str(bare)).read_tile(0, 0, 0.5, 64)
    assert open_slide(str(bare), mpp=0.5).mpp == 0.5


def test_the_tissue_grid_finds_the_maker_s_tissue(tmp_path: Path) -> None:
    made = SyntheticSlide(width=4096, height=3072, patient=2)
    write_slide(made, tmp_path / "slide.svs")
    found = tissue_of_thumbnail(thumbnail(open_slide(str(tmp_path / "slide.svs")))).fraction >= 102
    known = tissue_classes(made, 0, 0, made.width, made.height, 256) > 0
    assert found.shape == known.shape
    assert (found == known).mean() > 0.85


@settings(max_examples=60, deadline=None)
@given(st.floats(-3, 12), st.floats(-3, 12), st.floats(0.1, 9))
def test_the_share_of_a_window_is_its_area_integral(top: float, left: float, extent: float) -> None:
    grid = np.random.default_rng(0).integers(0, 256, (9, 11)).astype(np.uint8)
    one = np.zeros(1, np.int64)
    got = window_fraction(grid.ravel(), one, one + 9, one + 11, np.array([top]), np.array([left]), extent)[0]
    n = 600
    rows, columns = (np.floor(start + (np.arange(n) + 0.5) / n * extent).astype(int) for start in (top, left))
    padded = np.zeros((40, 40))
    padded[10:19, 10:21] = grid
    assert got == pytest.approx(padded[np.ix_(rows + 10, columns + 10)].mean() / 255, abs=0.01)


def test_the_hsv_rule_counts_pixels_within_its_bounds(slides: list[Path]) -> None:
    rule = HsvRule()
    tile = np.full((10, 10, 3), 245, np.uint8)
    purple = cv2.cvtColor(np.uint8([[[140, 120, 150]]]), cv2.COLOR_HSV2RGB)[0, 0]
    tile.reshape(-1, 3)[:60] = purple
    assert rule.accepts(tile)
    tile.reshape(-1, 3)[59] = 245
    assert not rule.accepts(tile)
    assert HsvRule(min_share=0).accepts(tile)


def read(catalog: Catalog, n: int = 48, rule: HsvRule | None = None) -> dict:
    plan = TilePlan(catalog, mpp={0.5: 1}, size=64)
    return TileReader(plan, catalog, ReaderOptions(hsv_rule=rule or HsvRule()))({"index": np.arange(n)})


def test_a_batch_holds_the_tiles_that_its_columns_name(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    batch = read(loaded)
    assert batch["tile"].shape == (48, 64, 64, 3)
    for i in range(0, 48, 7):
        slide = open_slide(loaded.slides()[batch["slide"][i]])
        tile = slide.read_tile(int(batch["x"][i]), int(batch["y"][i]), float(batch["mpp"][i]), 64)
        assert np.array_equal(batch["tile"][i], tile)


def test_tiles_of_an_unreadable_slide_are_replaced_alike_every_time_and_recorded(
    slides: list[Path], tmp_path: Path
) -> None:
    copies = [tmp_path / path.name for path in slides]
    for path, copy in zip(slides, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    catalog = Catalog.load(write_catalog(tmp_path / "catalog", copies))
    copies[1].write_bytes(b"gone bad")
    one, two = read(catalog), read(catalog)
    assert np.array_equal(one["tile"], two["tile"])
    assert 1 not in one["slide"]
    failed = failures_of(one)
    assert failed
    assert {failure.slide for failure in failed} == {str(copies[1])}
    budget = FailureBudget(max_share=0.01)
    with pytest.raises(StreamError, match=str(copies[1])):
        budget.add(one)
    tolerant = FailureBudget(max_share=0.9)
    tolerant.add(one)
    # A slide counts once an index, however often it was tried for it.
    assert tolerant.failed == len({(failure.index, failure.slide) for failure in failed})


def test_tiles_that_the_hsv_rule_turns_down_are_replaced_and_counted_apart(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    strict = read(loaded, rule=HsvRule(min_share=0.95))
    assert strict["filtered"].sum() > 0
    assert all(HsvRule(min_share=0.95).accepts(tile) for tile in strict["tile"])
    assert not failures_of(strict)
    kept = strict["filtered"] == 0
    loose = read(loaded, rule=HsvRule(min_share=0))
    assert np.array_equal(strict["tile"][kept], loose["tile"][kept])


@pytest.fixture
def served(slides: list[Path], tmp_path: Path) -> Iterator[tuple[FaultyServer, Catalog]]:
    """A slide on a server, which is as it is told, and a catalog of it."""
    with FaultyServer(slides[0].read_bytes()) as server:
        yield server, Catalog.load(write_catalog(tmp_path, [f"{server.url}/a.svs"]))


def test_a_straggler_holds_up_neither_other_tiles_nor_their_replacements(
    served: tuple[FaultyServer, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, catalog = served
    rule = HsvRule(min_share=0.9)
    wanted = read(catalog, 24, rule)
    assert wanted["filtered"][1:].sum() > 1
    accepts, others_read, straggled = HsvRule.accepts, threading.Semaphore(0), list[bool]()

    def tell(self: HsvRule, tile: np.ndarray) -> bool:
        accepted = accepts(self, tile)
        if accepted:
            others_read.release()
        return accepted

    def straggle(number: int) -> str:
        if number == 1:  # of the first tile
            straggled.append(all(others_read.acquire(timeout=20) for _ in range(23)))
        return ""

    monkeypatch.setattr(HsvRule, "accepts", tell)
    server.count, server.mood = 0, straggle
    got = read(catalog, 24, rule)
    assert straggled == [True]
    for name in ("tile", "slide", "x", "y", "mpp", "filtered"):
        assert np.array_equal(got[name], wanted[name])


def test_a_bucket_that_refuses_all_is_asked_once_for_each_tile_and_no_more(
    served: tuple[FaultyServer, Catalog],
) -> None:
    server, catalog = served
    server.count, server.mood = 0, lambda n: "403"
    with pytest.raises(StreamError, match=r"index \d+: 24 tiles could not be read, the last: .*access denied"):
        read(catalog, 8)
    assert 8 <= server.count <= 8 * 2  # a tile of 64 px from the finer level touches two rows of blocks


def test_a_rule_that_nothing_passes_is_told(catalog: str) -> None:
    with pytest.raises(StreamError, match=r"failed, 256 of them by the HSV rule \(data\.hsv_rule\) turned down"):
        read(Catalog.load(catalog), 1, HsvRule(value=(255, 255)))


def test_a_single_bad_tile_stops_nothing_and_a_share_past_the_limit_does() -> None:
    def batch(failures: int) -> dict:
        column = [[("a.svs", "broken")]] * failures + [[]] * (32 - failures)
        return {"index": np.arange(32), "filtered": np.zeros(32, int), **pack_replaced(column, [[]] * 32)}

    budget = FailureBudget(max_share=0.01)
    budget.add(batch(1))
    for _ in range(10):
        budget.add(batch(0))
    with pytest.raises(StreamError, match="broken"):
        budget.add(batch(32))


def test_a_batch_tells_what_it_took_and_a_reader_the_sum(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    plan = TilePlan(loaded, mpp={0.25: 1, 1.5: 1}, size=64)
    reader = TileReader(plan, loaded, ReaderOptions(hsv_rule=HsvRule(min_share=0.9)))
    batches = [reader({"index": np.arange(at, at + 16)}) for at in (0, 16)]
    told = [counters_of(batch).as_dict() for batch in batches]
    assert not any(row for batch in batches for row in batch["counters"][1:])
    for name, total in reader.counters().items():
        assert total == pytest.approx(sum(entry[name] for entry in told), abs=1e-5), name
    stages = ["plan_s", "open_s", "request_s", "fetch_s", "decode_s", "assemble_s", "resample_s", "filter_s"]
    for entry, batch in zip(told, batches, strict=True):
        assert entry["tiles"] == 16
        # Each tile that was read, also those turned down, touches a block at least and has each its own range.
        assert entry["blocks"] >= 16 + batch["filtered"].sum()
        assert 0 < entry["requests"] <= entry["blocks"]
        assert entry["nbytes"] > 100 * entry["blocks"]
        assert 0 < sum(entry[name] for name in stages) <= entry["total_s"] + 1e-5
