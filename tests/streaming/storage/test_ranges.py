"""Ranged reads from a server that throttles, breaks off, refuses, or changes what it serves."""

import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from streaming import storage
from streaming.counters import Counters
from streaming.errors import SlideError, StorageError
from streaming.storage.connections import Connections
from streaming.storage.download import download
from streaming.storage.joined_ranges import JoinedRanges
from streaming.storage.range_file import RangeFile
from streaming.storage.ranges import LocalRanges, RemoteRanges, open_ranges, read_range
from tests.faulty_server import FaultyServer, in_turn
from tests.processes import wait_for

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(CONTENT) as running:
        yield running


def options_of(server: FaultyServer) -> dict[str, object]:
    return {"anon": True, "endpoint_url": server.url, "region": "us-east-1"}


def of_s3(server: FaultyServer, tag: str | None = None) -> RemoteRanges:
    return RemoteRanges("s3://bucket/a.svs", options_of(server), tag)


@pytest.mark.parametrize("moods", [["503"], ["500", "503", "503"], ["429"], ["reset"], ["reset", "503", "reset"]])
def test_throttling_and_resets_are_tried_again(server: FaultyServer, moods: list[str]) -> None:
    ranges = of_s3(server)
    server.mood = in_turn(moods)
    assert read_range(ranges, 1000, 1300) == CONTENT[1000:1300]
    assert server.asked.count("bytes=1000-1299") == len(moods) + 1


def test_an_answer_that_breaks_off_is_never_taken_for_the_whole(server: FaultyServer) -> None:
    ranges = of_s3(server)
    server.mood = in_turn(["half"])
    assert read_range(ranges, 0, 20_000) == CONTENT[:20_000]
    assert server.asked == ["HEAD", "bytes=0-19999", "bytes=0-19999"]


@pytest.mark.parametrize("mood", ["short", "long"])
def test_an_answer_to_another_range_is_asked_for_again(server: FaultyServer, mood: str) -> None:
    ranges = of_s3(server)
    server.mood = in_turn([mood, mood])
    assert read_range(ranges, 0, 20_000) == CONTENT[:20_000]
    # Each time it is made sure that the object is still the one that was opened.
    assert server.asked == ["HEAD", *["bytes=0-19999", "HEAD"] * 2, "bytes=0-19999"]


@pytest.mark.parametrize(
    ("status", "said"), [("403", "access denied"), ("404", "not found"), ("400", "400 Bad Request")]
)
def test_what_can_t_get_better_is_told_at_once(server: FaultyServer, status: str, said: str) -> None:
    ranges = of_s3(server)
    server.mood = lambda n: status
    with pytest.raises(StorageError, match=f"s3://bucket/a.svs: .*{said}"):
        read_range(ranges, 0, 10)
    assert len(server.asked) == 2


def test_another_version_of_the_object_is_refused(server: FaultyServer) -> None:
    ranges = of_s3(server)
    assert (ranges.size, ranges.tag) == (len(CONTENT), "first")
    server.etag = '"second"'
    with pytest.raises(SlideError, match=r"a\.svs: changed since it was catalogued.*run `tilestream catalog`"):
        read_range(ranges, 0, 10)
    with pytest.raises(SlideError, match="changed"):
        read_range(of_s3(server, tag='"first"'), 0, 10)


@pytest.mark.parametrize("mood", ["short", "416"])
def test_an_object_that_became_shorter_is_told_as_another_version(server: FaultyServer, mood: str) -> None:
    ranges = of_s3(server)
    server.etag, server.mood = '"second"', lambda n: mood
    with pytest.raises(SlideError, match="changed since it was catalogued"):
        read_range(ranges, 0, 10)


def test_many_ranges_are_under_way_at_once(server: FaultyServer) -> None:
    answers = [of_s3(server).begin([(at + i, at + i + 100) for i in (0, 100, 200)]) for at in range(0, 20_100, 300)]
    assert b"".join(part for answer in answers for part in answer.wait()) == CONTENT[:20_100]


def test_all_ranges_of_a_tile_are_under_way_at_once(server: FaultyServer) -> None:
    together, ranges = threading.Barrier(3), of_s3(server)

    def wait_for_the_others(number: int) -> str:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(20)
        return ""

    server.mood = wait_for_the_others
    spans = [(0, 100), (200, 300), (400, 500)]
    assert ranges.begin(spans).wait() == [CONTENT[start:end] for start, end in spans]
    assert not together.broken


def test_who_asks_is_called_when_all_has_come_and_keeps_nothing_of_it(server: FaultyServer) -> None:
    ranges, first, called = of_s3(server), threading.Event(), threading.Event()
    server.mood = lambda number: "" if number > 1 or first.wait(60) else "late"
    pending = ranges.begin([(0, 100), (200, 300)])
    pending.when_ready(called.set)
    assert not called.is_set()
    first.set()
    assert called.wait(60)
    assert [len(content) for content in pending.wait()] == [100, 100]
    answers = [weakref.ref(answer) for answer in pending.answers]
    gc.disable()  # or it would find what refers to itself in a circle
    try:
        del pending
        wait_for(lambda: not any(answer() for answer in answers), timeout_s=20)
    finally:
        gc.enable()


def test_what_is_urgent_goes_before_what_waits_for_a_thread() -> None:
    connections, order, may_go = Connections(in_flight=1), list[str](), threading.Event()
    answers = [connections.submit("s3://b/a", may_go.wait, 60)]
    answers += [connections.submit("s3://b/a", order.append, name) for name in ("first", "second")]
    with connections.urgently():
        answers.append(connections.submit("s3://b/a", order.append, "urgent"))
    answers.append(connections.submit("s3://b/a", order.append, "third"))
    may_go.set()
    for answer in answers:
        answer.result(60)
    assert order == ["urgent", "first", "second", "third"]


def test_plain_http_is_read_too_and_what_only_fsspec_knows_is_left_to_it(server: FaultyServer) -> None:
    ranges = open_ranges(f"{server.url}/slides/a.svs")
    assert ranges.size == len(CONTENT)
    assert read_range(ranges, 5, 9) == CONTENT[5:9]
    assert open_ranges("memory://a.svs") is None


def test_of_a_local_file_all_that_is_wanted_is_fetched_before_the_first_of_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "content", list[tuple[str, int]]()
    path.write_bytes(CONTENT)
    advise, read = os.posix_fadvise, os.pread

    def advised(file: int, start: int, length: int, advice: int) -> None:
        done.append((f"fetch {length}" if advice == os.POSIX_FADV_WILLNEED else "?", start))
        advise(file, start, length, advice)

    def was_read(file: int, length: int, start: int) -> bytes:
        done.append((f"read {length}", start))
        return read(file, length, start)

    monkeypatch.setattr(os, "posix_fadvise", advised)
    monkeypatch.setattr(os, "pread", was_read)
    spans = [(0, 100), (500, 700)]
    pending = LocalRanges(str(path)).begin(spans)
    assert pending.wait() == [CONTENT[start:end] for start, end in spans]
    assert done == [("fetch 100", 0), ("fetch 200", 500), ("read 100", 0), ("read 200", 500)]


def test_a_file_over_ranges_reads_as_a_file_does(tmp_path: Path) -> None:
    path = tmp_path / "content"
    path.write_bytes(CONTENT * 5)
    ranges = LocalRanges(str(path))
    mine = RangeFile(ranges)
    with path.open("rb") as theirs:
        for offset, whence, size in (
            (0, 0, 8),
            (65_530, 0, 12),
            (-7, 2, 50),
            (3, 0, 900_000),
            (-10, 1, 20),
            (0, 0, -1),
        ):
            assert mine.seek(offset, whence) == theirs.seek(offset, whence)
            assert mine.read(size) == theirs.read(size)
            assert mine.tell() == theirs.tell()
    with pytest.raises(SlideError, match="ends after 0 of the 10 bytes"):
        read_range(ranges, len(CONTENT) * 5, len(CONTENT) * 5 + 10)


def test_pages_that_follow_each_other_are_one_request_and_kept(tmp_path: Path) -> None:
    path, count = tmp_path / "content", Counters()
    path.write_bytes(CONTENT * 5)
    file = RangeFile(LocalRanges(str(path)), count, page_nbytes=1000)
    file.fetch(2500, 6500)
    assert (count.requests, count.nbytes) == (1, 5000)
    for at, size in ((2500, 4000), (6000, 10), (3000, 1)):
        file.seek(at)
        assert file.read(size) == (CONTENT * 5)[at : at + size]
    assert count.requests == 1
    file.seek(1500)
    assert file.read(8000) == (CONTENT * 5)[1500:9500]
    assert (count.requests, count.nbytes) == (3, 9000)  # what lies in front of them, and what lies behind


def test_an_object_whose_size_is_known_is_not_asked_for_it_and_its_first_answer_tells_its_version(
    server: FaultyServer,
) -> None:
    options = {"anon": True, "endpoint_url": server.url, "region": "us-east-1"}
    ranges = open_ranges("s3://bucket/a.svs", options, size=len(CONTENT))
    assert not server.asked
    assert read_range(ranges, 5, 9) == CONTENT[5:9]
    assert (ranges.size, ranges.tag, len(server.asked)) == (len(CONTENT), "first", 1)
    server.etag = '"second"'
    with pytest.raises(SlideError, match=r"a\.svs: changed since it was catalogued"):
        read_range(ranges, 5, 9)


def test_several_objects_are_read_as_one(tmp_path: Path) -> None:
    sizes, opened = [100, 5, 3000], list[str]()
    for number, size in enumerate(sizes):
        (tmp_path / str(number)).write_bytes(bytes([number + 1]) * size)

    def opener(number: int) -> LocalRanges:
        opened.append(str(number))
        return LocalRanges(str(tmp_path / str(number)))

    joined = JoinedRanges(sizes, [partial(opener, number) for number in range(3)])
    assert joined.size == 3105
    assert joined.begin([(104, 105)]).wait() == [b"\2"]
    assert opened == ["1"]
    called = threading.Event()
    pending = joined.begin([(3100, 3105), (0, 2), (105, 106), (99, 100), (100, 103)])
    pending.when_ready(called.set)
    assert pending.wait() == [b"\3" * 5, b"\1" * 2, b"\3", b"\1", b"\2" * 3]
    assert called.is_set()
    assert joined.begin([]).wait() == []
    assert joined.locate(103) == (str(tmp_path / "1"), 3)


@pytest.mark.parametrize("moods", [[], ["half", "503", "reset", "", "short", "429"]])
def test_a_download_is_the_object_whatever_befalls_its_parts(
    server: FaultyServer, moods: list[str], tmp_path: Path
) -> None:
    server.source = np.random.default_rng(0).bytes(20 * 2**20 + 7)
    info = storage.stat("s3://bucket/a.svs", options_of(server))
    server.mood = in_turn(moods)
    counted = Counters()
    download(info, str(tmp_path / "copy"), options_of(server), counted)
    assert (tmp_path / "copy").read_bytes() == server.source
    assert (counted.requests, counted.nbytes, counted.retries) == (11, info.size, server.num_faults)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_download_that_can_t_be_whole_leaves_nothing(server: FaultyServer, tmp_path: Path) -> None:
    path, options = str(tmp_path / "copy"), options_of(server)
    info = storage.stat("s3://bucket/a.svs", options)
    with pytest.raises(StorageError, match="has 256,000 of 256,001 bytes"):
        download(replace(info, size=info.size + 1), path, options)

    def change(n: int) -> str:
        server.etag = '"second"'
        return ""

    server.mood = change
    with pytest.raises(SlideError, match="changed since"):
        download(info, path, options)
    server.mood = lambda n: "403"
    with pytest.raises(StorageError, match="access denied"):
        download(info, path, options)
    assert not list(tmp_path.iterdir())
