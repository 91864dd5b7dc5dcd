"""Stores of LazySlide, read back by wsidata where it is installed (it asks for an older pandas than the lock has)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.show.test_pictures import embed_here, run
from trainer.cli import main
from trainer.embed.files import find_embeddings
from trainer.embed.options import EmbedOptions

__all__ = ["run"]
HERE = importlib.util.find_spec("wsidata") is not None


@pytest.mark.skipif(HERE, reason="wsidata is installed")
def test_it_is_told_that_wsidata_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lazyslide", str(tmp_path), "--out", str(tmp_path / "stores")]) == 2
    assert "pip install wsidata" in capsys.readouterr().err
    assert not (tmp_path / "stores").exists()


def test_stores_are_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lazyslide", str(tmp_path), "--out", "s3://bucket/stores"]) == 2
    assert "s3://bucket/stores: LazySlide opens stores on this machine alone" in capsys.readouterr().err


@pytest.mark.skipif(not HERE, reason="wsidata is not installed")
@pytest.mark.filterwarnings("default")
def test_wsidata_has_tiles_and_embeddings_beside_the_slide(run: str, slides: list[Path], tmp_path: Path) -> None:
    from wsidata import open_wsi

    (found,) = embed_here(run, slides[:1], tmp_path / "embeddings", EmbedOptions(mpp=0.5, size=64))
    for _ in range(2):  # the second replaces the first
        assert main(["lazyslide", str(tmp_path / "embeddings"), "--out", str(tmp_path), "--feature", "mine"]) == 0
    assert find_embeddings([str(tmp_path / "embeddings")]) == [found.uri]
    wsi = open_wsi(slides[0], store=str(tmp_path))
    assert np.array_equal(wsi.tables["mine_tiles"].X, found.features)
    assert np.array_equal(wsi.shapes["tiles"][["x", "y"]], found.corners)
    spec = wsi.tile_spec("tiles")
    assert (spec.mpp, spec.height, spec.base_height) == (0.5, 64, 128)
    assert wsi.fetch.features_anndata("mine", "tiles").shape == found.features.shape
