"""Ranged reads from a server that throttles, breaks off, refuses, or changes what it serves."""

import re
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from streaming.errors import SlideError, StorageError
from streaming.ranges import LocalRanges, RangeFile, RemoteRanges, open_ranges, read_range

CONTENT = bytes(range(256)) * 1000


class Moody(BaseHTTPRequestHandler):
    """Serves CONTENT at every address, after it has had the moods that are on its list."""

    protocol_version = "HTTP/1.1"
    moods: list[str] = []  # noqa: RUF012 one server at a time
    etag = '"first"'
    seen: list[str] = []  # noqa: RUF012

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        Moody.seen.append(self.headers.get("Range", ""))
        mood = Moody.moods.pop(0) if Moody.moods else ""
        if mood == "reset":
            # A close that says reset: unsent data is thrown away.
            self.connection.setsockopt(1, 13, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if mood.isdigit():
            self.send_response(int(mood))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, end = (int(wanted[1]), min(int(wanted[2]) + 1, len(CONTENT))) if wanted else (0, len(CONTENT))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", Moody.etag)
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 12:00:00 GMT")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(CONTENT)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(CONTENT[start : start + (end - start) // 2 if mood == "half" else end])
            if mood == "half":
                self.close_connection = True


@pytest.fixture
def server() -> Iterator[str]:
    Moody.moods, Moody.etag, Moody.seen = [], '"first"', []
    with ThreadingHTTPServer(("127.0.0.1", 0), Moody) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def of_s3(server: str, tag: str | None = None) -> RemoteRanges:
    return RemoteRanges("s3://bucket/a.svs", {"anon": True, "endpoint_url": server, "region": "us-east-1"}, tag)


@pytest.mark.parametrize("moods", [["503"], ["500", "503", "503"], ["429"], ["reset"], ["reset", "503", "reset"]])
def test_throttling_and_resets_are_tried_again(server: str, moods: list[str]) -> None:
    ranges = of_s3(server)
    Moody.moods = list(moods)
    assert read_range(ranges, 1000, 1300) == CONTENT[1000:1300]
    assert Moody.seen.count("bytes=1000-1299") == len(moods) + 1


def test_an_answer_that_breaks_off_is_never_taken_for_the_whole(server: str) -> None:
    ranges = of_s3(server)
    Moody.moods = ["half"]
    assert read_range(ranges, 0, 20_000) == CONTENT[:20_000]
    # Only the rest is asked for again.
    assert Moody.seen[-2:] == ["bytes=0-19999", "bytes=10000-19999"]


@pytest.mark.parametrize(("status", "said"), [("403", "access denied"), ("404", "not found")])
def test_what_can_t_get_better_is_told_at_once(server: str, status: str, said: str) -> None:
    ranges = of_s3(server)
    Moody.seen, Moody.moods = [], [status] * 50
    with pytest.raises(StorageError, match=f"s3://bucket/a.svs: {said}"):
        read_range(ranges, 0, 10)
    assert len(Moody.seen) == 1


def test_another_version_of_the_object_is_refused(server: str) -> None:
    ranges = of_s3(server)
    assert (ranges.size, ranges.tag) == (len(CONTENT), '"first"')
    Moody.etag = '"second"'
    with pytest.raises(SlideError, match=r"a\.svs: changed since it was catalogued.*run `tilestream catalog`"):
        read_range(ranges, 0, 10)
    with pytest.raises(SlideError, match="changed"):
        read_range(of_s3(server, tag='"first"'), 0, 10)


def test_many_ranges_are_under_way_at_once(server: str) -> None:
    answers = [of_s3(server).begin([(at + i, at + i + 100) for i in (0, 100, 200)]) for at in range(0, 20_100, 300)]
    assert b"".join(part for answer in answers for part in answer()) == CONTENT[:20_100]


def test_plain_http_is_read_too_and_what_only_fsspec_knows_is_left_to_it(server: str) -> None:
    ranges = open_ranges(f"{server}/slides/a.svs")
    assert ranges.size == len(CONTENT)
    assert read_range(ranges, 5, 9) == CONTENT[5:9]
    assert open_ranges("memory://a.svs") is None


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
