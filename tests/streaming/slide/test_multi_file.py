"""Slides of several files: staged, versioned and evicted as one."""

import shutil
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.sources import find_slides
from streaming.errors import SlideError, StorageError
from streaming.slide import open_slide
from streaming.slide.multi_file import as_one, members
from streaming.storage.staging import Staging
from tests.conftest import write_catalog

VMS = """[Virtual Microscope Specimen]
NoLayers=1
ImageFile=scan.jpg
ImageFile(1,0)=scan(1,0).jpg
MapFile=scan_map.jpg
MacroImage=../secret.jpg
OptimisationFile=scan.opt
"""

REAL_VMS = """[Virtual Microscope Specimen]
NoLayers=1
NoJpegColumns=1
NoJpegRows=1
ImageFile=scan.jpg
MapFile=scan_map.jpg
PhysicalWidth=128000
PhysicalHeight=128000
SourceLens=40
"""


def put(folder: str, names: dict[str, bytes]) -> None:
    for name, content in names.items():
        storage.write_bytes(f"{folder}/{name}", content)


def staged(folder: Path) -> set[str]:
    return {str(path.relative_to(folder).as_posix()).split("/", 1)[1] for path in folder.rglob("*/*") if path.is_file()}


@pytest.mark.parametrize("kind", ["mrxs", "vms"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_slide_is_its_files_and_no_others(kind: str, remote: bool, s3_bucket: str, tmp_path: Path) -> None:
    folder = f"{s3_bucket}/members-{kind}" if remote else str(tmp_path)
    others = {"scanned.jpg": b"x", "scan2.mrxs": b"x", "scan2/Data0000.dat": b"x", "secret.jpg": b"x"}
    mine = {
        "mrxs": {"scan.mrxs": b"main", "scan/Slidedat.ini": b"ini", "scan/Index.dat": b"i", "scan/Data0000.dat": b"d"},
        "vms": {"scan.vms": VMS.encode(), "scan.jpg": b"0", "scan(1,0).jpg": b"1", "scan_map.jpg": b"m"},
    }[kind]
    put(folder, mine | others)
    files = members(f"{folder}/scan.{kind}")
    assert {file.uri.removeprefix(f"{folder}/") for file in files} == set(mine)
    assert files[0].uri == f"{folder}/scan.{kind}"
    (found,) = find_slides([f"{folder}/scan.{kind}"], None)
    assert found == as_one(files)
    assert found.size == sum(map(len, mine.values()))
    changed = list(mine)[-1]
    put(folder, {changed: b"another"})
    assert as_one(members(files[0].uri)).version != found.version


def test_all_files_of_a_slide_are_one_copy_that_is_evicted_whole(
    s3_slides: str, s3_bucket: str, slides: list[Path], tmp_path: Path
) -> None:
    names = {"scan.mrxs": b"main", "scan/Slidedat.ini": b"ini", "scan/Data0000.dat": bytes(1000)}
    put(f"{s3_bucket}/one", names)
    files, single = members(f"{s3_bucket}/one/scan.mrxs"), storage.stat(f"{s3_slides}/{slides[0].name}")
    staging = Staging(folder=str(tmp_path), max_bytes=single.size + 1000)
    path = Path(staging.fetch(as_one(files), None, files))
    assert {str(file.relative_to(path.parent)) for file in path.parent.rglob("*") if file.is_file()} == set(names)
    staging.fetch(single, None)
    assert staged(tmp_path) == {slides[0].name}
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 1


def test_a_download_that_breaks_off_leaves_nothing(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{s3_bucket}/broken", {"scan.mrxs": b"main", "scan/Slidedat.ini": b"ini", "scan/Index.dat": b"index"})
    files = members(f"{s3_bucket}/broken/scan.mrxs")
    storage.remove(f"{s3_bucket}/broken/scan/Slidedat.ini")
    with pytest.raises(StorageError, match=r"Slidedat\.ini: not found"):
        Staging(folder=str(tmp_path)).fetch(as_one(files), None, files)
    put(f"{s3_bucket}/broken", {"scan/Slidedat.ini": b"imi"})
    with pytest.raises(SlideError, match=r"Slidedat\.ini: changed"):
        Staging(folder=str(tmp_path)).fetch(as_one(files), None, files)
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]


def test_a_slide_that_is_evicted_under_its_reader_is_staged_again(s3_bucket: str, tmp_path: Path) -> None:
    # OpenSlide opens a VMS slide's files anew for each read.
    pixels = np.kron(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    local = tmp_path / "local"
    local.mkdir()
    Image.fromarray(pixels).save(local / "scan.jpg", quality=90, subsampling=0, restart_marker_blocks=8)
    Image.fromarray(pixels[::4, ::4].copy()).save(
        local / "scan_map.jpg", quality=90, subsampling=0, restart_marker_blocks=2
    )
    (local / "scan.vms").write_text(REAL_VMS)
    put(f"{s3_bucket}/vms", {path.name: path.read_bytes() for path in local.iterdir()})
    cache = tmp_path / "staged"
    slide = open_slide(f"{s3_bucket}/vms/scan.vms", staging=Staging(folder=str(cache)))
    assert (slide.vendor, slide.mpp) == ("hamamatsu", 0.25)
    with openslide.OpenSlide(local / "scan.vms") as oracle:
        for x in (0, 100, 300):
            wanted = np.asarray(oracle.read_region((x, 200), 0, (200, 100)))[:, :, :3]
            assert np.array_equal(slide.read_region((x, 200), 0, (200, 100)), wanted)
            assert staged(cache) == {"scan.vms", "scan.jpg", "scan_map.jpg"}
            shutil.rmtree(cache)
    put(f"{s3_bucket}/vms", {"scan.jpg": (local / "scan.jpg").read_bytes()[::-1]})
    with pytest.raises(SlideError, match=r"scan\.jpg: changed"):
        slide.read_region((0, 0), 0, (200, 100))


def test_a_block_index_whose_copy_is_removed_under_a_reader_can_be_read(
    s3_bucket: str, slides: list[Path], tmp_path: Path
) -> None:
    made = Path(write_catalog(tmp_path / "catalog", slides[:1]))
    for path in filter(Path.is_file, made.rglob("*")):
        storage.write_bytes(f"{s3_bucket}/evicted/{path.relative_to(made)}", path.read_bytes())
    staging = Staging(folder=str(tmp_path / "staged"))
    slide = Catalog.load(f"{s3_bucket}/evicted", None, staging).open_slide(0, None, staging)
    shutil.rmtree(staging.folder)
    with openslide.OpenSlide(slides[0]) as oracle:
        wanted = np.asarray(oracle.read_region((300, 200), 0, (256, 256)))[:, :, :3]
    assert np.array_equal(slide.read_region((300, 200), 0, (256, 256)), wanted)
    another = Catalog.load(f"{s3_bucket}/evicted", None, staging).open_slide(0, None, staging)
    assert np.array_equal(another.read_region((300, 200), 0, (256, 256)), wanted)
