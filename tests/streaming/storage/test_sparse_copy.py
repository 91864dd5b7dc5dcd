"""Remote files as one local file that fills up part by part."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streaming import storage
from streaming.counters import Counters
from streaming.errors import CatalogError, StorageError
from streaming.storage.node_cache import cache_at
from streaming.storage.sparse_copy import PART_NBYTES, RemoteFile, SparseCopy
from streaming.storage.staging import Staging

SIZES = (3 * PART_NBYTES + 17, 1, PART_NBYTES // 2, 5 * PART_NBYTES)
CONTENTS = [np.random.default_rng(i).bytes(size) for i, size in enumerate(SIZES)]
WHOLE = b"".join(CONTENTS)


@pytest.fixture(scope="module")
def files(s3_bucket: str) -> list[RemoteFile]:
    uris = [f"{s3_bucket}/sparse/{i}" for i in range(len(SIZES))]
    for uri, content in zip(uris, CONTENTS, strict=True):
        storage.write_bytes(uri, content)
    return [RemoteFile(uri, size) for uri, size in zip(uris, SIZES, strict=True)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spans=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 3 * PART_NBYTES)).map(
            lambda at: (at[0], min(sum(at), len(WHOLE)))
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_span_is_what_the_files_hold_and_parts_come_once(
    spans: list[tuple[int, int]], files: list[RemoteFile], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sparse")
    copy, count = SparseCopy(files, None, Staging(folder=str(folder))), Counters()
    copy.fetch(spans, count)
    parts = {part for start, end in spans for part in range(start // PART_NBYTES, -(-end // PART_NBYTES))}
    nbytes = sum(min((part + 1) * PART_NBYTES, len(WHOLE)) - part * PART_NBYTES for part in parts)
    assert count.nbytes == count.index_nbytes == nbytes
    assert cache_at(str(folder)).num_bytes() == nbytes
    for start, end in spans:
        assert copy.read(start, end, count) == WHOLE[start:end]
    another = SparseCopy(files, None, Staging(folder=str(folder)))
    assert another.read(*spans[0], count) == WHOLE[slice(*spans[0])]
    assert count.nbytes == nbytes


def test_threads_that_want_the_same_at_once_fetch_it_once(files: list[RemoteFile], tmp_path: Path) -> None:
    copy, counts = SparseCopy(files, None, Staging(folder=str(tmp_path))), [Counters() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda count: copy.read(0, len(WHOLE), count), counts))
    assert found == [WHOLE] * 8
    assert sum(count.nbytes for count in counts) == len(WHOLE)


READ = """
import os, signal, sys
from streaming.storage.sparse_copy import RemoteFile, SparseCopy
from streaming.storage.staging import Staging
uri, size, folder, die = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "die"
copy = SparseCopy([RemoteFile(uri, size)], None, Staging(folder=folder))
if die:
    os.pwrite(copy.file, b"wrong", 0)  # a part that was being written
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdout.buffer.write(copy.read(0, size))
"""


def test_what_a_killed_process_was_writing_is_fetched_anew(files: list[RemoteFile], tmp_path: Path) -> None:
    file = files[0]
    command = [sys.executable, "-c", READ, file.uri, str(file.nbytes), str(tmp_path)]
    assert subprocess.run([*command, "die"], timeout=60).returncode == -signal.SIGKILL
    assert subprocess.run([*command, "live"], timeout=60, stdout=subprocess.PIPE).stdout == CONTENTS[0]


def test_what_an_earlier_start_of_the_machine_left_is_fetched_anew(files: list[RemoteFile], tmp_path: Path) -> None:
    SparseCopy(files, None, Staging(folder=str(tmp_path))).read(0, 10)
    ((data, here),) = [sorted(entry.iterdir()) for entry in tmp_path.iterdir() if entry.is_dir()]
    data.write_bytes(bytes(len(WHOLE)))  # a crash kept the note, and lost the content
    os.rename(here, here.with_name("here-another0"))
    assert SparseCopy(files, None, Staging(folder=str(tmp_path))).read(0, 10) == WHOLE[:10]


def test_a_copy_in_use_stays_and_slides_make_room_for_it(files: list[RemoteFile], tmp_path: Path) -> None:
    cache, most = cache_at(str(tmp_path)), 4 * PART_NBYTES
    copy = SparseCopy(files, None, Staging(folder=str(tmp_path), max_bytes=most))
    assert not cache.take("a" * 32, "a", 3 * PART_NBYTES, most, "a")
    cache.filled("a" * 32)
    cache.let_go("a" * 32)
    copy.fetch([(0, 2 * PART_NBYTES)])
    assert cache.num_bytes() == 2 * PART_NBYTES  # the slide went
    with pytest.raises(StorageError, match="raise staging_gb"):
        cache.take("b" * 32, "b", 3 * PART_NBYTES, most, "b")
    with pytest.raises(StorageError, match="raise staging_gb"):
        copy.fetch([(2 * PART_NBYTES, 6 * PART_NBYTES)])
    assert copy.read(5, 2 * PART_NBYTES) == WHOLE[5 : 2 * PART_NBYTES]


def test_a_file_that_is_gone_or_another_is_told(s3_bucket: str, tmp_path: Path) -> None:
    staging = Staging(folder=str(tmp_path))
    with pytest.raises(StorageError, match="gone: not found"):
        SparseCopy([RemoteFile(f"{s3_bucket}/sparse/gone", 10)], None, staging).read(0, 10)
    with pytest.raises(CatalogError, match="changed since it was catalogued"):
        SparseCopy([RemoteFile(f"{s3_bucket}/sparse/0", 10)], None, staging).read(0, 10)
    assert cache_at(str(tmp_path)).num_bytes() == 0


def test_a_storage_that_only_fsspec_knows_serves_parts_too(tmp_path: Path) -> None:
    storage.write_bytes("memory://sparse/a", WHOLE)
    copy = SparseCopy([RemoteFile("memory://sparse/a", len(WHOLE))], None, Staging(folder=str(tmp_path)))
    assert copy.read(PART_NBYTES - 5, PART_NBYTES + 5) == WHOLE[PART_NBYTES - 5 : PART_NBYTES + 5]
