"""Embedding whole slides through Ray: pixels, files, batches across slides, a kill."""

import json
import subprocess
from pathlib import Path

import h5py
import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest

from streaming import cluster
from streaming.catalog.known import known_slides
from tests.conftest import write_catalog
from tests.processes import TILESTREAM, kill_tree, wait_for
from tests.trainer.publish.test_export import saved
from trainer.embed.files import Embedded
from trainer.embed.job import EmbedReport, Job, embed, rows_of
from trainer.embed.model import load_model, resolve
from trainer.embed.options import EmbedOptions

pytestmark = pytest.mark.slow
# 0.25 µm/px at level 0, where 128 px make a tile. Of a slide's 90 tiles or so none fills a batch.
OPTIONS = EmbedOptions(mpp=0.5, size=64, model_batch=200, token="cls+patch", format="h5", tokens=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture(scope="module")
def folder(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides and, between them, a file that is none."""
    folder = tmp_path_factory.mktemp("slides")
    for path in slides:
        (folder / path.name).hardlink_to(path)
    (folder / "patient0b.svs").write_text("Dear reader, " * 100)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def report(run: str, folder: Path, out: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbedReport:
    """One of the slides is a catalog's, too."""
    catalog = write_catalog(tmp_path_factory.mktemp("of_one"), [folder / "patient1.svs"])
    return embed(run, [str(folder), catalog], str(out), OPTIONS)


def test_hdf5_is_read_by_clams_and_tridents_layout(report: EmbedReport, run: str, folder: Path, out: Path) -> None:
    assert [Path(file).name for file in report.files] == ["patient0.h5", "patient1.h5", "patient2.h5"]
    total = 0
    for path in report.files:
        with h5py.File(path) as file:
            features, coords, tokens = (file[name][:] for name in ("features", "coords", "tokens"))
            attributes = dict(file["coords"].attrs)
            assert file["features"].attrs["name"] == Path(path).stem
            about = Embedded(**json.loads(file.attrs["tilestream.embedded"]))
        assert (features.dtype, coords.dtype, tokens.dtype) == (np.float32, np.int64, np.float16)
        assert features.shape == (len(coords), 384)
        assert tokens.shape == (len(coords), 4, 4, 192)
        assert coords.shape == np.unique(coords, axis=0).shape
        np.testing.assert_allclose(tokens.mean(axis=(1, 2), dtype=np.float32), features[:, 192:], atol=2e-3)
        assert attributes.items() >= {"patch_size": 64, "patch_size_level0": 128, "overlap": 0}.items()
        assert attributes.items() >= {"level0_magnification": 40, "target_magnification": 20}.items()
        assert (attributes["level0_width"], attributes["level0_height"]) == (2048, 1536)
        assert (about.slide, about.slide_mpp, about.extent) == (str(folder / Path(path).stem) + ".svs", 0.25, 128)
        total += len(coords)
    assert report.tiles == total > 200
    again = EmbedOptions(**{**vars(OPTIONS), "models": 2})
    job = Job(run, load_model(run).digest, str(out), again, {})
    known = known_slides([str(folder)])
    undone = [Path(slide.info.uri).name for number, slide in enumerate(known.slides) if number not in job.done(known)]
    assert undone == ["patient0b.svs"]


def test_embeddings_are_the_models_of_openslides_pixels(report: EmbedReport, run: str, folder: Path) -> None:
    model = load_model(run, "cls+patch")
    for path in report.files:
        with h5py.File(path) as file:
            features, coords = file["features"][:], file["coords"][:]
        chosen = [0, len(coords) // 2, len(coords) - 1]
        with openslide.OpenSlide(folder / f"{Path(path).stem}.svs") as slide:
            big = [slide.read_region(tuple(coords[i].tolist()), 0, (128, 128)).convert("RGB") for i in chosen]
        tiles = np.stack([np.asarray(image.reduce(2)) for image in big])
        # JPEG decoded at half its scale is not quite the mean of pixels: a grey value or so.
        assert np.abs(model.embed(tiles) - features[chosen]).max() < 0.05 * np.abs(features).max()


def test_a_file_that_is_no_slide_is_rejected_and_the_others_are_embedded(
    report: EmbedReport, folder: Path, out: Path
) -> None:
    assert [entry.slide for entry in report.rejected] == [str(folder / "patient0b.svs")]
    assert pq.read_table(out / ".rejected" / "rejected.parquet")["slide"].to_pylist() == [str(folder / "patient0b.svs")]
    assert not (out / "patient0b.h5").exists()


@pytest.mark.long
def test_a_model_batch_holds_tiles_of_several_slides(run: str, folder: Path, report: EmbedReport) -> None:
    found = resolve(run)
    cluster.connect(8)
    job = Job(
        found, load_model(found).digest, str(folder / "none"), EmbedOptions(mpp=0.5, size=64, model_batch=100), {}
    )
    batches = list(rows_of(job, known_slides([str(folder)])).iter_batches(batch_size=None, batch_format="numpy"))
    total = report.tiles + 1  # the file that is no slide has a row with its reason
    assert [len(batch["slide"]) for batch in batches] == [100] * (total // 100) + [total % 100]
    assert max(len(set(batch["slide"].tolist())) for batch in batches) >= 2
    order = np.concatenate([batch["slide"] for batch in batches]).tolist()
    assert order == sorted(order)


@pytest.mark.long
def test_a_kill_in_the_midst_costs_no_slide_that_was_done(run: str, slides: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*TILESTREAM, "embed", run, *map(str, slides), "--out", str(out), "--model-batch", "8"]
    command += ["--mpp", "0.25", "--size", "64", "--format", "h5"]
    with (tmp_path / "printed").open("w") as printed:
        killed = subprocess.Popen(command, start_new_session=True, stdout=printed, stderr=printed)
        wait_for(lambda: list(out.glob(".done/*")), killed)
        kill_tree(killed)
    done = sorted(out.glob(".done/*"))
    assert len(done) < len(slides)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    options = EmbedOptions(mpp=0.25, size=64, model_batch=8, format="h5")
    report = embed(run, list(map(str, slides)), str(out), options)
    assert (report.skipped, report.slides) == (len(done), len(slides) - len(done))
    again = embed(run, list(map(str, slides)), str(out), options)
    assert (again.tiles, again.skipped, again.slides) == (0, len(slides), 0)
    for note in done:
        name = f"{note.name.rsplit('-', 1)[0]}.h5"
        assert (out / name).stat().st_mtime_ns == before[name]
    assert sorted(path.name for path in out.glob("*")) == [".done", *(f"{path.stem}.h5" for path in slides)]
