"""A server of slides that throttles, breaks off, stalls and answers other ranges than were asked for, as it is told."""

from __future__ import annotations

import http.client
import re
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from urllib.parse import urlsplit

# What befalls the n-th request: a status ("503", "429"), with content where a colon follows ("400:ExpiredToken"),
# "reset", "half" (breaks off), "short" and "long" (a range of another length), "stall", "slow" (comes bit by bit),
# "elsewhere" (a bucket of us-east-1), "redirect" (to the source, or `redirects_to`), or "".
Mood = Callable[[int], str]

_DATE = "Tue, 24 Nov 2026 12:00:00 GMT"


def in_turn(moods: Sequence[str]) -> Mood:
    """These first, then none."""
    return lambda n: moods[n - 1] if n <= len(moods) else ""


def down(mood: str, seconds: float) -> Mood:
    """All requests from the next one on, for a time."""
    first = cache(time.monotonic)
    return lambda n: mood if time.monotonic() - first() < seconds else ""


class FaultyServer(ThreadingHTTPServer):
    """Answers as the S3 server at an address does, or with the same bytes at every address.

    Its `mood` decides what becomes of each ranged read, or of each request if it befalls them all. A context manager.
    """

    daemon_threads = True

    def __init__(
        self,
        source: str | bytes,
        mood: Mood = lambda n: "",
        *,
        stall_s: float = 60,
        befalls_all: bool = False,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme = "https" if tls is not None else "http"
        self.source, self.mood, self.stall_s, self.befalls_all = source, mood, stall_s, befalls_all
        self.redirects_to = source
        self.etag = '"first"'
        self.asked = list[str]()
        """methods, and ranges where there are"""
        self.headers = list[Mapping[str, str]]()
        """of each request, names in small letters"""
        self.count = self.num_faults = self.num_broken_off = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def next_mood(self) -> str:
        with self._lock:
            self.count += 1
            number = self.count
        # A mood may hold one request up until it has seen another one.
        mood = self.mood(number)
        with self._lock:
            self.num_faults += bool(mood)
        return mood

    def answer(
        self, command: str, path: str, headers: Mapping[str, str], content: bytes
    ) -> tuple[int, Mapping[str, str], bytes]:
        """What the source says: status, headers, content."""
        if isinstance(self.source, bytes):
            return self._of_bytes(self.source, headers.get("Range"))
        parts = urlsplit(self.source)
        upstream = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=60)
        # What a server is called may decide what it answers.
        own = {name: value for name, value in headers.items() if name.lower() != "host"}
        upstream.request(command, path, content or None, own)
        answer = upstream.getresponse()
        hop = ("connection", "transfer-encoding", "server", "date")
        found = answer.status, {name: value for name, value in answer.getheaders() if name.lower() not in hop}
        content = answer.read()
        upstream.close()
        if not any(name.lower() == "content-length" for name in found[1]):
            found[1]["Content-Length"] = str(len(content))  # it came in chunks
        return *found, content

    def _of_bytes(self, content: bytes, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
        headers = {"ETag": self.etag, "Last-Modified": _DATE}
        if wanted is None:
            return 200, {**headers, "Content-Length": str(len(content))}, content
        start, end = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        if start >= len(content):
            return 416, {"Content-Length": "0"}, b""
        part = content[start : end + 1]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        return 206, {**headers, "Content-Length": str(len(part))}, part

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has given up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.server.asked.append(wanted[0] if wanted else self.command)
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        mood = self.server.next_mood() if wanted or self.server.befalls_all else ""
        if mood == "stall":
            time.sleep(self.server.stall_s)
        if mood == "reset":
            # A close that says reset: unsent data is thrown away.
            self.connection.setsockopt(1, 13, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if mood[:3].isdigit():
            self._refuse(int(mood[:3]), mood[4:].encode())
            return
        if mood == "elsewhere":
            self._refuse(301, b"", {"x-amz-bucket-region": "us-east-1"})
            return
        if mood == "redirect":
            self._refuse(307, b"", {"Location": f"{self.server.redirects_to}{self.path}"})
            return
        # Clients write it in capitals or not.
        headers = {name: value for name, value in self.headers.items() if name.lower() != "range"}
        if wanted:
            headers["Range"] = f"bytes={wanted[1]}-{int(wanted[2]) + {'short': -7, 'long': 7}.get(mood, 0)}"
        status, headers, content = self.server.answer(self.command, self.path, headers, content)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.close_connection = mood == "half"
            if mood == "slow":
                self._send_slowly(content)
            else:
                self.wfile.write(content[: len(content) // 2] if mood == "half" else content)

    def _refuse(self, status: int, content: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_slowly(self, content: bytes) -> None:
        """In two seconds and a bit, never silent for half of one."""
        piece = -(-len(content) // 8) or 1
        try:
            for start in range(0, len(content), piece):
                time.sleep(0.3)
                self.wfile.write(content[start : start + piece])
                self.wfile.flush()
        except OSError:
            # What a write is answered with, beside its status, clients may not wait for.
            self.server.num_broken_off += self.command == "GET"
            raise

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET
