"""Embeddings that LazySlide wrote: a store of its own (`lazyslide_store.py`), and what may be wrong with one."""

import shutil
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import zarr

from streaming.errors import ConfigError
from tests.trainer.embed.lazyslide_store import CORNERS, EXTENT, MPP, SIZE, features
from trainer.cli import main
from trainer.embed.feature_files import find_features, read_features, read_slides
from trainer.embed.options import SlideOptions
from trainer.embed.table_slides import TableSlides

STORE = Path(__file__).parents[2] / "data/lazyslide-0.12.zip"
TABLE = "patient0.zarr/tables/mine_tiles"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    shutil.unpack_archive(STORE, tmp_path)
    return tmp_path


def test_a_store_s_tables_are_found_and_read(store: Path) -> None:
    for source in (store, store / "patient0.zarr", store / TABLE):
        (found,) = find_features([str(source)])
        assert (found.uri, found.maker, found.slide) == (f"{store / TABLE}", "LazySlide", "patient0")
        np.testing.assert_array_equal(read_features(found), features())


def test_its_tiles_lie_where_lazyslide_has_them_whatever_their_order(store: Path, slides: list[Path]) -> None:
    places = TableSlides(SlideOptions(slides_in=(str(slides[0]),)))
    (found,) = read_slides([str(store)], places)
    np.testing.assert_array_equal(found.corners, CORNERS)
    about = found.about
    assert (about.slide, about.mpp, about.size, about.extent, about.model) == (
        str(slides[0]),
        MPP,
        SIZE,
        EXTENT,
        "mine",
    )
    # A table of some tiles, in an order of its own.
    table: Any = zarr.open_group(store / TABLE, mode="r+")
    some = np.array([7, 0, 3])
    for name, values in (("obs/tile_id", some), ("X", features()[some])):
        del table[name]
        table[name] = values
    (found,) = read_slides([str(store)], places)
    np.testing.assert_array_equal(found.corners, CORNERS[some])
    np.testing.assert_array_equal(found.features, features()[some])
    table["obs/tile_id"][:] = [7, 0, 99]
    with pytest.raises(ConfigError, match=rf"{TABLE}: some of its rows are of no tile in shapes/tiles"):
        read_slides([str(store)], places)


def test_what_is_wrong_with_a_store_is_told_in_one_line(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["picture", "geojson", str(store), "--out", str(store / "out")]
    assert main(command) == 2
    assert "as LazySlide writes them, which tells no slide's address; name a folder" in capsys.readouterr().err
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "zarr", cast(Any, None))
        assert main(command) == 2
        assert capsys.readouterr().err.endswith(f"{TABLE}: LazySlide's stores need zarr: pip install 'zarr>=3,<4'\n")
    (store / TABLE / "zarr.json").write_text("{")
    assert main(command) == 2
    assert f"{TABLE}: no whole file of embeddings" in capsys.readouterr().err
    shutil.rmtree(store / TABLE)
    assert main(command) == 2
    assert "no file here holds embeddings" in capsys.readouterr().err
