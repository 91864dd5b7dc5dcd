"""Embeddings that others wrote, LazySlide's in a store of its own (`lazyslide_store.py`), and what may be wrong."""

import shutil
import sys
from pathlib import Path
from typing import Any, cast

import h5py
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


FEATURES, COORDS = np.eye(4, dtype=np.float32)[None], np.array([[0, 0], [64, 0], [0, 64], [64, 64]], np.int32)


def hdf5(path: Path, level0: int | None = None, **content: Any) -> None:
    with cast(Any, h5py.File(path, "w")) as file:
        for name, values in content.items():
            if values is None:
                file.create_group(name)
            else:
                file[name] = values
        if level0 is not None:
            file["coords"].attrs["patch_size_level0"] = level0


def test_what_systems_and_programs_leave_beside_embeddings_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "features"  # a hidden folder above is the user's own
    for junk in ("._a.h5", "__MACOSX/a.h5", "@eaDir/a.h5", ".rejected/rejected.parquet"):
        (folder / junk).parent.mkdir(parents=True, exist_ok=True)
        (folder / junk).write_bytes(b"junk")
    hdf5(folder / "a.h5", features=FEATURES)
    for source in (str(folder), f"{folder}/*.h5", f"{folder}/a.h5"):
        assert [file.uri for file in find_features([source])] == [str(folder / "a.h5")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"features": None}, r"features of shape \(\); they are \(tiles, numbers\)"),
        ({"features": [[b"a", b"b"]] * 4, "coords": COORDS}, "no whole file of embeddings .*could not convert"),
        ({"features": FEATURES}, "no whole file of embeddings .*coords"),
        ({"features": FEATURES, "coords": COORDS[:3]}, "4 embeddings and 3 coords"),
        ({"features": FEATURES, "coords": COORDS * np.nan}, "some coords are not finite"),
        ({"features": FEATURES, "coords": COORDS, "level0": 0}, "tiles of 0 level-0 px"),
        ({"features": FEATURES, "coords": COORDS + 2000}, r"4 of 4 tiles lie beside the slide .*x 2000, y 2000"),
    ],
)
def test_what_is_wrong_with_the_hdf5_of_others_is_told(
    tmp_path: Path, slides: list[Path], content: dict[str, Any], told: str
) -> None:
    path = tmp_path / f"{slides[0].stem}.h5"
    hdf5(path, **content)
    with pytest.raises(ConfigError, match=rf"{path}: .*{told}"):
        read_slides([str(tmp_path)], TableSlides(SlideOptions(slides_in=(str(slides[0]),))))


@pytest.mark.parametrize("size", [0, 9, 900])
def test_a_file_cut_short_is_not_the_network_s_fault(tmp_path: Path, size: int) -> None:
    hdf5(tmp_path / "a.h5", features=FEATURES)
    (tmp_path / "a.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"a\.h5: no whole file of embeddings .*; make it again, or take it away"):
        find_features([str(tmp_path)])


def test_embeddings_of_two_models_are_told_apart(tmp_path: Path) -> None:
    for name, width in (("a", 4), ("b", 3)):
        hdf5(tmp_path / f"{name}.h5", features=FEATURES[..., :width])
    with pytest.raises(ConfigError, match=r"of 3 numbers \(.*b\.h5\) and of 4 numbers \(.*a\.h5\); embed all alike"):
        read_slides([str(tmp_path)], TableSlides())
