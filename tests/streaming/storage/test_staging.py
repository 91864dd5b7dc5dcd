"""The cache of staged copies, shared by all processes of a node."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from streaming import storage
from streaming.errors import NodeError, StorageError
from streaming.storage.staging import Staging

FETCH = """
import sys
from streaming import storage
from streaming.slide import Staging
sys.stdin.readline()
print(Staging(folder=sys.argv[1]).fetch(storage.stat(sys.argv[2]), None))
"""


def test_processes_that_want_one_slide_at_once_download_it_once(
    s3_slides: str, slides: list[Path], tmp_path: Path
) -> None:
    uri = f"{s3_slides}/{slides[0].name}"
    arguments = [sys.executable, "-c", FETCH, str(tmp_path), uri]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(arguments, **pipes) for _ in range(3)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (path,) = paths
    assert Path(path).read_bytes() == slides[0].read_bytes()
    assert [file.name for file in tmp_path.glob("*/*")] == [slides[0].name]


def test_what_a_killed_download_left_goes_once_it_is_old_and_one_under_way_stays(
    s3_slides: str, slides: list[Path], tmp_path: Path
) -> None:
    left, under_way = (tmp_path / f"{key}.part-0123abcd" / "slide.svs" for key in ("left", "under_way"))
    for part in (left, under_way):
        part.parent.mkdir()
        part.write_bytes(b"half")
    os.utime(left, (time.time() - 7200,) * 2)
    Staging(folder=str(tmp_path)).fetch(storage.stat(f"{s3_slides}/{slides[0].name}"), None)
    assert (left.exists(), under_way.exists()) == (False, True)


def test_a_copy_that_is_read_outlives_its_eviction(s3_slides: str, slides: list[Path], tmp_path: Path) -> None:
    first, second = (storage.stat(f"{s3_slides}/{path.name}") for path in slides[:2])
    staging = Staging(folder=str(tmp_path), max_bytes=max(first.size, second.size))
    with open(staging.fetch(first, None), "rb") as reading:
        staging.fetch(second, None)
        assert not Path(reading.name).exists()
        assert reading.read() == slides[0].read_bytes()


def test_a_slide_that_vanished_is_told_and_leaves_nothing(s3_slides: str, tmp_path: Path) -> None:
    gone = storage.ObjectInfo(f"{s3_slides}/gone.svs", 10, "v")
    with pytest.raises(StorageError, match=r"gone\.svs: not found"):
        Staging(folder=str(tmp_path)).fetch(gone, None)
    assert not list(tmp_path.glob("*/*"))


def test_a_disk_smaller_than_the_cache_may_become_makes_room_by_the_oldest_copies(
    s3_slides: str, slides: list[Path], make_disk: Callable[[int], Path]
) -> None:
    small_disk = make_disk(int(2.5 * max(path.stat().st_size for path in slides)))
    staging = Staging(folder=str(small_disk))
    for path in slides:
        assert Path(staging.fetch(storage.stat(f"{s3_slides}/{path.name}"), None)).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in small_disk.glob("*/*")) == sorted(path.name for path in slides[1:])


def test_a_full_disk_is_no_fault_of_the_slide_and_leaves_no_part(
    s3_slides: str, slides: list[Path], make_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_disk = make_disk(int(2.5 * slides[0].stat().st_size))
    info = storage.stat(f"{s3_slides}/{slides[0].name}")
    others = small_disk / "others"
    others.write_bytes(bytes(2 * info.size))
    with pytest.raises(
        NodeError, match=r"patient0\.svs: its copy of .* does not fit the disk of .* free; free some, or set"
    ):
        Staging(folder=str(small_disk)).fetch(info, None)
    # What fills the disk while the copy is under way is told as well.
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**40, 0, 2**40))
        with pytest.raises(NodeError, match="does not fit the disk"):
            Staging(folder=str(small_disk)).fetch(info, None)
    assert not list(small_disk.glob("*/*"))
    others.unlink()
    assert Staging(folder=str(small_disk)).fetch(info, None)
