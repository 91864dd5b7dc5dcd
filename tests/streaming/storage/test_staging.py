"""The cache of staged copies, shared by all processes of a node."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from streaming import storage
from streaming.errors import NodeError, StorageError
from streaming.storage import node_cache
from streaming.storage.node_cache import NodeCache, cache_at, disk_usage, is_shared_disk
from streaming.storage.staging import Staging
from tests.faulty_server import FaultyServer

FETCH = """
import sys
from streaming import storage
from streaming.storage.staging import Staging
sys.stdin.readline()
print(Staging(folder=sys.argv[1]).fetch(storage.stat(sys.argv[2]), None))
"""
# Reserves room for a copy, and writes half of it.
HALF = """
import sys, time
from pathlib import Path
from streaming.storage.node_cache import cache_at
cache = cache_at(sys.argv[1])
assert not cache.take("a" * 32, "slide.svs", 1000, 1500, "slide.svs")
entry = Path(sys.argv[1], "a" * 32)
entry.mkdir()
(entry / "slide.svs").write_bytes(b"half")
print("reserved", flush=True)
time.sleep(100)
"""


@contextlib.contextmanager
def started(script: str, *arguments: str, **more: Any) -> Iterator[subprocess.Popen]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], **pipes, **more)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def copies(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(path.parents[0])) for path in folder.glob("*/*"))


def test_processes_that_want_one_slide_at_once_download_it_once(
    s3_slides: str, slides: list[Path], tmp_path: Path
) -> None:
    uri = f"{s3_slides}/{slides[0].name}"
    with contextlib.ExitStack() as running:
        processes = [running.enter_context(started(FETCH, str(tmp_path), uri)) for _ in range(3)]
        paths = {process.communicate("go\n", timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (path,) = paths
    assert Path(path).read_bytes() == slides[0].read_bytes()
    assert copies(tmp_path) == [slides[0].name]


def test_sixteen_openers_of_one_reader_never_hold_more_than_the_bound(tmp_path: Path) -> None:
    size, most, ended = 2**16, 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.is_set():
            most = max(most, sum(disk_usage(entry) for entry in tmp_path.iterdir() if entry.is_dir()))

    with FaultyServer(bytes(size)) as server:
        staging = Staging(folder=str(tmp_path), max_bytes=3 * size)
        infos = [
            storage.ObjectInfo(f"{server.url}/{i}.ndpi", size, storage.stat(f"{server.url}/x").version)
            for i in range(16)
        ]
        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(16) as pool:
            sizes = list(pool.map(lambda info: staging.use(info, None, os.path.getsize), infos))
        ended.set()
        watcher.join()
    assert sizes == [size] * 16
    assert 0 < most <= 3 * size
    assert len(copies(tmp_path)) == 3
    assert cache_at(str(tmp_path)).num_bytes() == 3 * size


def test_a_copy_that_is_being_opened_is_not_evicted(tmp_path: Path) -> None:
    with FaultyServer(bytes(1000)) as server:
        info = storage.stat(f"{server.url}/a.ndpi")
        other = storage.ObjectInfo(f"{server.url}/b.ndpi", info.size, info.version)
        staging = Staging(folder=str(tmp_path), max_bytes=1500)
        with ThreadPoolExecutor(1) as pool:
            with staging.holding(info, None) as path:
                waiting = pool.submit(staging.fetch, other, None)
                time.sleep(0.2)
                assert os.path.exists(path)
                assert not waiting.done()
            assert Path(waiting.result(timeout=20)).exists()
        assert copies(tmp_path) == ["b.ndpi"]


def test_what_a_killed_process_reserved_and_wrote_is_let_go_of_at_once(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path))
    with started(HALF, str(tmp_path)) as process:
        assert process.stdout.readline() == "reserved\n"
        assert cache.num_bytes() == 1000
        with pytest.raises(StorageError, match="raise staging_gb"):
            cache.grow("c" * 32, 1501, 1500, "c")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not cache.take("b" * 32, "b.svs", 1000, 1500, "b")
    assert cache.num_bytes() == 1000
    assert not (tmp_path / ("a" * 32)).exists()
    # The same slide, too, is not waited for.
    cache.dropped("b" * 32)
    assert not cache.take("a" * 32, "slide.svs", 1000, 1500, "a")


def test_who_waits_for_a_copy_takes_over_when_the_one_that_fetches_it_dies(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path))
    with started(HALF, str(tmp_path)) as process, ThreadPoolExecutor(1) as pool:
        assert process.stdout.readline() == "reserved\n"
        waiting = pool.submit(cache.take, "a" * 32, "slide.svs", 1000, 1500, "a")
        time.sleep(0.2)
        assert not waiting.done()
        process.kill()
        assert waiting.result(timeout=20) is False
    assert not (tmp_path / ("a" * 32)).exists()


def test_a_miss_looks_at_no_other_copy_and_leaves_no_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = NodeCache(str(tmp_path))
    for number in range(50):
        assert not cache.take(f"{number:032x}", "a", 10, 10**6, "a")
        (tmp_path / f"{number:032x}").mkdir()
        cache.filled(f"{number:032x}")
        cache.let_go(f"{number:032x}")
    walked = list[str]()
    for name in ("scandir", "listdir", "walk"):
        monkeypatch.setattr(os, name, lambda path, *_: walked.append(str(path)) or iter(()))
    assert not cache.take("f" * 32, "a", 10, 10**6, "a")
    assert not walked
    monkeypatch.undo()
    assert {entry.name for entry in tmp_path.iterdir() if entry.is_file()} <= {
        *("alive", "index.db", "index.db-wal", "index.db-shm")
    }


# At each line, a process more that makes copies of some keys as fast as it can.
MANY = """
import os, random, sys
from pathlib import Path
from streaming.storage.node_cache import cache_at
for _ in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    cache = cache_at(sys.argv[1])
    while True:
        key = random.choice("0123456789") * 32
        if not cache.take(key, "a", 1000, 4000, "a"):
            if random.random() < 0.1:
                cache.dropped(key)
                continue
            Path(sys.argv[1], key).mkdir()
            Path(sys.argv[1], key, "a").write_bytes(bytes(1000))
            cache.filled(key)
        assert Path(sys.argv[1], key, "a").stat().st_size == 1000
        cache.let_go(key)
"""


def test_processes_that_are_killed_at_any_moment_leave_a_cache_that_is_counted_right(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path))
    with started(MANY, str(tmp_path)) as process:
        for kill_after_s in (0.03, 0.1, 0.2, 0.05):
            children = list[int]()
            for _ in range(3):
                process.stdin.write("another\n")
                process.stdin.flush()
                children.append(int(process.stdout.readline()))
            for child in children:
                time.sleep(kill_after_s)
                assert Path(f"/proc/{child}/stat").read_text().split()[2] != "Z"
                assert cache.num_bytes() <= 4000
                os.kill(child, signal.SIGKILL)
    # Each key can be had, and what is on disk is what is counted.
    for digit in "0123456789":
        if not cache.take(digit * 32, "a", 1000, 4000, "a"):
            (tmp_path / (digit * 32)).mkdir()
            (tmp_path / (digit * 32) / "a").write_bytes(bytes(1000))
            cache.filled(digit * 32)
        cache.let_go(digit * 32)
    assert copies(tmp_path) == ["a"] * 4
    assert cache.num_bytes() == 4000
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 4


def test_a_damaged_database_is_told_with_the_folder_to_remove(tmp_path: Path) -> None:
    (tmp_path / "index.db").write_bytes(b"no database" * 1000)
    with pytest.raises(NodeError, match=r"the database of this cache is damaged \(.*\); remove it"):
        NodeCache(str(tmp_path)).num_bytes()


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
    assert cache_at(str(tmp_path)).num_bytes() == 0


def test_a_cache_that_somebody_removes_fills_anew(s3_slides: str, slides: list[Path], tmp_path: Path) -> None:
    folder, info = tmp_path / "cache", storage.stat(f"{s3_slides}/{slides[0].name}")
    staging = Staging(folder=str(folder))
    path = staging.fetch(info, None)
    os.remove(path)
    assert Path(staging.fetch(info, None)).exists()
    (folder / "index.db").unlink()
    assert Path(staging.fetch(info, None)).exists()
    shutil.rmtree(folder)
    assert Path(staging.fetch(info, None)).read_bytes() == slides[0].read_bytes()


@pytest.mark.parametrize("name", ["..", "x/../../../evil.dcm", "/etc/evil", "a//b", "."])
def test_no_listing_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    info = storage.ObjectInfo("memory://dir/a.mrxs", 7, "v")
    files = [info, storage.ObjectInfo(f"memory://dir/{name}", 7, "v")]
    storage.write_bytes("memory://dir/a.mrxs", b"7 bytes")
    with pytest.raises(StorageError, match=r"leads out of the folder|is a folder"):
        Staging(folder=str(tmp_path / "cache")).fetch(info, None, files)
    with pytest.raises(StorageError, match="leads out of the folder"):
        Staging(folder=str(tmp_path / "cache")).fetch(storage.ObjectInfo("memory://dir/..", 7, "v"), None)
    assert not list((tmp_path / "cache").glob("*/*"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]


def test_the_machine_that_reads_decides_where_copies_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    staging = Staging()  # made by the driver, say
    monkeypatch.setenv("TILESTREAM_STAGING", str(tmp_path / "scratch"))
    assert staging.path == str(tmp_path / "scratch")
    monkeypatch.delenv("TILESTREAM_STAGING")
    assert staging.path.endswith(f"tilestream-staging-{os.geteuid()}")
    assert Staging(folder="/given").path == "/given"


def test_copies_are_their_users_alone(s3_slides: str, slides: list[Path], tmp_path: Path) -> None:
    info, folder = storage.stat(f"{s3_slides}/{slides[0].name}"), tmp_path / "own"
    path = Path(Staging(folder=str(folder)).fetch(info, None))
    assert [place.stat().st_mode & 0o077 for place in (folder, path.parent, folder / "index.db")] == [0, 0, 0]
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(NodeError, match=r"shared: others may write into it .* chmod 700 it, or set data\.staging"):
        Staging(folder=str(shared)).fetch(info, None)
    if os.geteuid() == 0:
        shared.chmod(0o700)
        os.chown(shared, 65534, 65534)
        with pytest.raises(NodeError, match="is of another user"):
            Staging(folder=str(shared)).fetch(info, None)


def test_a_disk_smaller_than_the_cache_may_become_makes_room_by_the_oldest_copies(
    s3_slides: str, slides: list[Path], make_disk: Callable[[int], Path]
) -> None:
    small_disk = make_disk(int(2.5 * max(path.stat().st_size for path in slides)) + 2**18) / "cache"
    staging = Staging(folder=str(small_disk))
    for path in slides:
        assert Path(staging.fetch(storage.stat(f"{s3_slides}/{path.name}"), None)).read_bytes() == path.read_bytes()
    assert copies(small_disk) == sorted(path.name for path in slides[1:])


def test_a_full_disk_costs_the_slide_and_leaves_no_part(
    s3_slides: str, slides: list[Path], make_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk(int(2.5 * slides[0].stat().st_size) + 2**18)
    small_disk, info = disk / "cache", storage.stat(f"{s3_slides}/{slides[0].name}")
    others = disk / "others"
    others.write_bytes(bytes(2 * info.size))
    with pytest.raises(
        StorageError, match=r"patient0\.svs: its copy of .* does not fit the disk of .* free; free some, or set"
    ):
        Staging(folder=str(small_disk)).fetch(info, None)
    # What fills the disk while the copy is under way is told as well.
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**40, 0, 2**40))
        with pytest.raises(StorageError, match="does not fit the disk"):
            Staging(folder=str(small_disk)).fetch(info, None)
    assert not list(small_disk.glob("*/*"))
    others.unlink()
    assert Staging(folder=str(small_disk)).fetch(info, None)


def test_a_disk_without_room_for_names_costs_the_slide(make_disk: Callable[[int], Path], tmp_path: Path) -> None:
    disk, infos = make_disk(2**22), [storage.ObjectInfo("memory://inodes/a.svs", 7, f"v{i}") for i in range(2)]
    storage.write_bytes(infos[0].uri, b"7 bytes")
    subprocess.run(["mount", "-o", "remount,nr_inodes=8", disk], check=True)
    staging = Staging(folder=str(disk / "cache"))
    assert Path(staging.fetch(infos[0], None)).read_bytes() == b"7 bytes"
    with pytest.raises(StorageError, match=r"a\.svs: its copy of 7 bytes does not fit .* no inodes free"):
        staging.fetch(infos[1], None)
    assert Path(staging.fetch(infos[0], None)).exists()


def test_a_folder_that_can_t_be_written_is_told_with_the_remedy(make_disk: Callable[[int], Path]) -> None:
    disk = make_disk(2**22)
    (disk / "odd" / "alive").mkdir(parents=True)
    (disk / "file").touch()
    (disk / "empty").mkdir()
    for name in ("odd", "file"):
        with pytest.raises(NodeError, match=rf"{name}.* set data\.staging or TILESTREAM_STAGING"):
            cache_at(str(disk / name)).num_bytes()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name in ("empty", "new"):
        with pytest.raises(NodeError, match=rf"{name}.*Read-only file system.* set data\.staging"):
            cache_at(str(disk / name)).num_bytes()


def test_a_cache_that_is_removed_while_a_copy_comes_is_made_anew(tmp_path: Path) -> None:
    content = bytes(2**16)
    with FaultyServer(content) as server:
        info = storage.stat(f"{server.url}/a.ndpi")
        # Between the answer that there is room and the first byte.
        first = iter([tmp_path / "cache"])
        server.mood = lambda n: "".join(str(shutil.rmtree(folder) or "") for folder in first)
        path = Staging(folder=str(tmp_path / "cache")).use(info, None, lambda path: path)
    assert Path(path).read_bytes() == content


NO_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
static int answer(const char *name, int fd, int command, void *argument) {
    if (command == F_SETLK || command == F_SETLKW || command == F_GETLK) { errno = ENOLCK; return -1; }
    int (*real)(int, int, ...) = dlsym(RTLD_NEXT, name);
    return real(fd, command, argument);
}
int fcntl(int fd, int command, ...) {
    va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list);
    return answer("fcntl", fd, command, argument);
}
int fcntl64(int fd, int command, ...) {
    va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list);
    return answer("fcntl64", fd, command, argument);
}
"""


def test_a_disk_whose_files_can_t_be_locked_is_told(tmp_path: Path) -> None:
    """As NFS without a lock daemon answers."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    (tmp_path / "locks.c").write_text(NO_LOCKS)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "locks.so", tmp_path / "locks.c", "-ldl"], check=True)
    script = f"from streaming.storage.node_cache import cache_at; cache_at({str(tmp_path / 'cache')!r}).num_bytes()"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_PRELOAD": str(tmp_path / "locks.so")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    last = found.stderr.splitlines()[-1]
    assert "NodeError" in last
    assert "lock" in last
    assert "set data.staging or TILESTREAM_STAGING" in last


def test_machines_that_share_a_disk_have_a_folder_each(
    s3_slides: str, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_shared_disk(str(tmp_path))
    monkeypatch.setattr(node_cache, "is_shared_disk", lambda folder: True)
    cache = NodeCache(str(tmp_path))
    assert cache.folder == tmp_path / os.uname().nodename
    assert not cache.take("a" * 32, "a", 10, 100, "a")
    assert not list(tmp_path.glob("*/index.db-wal"))  # its memory is one machine's
