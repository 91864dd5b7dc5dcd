"""Windows of few slides: each staged slide is fetched once a window, in a cache that holds only some of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streaming import storage
from streaming.catalog import Catalog
from streaming.plan import TilePlan
from streaming.plan.universe import Universe
from streaming.reading.batch import counters_of
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.storage.staging import Staging
from tests.conftest import write_catalog
from tests.tiff_files import STAGED, write_tiff

SLIDES, WINDOW, WINDOW_SLIDES = 9, 32, 3


@pytest.fixture(scope="module")
def staged_catalog(s3_bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Slides on S3 that only OpenSlide reads."""
    folder = tmp_path_factory.mktemp("windows")
    content = write_tiff(STAGED, folder / "staged.svs").read_bytes()
    uris = [f"{s3_bucket}/windows/slide{i}.svs" for i in range(SLIDES)]
    for uri in uris:
        storage.write_bytes(uri, content)
    catalog = Catalog.load(write_catalog(folder / "catalog", uris, 0.5, Staging(folder=str(folder / "inspected"))))
    assert catalog.table["backend"].to_pylist() == ["openslide"] * SLIDES
    return catalog


def downloads(catalog: Catalog, universe: Universe, folder: Path, num_windows: int) -> list[int]:
    """Copies fetched in each window's indices, by two readers that take turns, each new in every window.

    (A reader keeps slides open whose copies are gone; new ones have to ask the cache.)
    """
    size = storage.stat(catalog.slides()[0]).size
    staging = Staging(folder=str(folder), max_bytes=size * (WINDOW_SLIDES + 1))
    options = ReaderOptions(hsv_rule=HsvRule(min_share=0), staging=staging)
    plan = TilePlan(catalog, mpp={0.5: 1}, size=32, min_tissue=0.01, universe=universe)
    fetched = []
    for window in range(num_windows):
        readers = [TileReader(plan, catalog, options) for _ in range(2)]
        batches = np.split(np.arange(window * WINDOW, (window + 1) * WINDOW), 8)
        taken = [counters_of(readers[i % 2]({"index": batch})) for i, batch in enumerate(batches)]
        fetched.append(int(sum(entry.staged_misses for entry in taken)))
    return fetched


def test_a_staged_slide_is_fetched_once_a_window_though_the_cache_is_smaller_than_the_catalog(
    staged_catalog: Catalog, tmp_path: Path
) -> None:
    windowed = Universe(window=WINDOW, window_slides=WINDOW_SLIDES)
    first = downloads(staged_catalog, windowed, tmp_path / "windows", 2 * SLIDES // WINDOW_SLIDES)
    # All slides once an epoch of three windows; one that the window before left in the cache is not fetched again.
    assert first[:3] == [3, 3, 3]
    assert all(fetched <= WINDOW_SLIDES for fetched in first)
    free = downloads(staged_catalog, replace(windowed, window=None), tmp_path / "free", 2)
    assert min(free) > WINDOW_SLIDES
