"""An HTTP proxy before an S3 server that throttles, breaks off, stalls and answers wrong lengths, as it is told."""

from __future__ import annotations

import http.client
import re
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What befalls the n-th ranged read: "503", "429", "reset", "half" (breaks off), "short", "long", "stall", or "".
Mood = Callable[[int], str]


class FaultyProxy(ThreadingHTTPServer):
    """Forwards GET and HEAD to `target`; its `mood` decides what becomes of each ranged read. A context manager."""

    daemon_threads = True

    def __init__(self, target: str, mood: Mood = lambda n: "", stall_s: float = 60) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        parts = urlsplit(target)
        self.target = (parts.hostname or "", parts.port or 80)
        self.mood, self.stall_s = mood, stall_s
        self.count, self.seen = 0, Counter[str]()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def next_mood(self) -> str:
        with self.lock:
            self.count += 1
            mood = self.mood(self.count)
            self.seen[mood] += 1
            return mood

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has given up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        mood = self.server.next_mood() if wanted else ""
        if mood == "stall":
            time.sleep(self.server.stall_s)
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
        headers = dict(self.headers)
        if wanted and mood in ("short", "long"):
            start, end = int(wanted[1]), int(wanted[2])
            headers["Range"] = f"bytes={start}-{end - 7 if mood == 'short' else end + 7}"
        self._forward(headers, half=mood == "half")

    def _forward(self, headers: dict[str, str], *, half: bool) -> None:
        upstream = http.client.HTTPConnection(*self.server.target, timeout=60)
        upstream.request(self.command, self.path, headers=headers)
        answer = upstream.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if half else content)
            self.close_connection = half
        upstream.close()
