"""Slides of the Imaging Data Commons where they lie: from its index to a model, as a user goes it, and by a mirror."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pyarrow.parquet as pq
import pytest

from streaming import storage
from streaming.catalog import Catalog
from streaming.errors import SlideError
from streaming.slide import open_slide
from streaming.storage.staging import Staging
from tests.conftest import write_catalog
from tests.dicom_files import PATIENT, Kind, write_series
from tests.faulty_server import FaultyServer
from tests.idc_index import BUCKET, series, write_file_table, write_index
from tests.processes import SMALL, TILESTREAM, kill_tree, wait_for
from trainer.cli import main

pytestmark = pytest.mark.slow
# By the first letter of the series: in this order their slides lie in the catalog, as the SVS's do in theirs.
AS_SVS = {"a1": Kind(), "b1": Kind(tables="extended"), "c1": Kind(tables="none", parts=3)}
OTHERS = {
    "d1": Kind(tables="basic"),
    "d2": Kind(tables="big tiff", icc_nbytes=141_992),
    "d3": Kind(sparse=True),
    "d4": Kind(codec="jpeg2000", photometric="YBR_RCT"),
    "d5": Kind(codec="htj2k"),
    "d6": Kind(codec="jpegls"),
    "d7": Kind(codec="none", planes=2),
}
UNUSABLE = {
    "d8": Kind(codec="none", photometric="MONOCHROME2"),
    "e1": Kind(changes=(("TotalPixelMatrixColumns", 0),)),
    "e2": Kind(),
}
COLLECTIONS = {"a": "tcga_brca", "b": "gtex", "c": "cptac_luad", "d": "tcga_luad", "e": "tcga_luad"}
PATIENTS = {"a1": "TCGA-3C-AAAU", "b1": "GTEX-1117F"}
TILES = ("--mpp", "0.5,1", "--steps", "0:3", "--batch", "8", "--size", "96", "--readers", "1:1", "--digest")


@dataclass(frozen=True)
class Public:
    """The bucket, a copy of it in a folder, and its index."""

    copy: Path
    index: str


@pytest.fixture(scope="module")
def public(s3_bucket: str, slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Public:
    copy, client = tmp_path_factory.mktemp("copy"), boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="idc-open-data")
    rows: list[dict[str, Any]] = []
    for number, (uuid, kind) in enumerate({**AS_SVS, **OTHERS, **UNUSABLE}.items()):
        folder = copy / uuid
        write_series(folder, slides[number % 3], kind)
        if uuid == "e2":
            for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_size)[3:]:
                path.unlink()  # its label, overview and thumbnail stay
        for path in folder.iterdir():
            client.upload_file(str(path), "idc-open-data", f"{uuid}/{path.name}", ExtraArgs={"ACL": "public-read"})
        patient, nbytes = PATIENTS.get(uuid, f"TCGA-05-{uuid}"), sum(path.stat().st_size for path in folder.iterdir())
        told = {"instanceCount": len(list(folder.iterdir())), "series_size_MB": nbytes / 1e6}
        license = "CC BY 4.0" if COLLECTIONS[uuid[0]] == "gtex" else "CC BY 3.0"
        rows.append(series(COLLECTIONS[uuid[0]], patient, uuid, license_short_name=license, **told))
    rows.append(series("tcga_luad", "TCGA-05-x", "f1", Modality="ANN"))
    return Public(copy, write_index(tmp_path_factory.mktemp("index"), rows))


@pytest.fixture
def nowhere() -> Iterator[None]:
    """No server at the address of S3."""
    before, os.environ["AWS_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"], "http://127.0.0.1:9"
    yield
    os.environ["AWS_ENDPOINT_URL"] = before


def digests(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main(["stream", *arguments, *TILES]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_from_the_index_to_a_model_with_its_card(
    public: Public, slides: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog, index = str(tmp_path / "catalog"), ("--idc-index", public.index)
    some = ("--where", "PatientID NOT LIKE 'TCGA-05-%' OR SeriesInstanceUID LIKE '%.c1'")
    assert main(["catalog", "idc:*", *index, *some, "--out", catalog]) == 0
    said = capsys.readouterr()
    assert "3 slides: 3 added, 0 changed, 0 unchanged, 0 rejected" in said.out
    assert "catalog: 3 to look at: about" in said.err

    # The same slides as SVS, in the same order, give the same tiles; so does a copy in a folder.
    of_svs = write_catalog(tmp_path / "svs", slides)
    wanted = digests(capsys, of_svs)
    assert len(set(wanted)) == 3
    assert digests(capsys, catalog) == wanted
    assert digests(capsys, catalog, "--mirrors", f"{BUCKET}={public.copy}") == wanted

    # The others are added, what was there is not asked for again, and what can't be used is told by its series.
    assert main(["catalog", "idc:tcga_*", "idc:gtex", "idc:cptac_luad", *index, "--out", catalog]) == 0
    assert "10 slides: 7 added, 0 changed, 3 unchanged, 3 rejected" in capsys.readouterr().out
    reasons = {row["slide"]: row["reason"] for row in pq.read_table(f"{catalog}/rejected.parquet").to_pylist()}
    assert set(reasons) == {f"{BUCKET}/{uuid}" for uuid in UNUSABLE}
    assert reasons[f"{BUCKET}/d8"] == "no tissue found"
    assert "no level" in reasons[f"{BUCKET}/e2"]
    found = Catalog.load(catalog).to_arrow().to_pylist()
    assert {storage.name_of(row["slide"].rpartition("/")[0]) for row in found} == {*AS_SVS, *OTHERS}
    assert {row["backend"] for row in found} == {"blocks"}
    assert {(row["collection"], row["cohort"], row["site"]) for row in found} == {
        ("tcga_brca", "tcga", "3C"),
        ("gtex", "gtex", None),
        ("cptac_luad", "cptac", "05"),
        ("tcga_luad", "tcga", "05"),
    }
    for path in (tmp_path / "catalog").rglob("*"):
        assert path.is_dir() or PATIENT.split("^")[0].encode() not in path.read_bytes().replace(b"DOE", b"Doe")

    run, out = str(tmp_path / "run"), tmp_path / "model"
    train = ["train", "debug", "--data.catalog", catalog, "--run.out", run, *SMALL, "--data.mpp", "{0.5: 1, 1.0: 1}"]
    train += ["--train.steps", "8", "--train.batch", "4", "--optim.warmup_steps", "2", "--train.log_every", "1"]
    assert main([*train, "--train.ranks", "1", "--debug"]) == 0
    embeddings = str(tmp_path / "embeddings")
    assert main(["embed", run, "idc:tcga_brca", *index, "--out", embeddings, "--mpp", "1.0", "--size", "128"]) == 0
    (file,) = [path for path in Path(embeddings).iterdir() if path.suffix == ".parquet"]
    assert pq.read_table(file)["slide"][0].as_py() == found[0]["slide"]
    assert main(["export", run, "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    doi = "[10.5281/zenodo.12689962](https://doi.org/10.5281/zenodo.12689962)"
    assert "10 slides" in card
    assert f"| gtex | 1 | 1 | 10.0% | CC BY 4.0 | {doi} |" in card
    assert f"| tcga_luad | 7 | 7 | 70.0% | CC BY 3.0 | {doi} |" in card
    sources = json.loads((out / "config.json").read_text())["tilestream"]["sources"]
    assert sum(source["share"] for source in sources) == pytest.approx(1)


@pytest.mark.long
def test_a_catalog_killed_midway_goes_on_and_is_the_undisturbed_one(
    public: Public, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ("catalog", "idc:*", "--idc-index", public.index, "--out")
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def slowly(number: int) -> str:
        # Parts are saved after 20 seconds: by then some series must be done, and others not.
        time.sleep(8 if number > 20 else 0)
        return ""

    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], slowly) as server:
        running = subprocess.Popen(
            [*TILESTREAM, *source, str(killed)],
            env={**os.environ, "AWS_ENDPOINT_URL": server.url},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: list(killed.glob("parts/*.parquet")), running)
        finally:
            kill_tree(running)
    assert not (killed / "slides.parquet").exists()
    saved = sum(pq.read_table(part).num_rows for part in killed.glob("parts/*.parquet"))
    assert 0 < saved < 10
    assert main([*source, str(killed)]) == 0
    said = capsys.readouterr()
    assert f"10 slides: {10 - saved} added, 0 changed, {saved} unchanged, 3 rejected" in said.out
    assert f"catalog: {13 - saved} to look at, {saved} known: about" in said.err
    assert main([*source, str(whole)]) == 0
    one, other = Catalog.load(str(killed)), Catalog.load(str(whole))
    assert one.fingerprint == other.fingerprint
    # Where a pack's name and place tell of their run alone, what lies there is compared.
    names = [name for name in one.table.column_names if name not in ("index", "index_at")]
    assert one.table.select(names).equals(other.table.select(names))
    assert _indexes(killed, one) == _indexes(whole, other)
    assert (killed / "rejected.parquet").read_bytes() == (whole / "rejected.parquet").read_bytes()
    assert not list((killed / "parts").iterdir())


def _indexes(folder: Path, catalog: Catalog) -> list[bytes]:
    """The block index of each slide."""
    places = zip(*(catalog.table[name].to_pylist() for name in ("index", "index_at", "index_nbytes")), strict=True)
    return [(folder / "blocks" / pack).read_bytes()[at : at + size] for pack, at, size in places]


def test_a_mirror_serves_a_whole_catalog_and_the_catalog_is_the_same(
    public: Public,
    nowhere: None,
    slides: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The three smallest files of each are label, overview and thumbnail.
    by_size = {uuid: sorted((p.stat().st_size, p.stem) for p in (public.copy / uuid).iterdir()) for uuid in AS_SVS}
    files = {
        uuid: [(stem, size, "VOLUME" if at > 2 else "LABEL") for at, (size, stem) in enumerate(of_series)]
        for uuid, of_series in by_size.items()
    }
    index = Path(write_index(tmp_path / "index", pq.read_table(f"{public.index}/idc_index.parquet").to_pylist()))
    sources = ["idc:tcga_brca", "idc:gtex", "idc:cptac_luad"]
    made = list[str]()
    for name in ("listed", "told"):
        out = str(tmp_path / name)
        mirror = ("--mirrors", f"{BUCKET}={public.copy}") if name == "listed" else ()
        if name == "told":
            monkeypatch.setenv("TILESTREAM_MIRRORS", f"s3://other=/nowhere,{BUCKET}={public.copy}")
            write_file_table(index, files)
        assert main(["catalog", *sources, "--idc-index", str(index), "--out", out, *mirror]) == 0
        made.append(Catalog.load(out).fingerprint)
    assert made[0] == made[1]
    again = ["catalog", *sources, "--idc-index", str(index), "--out", str(tmp_path / "told")]
    monkeypatch.delenv("TILESTREAM_MIRRORS")
    assert main(again) == 0  # nobody is asked for what is done

    # A copy that is cut off, or grew, is no mirror.
    catalog, row = Catalog.load(str(tmp_path / "told")), 0
    slide = catalog.slides()[row]
    broken = tmp_path / "broken" / slide.removeprefix(f"{BUCKET}/")
    broken.parent.mkdir(parents=True)
    broken.write_bytes((public.copy / slide.removeprefix(f"{BUCKET}/")).read_bytes() + b"more")
    options = {"mirrors": {BUCKET: str(tmp_path / "broken")}}
    with pytest.raises(SlideError, match="bytes, not"):
        catalog.open_slide(row, options, Staging()).read_region((0, 0), 0, (64, 64))
    whole = open_slide(slide, {"mirrors": {BUCKET: str(public.copy)}})
    assert whole.uri == slide

    # A table may call a folder of two slides one series.
    both = tmp_path / "both"
    for number in (0, 1):
        write_series(both, slides[number], Kind(number=number))
    (tmp_path / "table.csv").write_text(f"slide\n{both}/\n")
    assert main(["catalog", str(tmp_path / "table.csv"), "--out", str(tmp_path / "mixed")]) == 2
    assert "of another series" in capsys.readouterr().err
