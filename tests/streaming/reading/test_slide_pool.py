"""The slides that a reader keeps open."""

from pathlib import Path

import numpy as np
import pytest

from streaming import storage
from streaming.catalog import Catalog
from streaming.counters import Counters
from streaming.reading import slide_pool
from streaming.reading.slide_pool import SlidePool
from streaming.slide import Slide, block_index
from streaming.storage import sparse_copy
from streaming.storage.staging import Staging
from tests.conftest import write_catalog


@pytest.fixture
def remote(s3_bucket: str, slides: list[Path], tmp_path: Path) -> Catalog:
    """A catalog on S3 of local slides."""
    made = Path(write_catalog(tmp_path / "catalog", slides))
    uri = f"{s3_bucket}/{tmp_path.name}"
    for path in filter(Path.is_file, made.rglob("*")):
        storage.write_bytes(f"{uri}/{path.relative_to(made)}", path.read_bytes())
    return Catalog.load(uri, None, Staging(folder=str(tmp_path / "cache")))


def test_what_tiles_need_of_remote_indexes_is_there_before_the_first_one_begins(
    remote: Catalog, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_copy, "PART_NBYTES", 64)  # made slides have few blocks
    monkeypatch.setattr(block_index, "_MIN_HEAD", 64)
    pool = SlidePool[int](lambda row, count: remote.open_slide(row, None, Staging(), count))
    tiles = [(row, x, 300, mpp) for row in range(len(slides)) for x in (0, 900) for mpp in (0.5, 2.0)]
    prepared, begun = Counters(), Counters()
    pool.prepare(tiles, 64, 0.05, prepared)
    assert prepared.requests > 0
    pending = [pool.begin_tile(*tile, 64, 0.05, begun) for tile in tiles]
    blocks = begun.requests
    # The same again asks for blocks alone, too: no part of an index came when tiles began.
    again = Counters()
    for tile in tiles:
        pool.begin_tile(*tile, 64, 0.05, again)
    assert again.requests == blocks
    for tile, waiting in zip(tiles, pending, strict=True):
        found = np.empty((64, 64, 3), np.uint8)
        waiting.fill(found)
        wanted = remote.open_slide(tile[0], None, Staging()).read_tile(*tile[1:], 64)
        assert np.array_equal(found, wanted)


def test_a_reader_keeps_no_more_slides_open_than_it_may(catalog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slide_pool, "_MAX_SLIDES", 2)
    loaded, opened = Catalog.load(catalog), list[int]()

    def opener(row: int, count: Counters) -> Slide:
        opened.append(row)
        return loaded.open_slide(row, None, Staging(), count)

    pool = SlidePool[int](opener)
    for row in (0, 1, 0, 2, 1, 0):
        pool.begin_tile(row, 0, 0, 0.5, 64, 0.05)
    assert opened == [0, 1, 2, 0]
    assert len(pool._slides) == 2
    pool.open_all([0, 1, 2])
    assert len(pool._slides) == 2
