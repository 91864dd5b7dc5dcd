"""Catalogs: built by Ray Data, extended, interrupted, read again."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from streaming import storage
from streaming.catalog import Catalog, build
from streaming.catalog.build import build_catalog
from streaming.catalog.metadata_csv import read_metadata
from streaming.errors import CatalogError, ConfigError
from streaming.plan import TilePlan
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from trainer.cli import main

pytestmark = pytest.mark.slow


def test_a_catalog_is_built_extended_and_left_alone_where_nothing_changed(slides: list[Path], tmp_path: Path) -> None:
    out = str(tmp_path / "catalog")
    (tmp_path / "patients.csv").write_text("file,patient,cohort\npatient0,p0,tcga\npatient1.svs,p1,own\n")
    assert build_catalog([str(slides[0])], out).added == 1
    report = build_catalog([str(slides[0].parent)], out, metadata_csv=str(tmp_path / "patients.csv"))
    assert (report.added, report.unchanged, report.total, report.unmatched) == (2, 1, 3, 1)
    catalog = Catalog.load(out)
    table = catalog.to_arrow().to_pylist()
    assert [row["slide"] for row in table] == [str(path) for path in slides]
    assert [row["patient"] for row in table] == ["p0", "p1", None]
    assert {(row["vendor"], row["mpp"], row["width"], row["height"]) for row in table} == {("aperio", 0.25, 2048, 1536)}
    assert [level["compression"] for level in table[0]["levels"]] == ["JPEG", "JPEG"]
    before = catalog.fingerprint
    assert build_catalog([f"{slides[0].parent}/*.svs"], out).unchanged == 3
    assert Catalog.load(out).fingerprint == before
    # Patients and cohorts decide which slides a share of them has; other columns decide nothing.
    for header, changes in (("file,patient,cohort,stain", False), ("file,patient,cohort", True)):
        patient = "p9" if changes else "p0"
        (tmp_path / "patients.csv").write_text(f"{header}\npatient0,{patient},tcga{',he' * (not changes)}\n")
        build_catalog([str(slides[0].parent)], out, metadata_csv=str(tmp_path / "patients.csv"))
        assert (Catalog.load(out).fingerprint != before) == changes


def test_slides_that_cannot_be_used_are_rejected_with_the_reason_and_the_others_are_not_affected(
    slides: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    content = slides[0].read_bytes()
    (folder / "good.svs").write_bytes(content)
    (folder / "cut.svs").write_bytes(content[: len(content) // 2])
    (folder / "text.svs").write_text("no slide")
    write_slide(SyntheticSlide(width=1024, height=768, downsamples=(1,), write_mpp=False), folder / "bare.svs")
    out = str(tmp_path / "catalog")
    report = build_catalog([str(folder)], out)
    assert (report.added, len(report.rejected)) == (1, 3)
    reasons = {Path(r["slide"]).name: r["reason"] for r in pq.read_table(f"{out}/rejected.parquet").to_pylist()}
    assert set(reasons) == {"cut.svs", "text.svs", "bare.svs"}
    assert "not a slide" in reasons["text.svs"]
    assert "no mpp" in reasons["bare.svs"]
    # Rejected slides are tried again: this time with an mpp.
    again = build_catalog([str(folder)], out, mpp=0.5)
    assert (again.added, again.unchanged, len(again.rejected)) == (1, 1, 2)
    assert dict(zip(*[Catalog.load(out).to_arrow()[n].to_pylist() for n in ("slide", "mpp")], strict=True)) == {
        str(folder / "bare.svs"): 0.5,
        str(folder / "good.svs"): 0.25,
    }


def test_what_is_left_out_and_what_will_be_slow_is_told_at_the_end(
    slides: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "slides"
    for name in (*(f"{i}.vsi" for i in range(3)), "a.isyntax", "b.ISYNTAX", "c.zarr/0/0", "c.zarr/0/1", "README"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of another format")
    with pytest.raises(CatalogError, match=r"none of its 8 files is a slide: 3 \.vsi, 2 \.isyntax, 1 \.zarr, 1 "):
        build_catalog([str(folder)], str(tmp_path / "catalog"))
    write_slide(SyntheticSlide(width=2048, height=1536, downsamples=(1,), patient=1), folder / "single.svs")
    write_slide(SyntheticSlide(width=2048, height=1536, downsamples=(1, 4), patient=2), folder / "pyramid.svs")
    assert main(["catalog", str(folder), "--out", str(tmp_path / "catalog")]) == 0
    said, told = capsys.readouterr()
    kinds = "3 .vsi, 2 .isyntax, 1 .zarr, 1 without suffix"
    assert f"7 files skipped: {kinds} (named in {tmp_path}/catalog/skipped.parquet)\n" in said
    assert f"{folder}/single.svs: no level near 2 µm/px: a tile there is made of 64 times its pixels" in told
    assert "pyramid.svs" not in told
    # The dry run tells it of the magnifications that are drawn.
    mix = ["--size", "32", "--steps", "0:2", "--batch", "4", "--dry-run"]
    assert main(["stream", str(tmp_path / "catalog"), *mix, "--mpp", "0.5,2,8"]) == 0
    one, two = capsys.readouterr().err.splitlines()
    assert one.startswith(f"{folder}/single.svs: no level near 2 µm/px: a tile there is made of 64 times")
    assert two.startswith(f"{folder}/single.svs and 1 more: no level near 8 µm/px: a tile there is made of 1024")
    assert main(["stream", str(tmp_path / "catalog"), *mix, "--mpp", "0.5"]) == 0
    assert "no level" not in capsys.readouterr().err


def test_a_catalog_of_another_version_is_refused_with_one_line_that_says_to_build_it_anew(
    slides: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "catalog")
    build_catalog([str(slides[0])], out)
    table = pq.read_table(f"{out}/slides.parquet")
    pq.write_table(table.replace_schema_metadata({"tilestream.catalog": "3"}), f"{out}/slides.parquet")
    capsys.readouterr()
    for command in (["stream", out, "--dry-run"], ["catalog", str(slides[0]), "--out", out]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        remedy = r"build it anew with `tilestream catalog`, in another folder$"
        assert re.search(rf"version 3, this tilestream reads version 8; {remedy}", line)
        assert out in line


def test_an_interrupted_build_goes_on_with_what_it_had_saved(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "catalog")
    monkeypatch.setattr(build, "_SAVE_EVERY_S", 0.0)
    real = storage.write_table

    def interrupted(uri: str, *arguments: object) -> None:
        real(uri, *arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_catalog([str(path) for path in slides], out)
    monkeypatch.setattr(storage, "write_table", real)
    with pytest.raises(CatalogError, match="interrupted"):
        Catalog.load(out)
    report = build_catalog([str(path) for path in slides], out)
    assert (report.added, report.unchanged, report.total) == (2, 1, 3)
    assert not list((tmp_path / "catalog" / "parts").iterdir())


def test_a_csv_with_two_rows_for_a_slide_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_text("slide,patient\na.svs,1\na.svs,2\n")
    with pytest.raises(ConfigError, match=r"a\.svs"):
        read_metadata(str(path), None)


def deadly_slide(path: Path) -> None:
    """An Aperio slide whose block lengths, read as 64-bit, make OpenSlide 4.0.1 abort: no memory for them.

    Its two levels of one size are no pyramid that the block reader would take.
    """
    image = np.random.default_rng(0).integers(0, 255, (512, 512, 3)).astype(np.uint8)
    description = "Aperio Image Library v12|AppMag = 40|MPP = 0.25"
    options = {"tile": (256, 256), "compression": "aperio_jp2000_rgb", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for _ in range(2):
            tiff.write(image, description=description, **options)
    with tifffile.TiffFile(path) as tiff:
        kind_at = tiff.pages[0].tags["TileByteCounts"].offset + 2
    content = bytearray(path.read_bytes())
    content[kind_at : kind_at + 2] = (16).to_bytes(2, "little")
    path.write_bytes(content)


def test_a_slide_that_kills_its_process_costs_itself_alone(slides: list[Path], tmp_path: Path) -> None:
    deadly_slide(tmp_path / "deadly.svs")
    read = "import openslide, sys; openslide.OpenSlide(sys.argv[1]).read_region((0, 0), 0, (9, 9))"
    killed = subprocess.run([sys.executable, "-c", read, tmp_path / "deadly.svs"], capture_output=True)
    assert killed.returncode < 0, "OpenSlide learnt to refuse it: this test needs another slide"
    report = build_catalog([str(tmp_path / "deadly.svs"), str(slides[0])], str(tmp_path / "catalog"))
    assert report.added == 1
    (rejected,) = report.rejected
    assert rejected.slide == str(tmp_path / "deadly.svs")
    assert "the process that read it died" in rejected.reason


def test_a_catalog_is_pickled_as_it_was_loaded(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    fresh = pickle.dumps(loaded)
    TileReader(TilePlan(loaded, mpp={0.5: 1}), loaded, ReaderOptions())({"index": np.arange(4)})
    # Threads of a reader work with one catalog, and one of them may pickle it while another fills what it keeps.
    assert set(vars(loaded)) - set(vars(pickle.loads(fresh)))
    assert pickle.dumps(loaded) == fresh


def test_readers_get_what_opening_takes_and_read_the_same_tiles(catalog: str) -> None:
    loaded, index = Catalog.load(catalog), {"index": np.arange(8)}
    theirs = pickle.loads(pickle.dumps(loaded.for_readers()))
    assert theirs.table.nbytes < loaded.table.nbytes / 2
    plan = TilePlan(loaded, mpp={0.5: 1})
    own, read = (TileReader(plan, known, ReaderOptions())(index)["tile"] for known in (loaded, theirs))
    np.testing.assert_array_equal(read, own)
