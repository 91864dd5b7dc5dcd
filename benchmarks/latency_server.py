"""An S3-like endpoint on this machine that answers each request some milliseconds late and counts what it sends.

Debian's nginx with its Lua module where both are installed (`apt-get install nginx libnginx-mod-http-lua`), else a
small server on asyncio, which costs more of the machine that it shares with what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MODULES = Path("/usr/lib/nginx/modules")
_CONFIG = """
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
daemon off;
worker_processes 1;
error_log {work}/error.log;
pid {work}/pid;
events {{ worker_connections 1024; }}
http {{
  log_format sent '$status $body_bytes_sent';
  access_log {work}/access.log sent buffer=32k flush=100ms;
  open_file_cache max=1000;
  sendfile on;
  client_body_temp_path {work}; proxy_temp_path {work}; fastcgi_temp_path {work};
  uwsgi_temp_path {work}; scgi_temp_path {work};
  keepalive_requests 100000000;
  server {{
    listen 127.0.0.1:{port};
    root {folder};
    location / {{
      access_by_lua_block {{
        ngx.sleep({latency_s})
        local prefix = ngx.req.get_uri_args()["prefix"]
        if prefix then ngx.req.set_uri(ngx.var.uri .. "/" .. prefix .. "{listing}", false) end
      }}
    }}
  }}
}}
"""


# What a bucket answers when it is asked what lies below a prefix: a file there, made beforehand.
LISTING = "listing.xml"


def write_listing(folder: Path, prefix: str) -> None:
    """Makes the answer of a bucket, whose root is `folder`, to what lies below a prefix that ends in a slash."""
    entries = "".join(
        f"<Contents><Key>{prefix}{path.name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f'<ETag>"{path.stat().st_size:x}"</ETag><Size>{path.stat().st_size}</Size></Contents>'
        for path in sorted((folder / prefix).iterdir())
        if path.name != LISTING
    )
    (folder / prefix / LISTING).write_text(
        f"<ListBucketResult><Name>{folder.name}</Name><Prefix>{prefix}</Prefix><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    )


@dataclass(frozen=True)
class LatencyServer:
    """A running server; a folder below its root is a bucket of anonymous, path-style reads.

    It lists what lies below the prefixes that `write_listing` was given.
    """

    url: str
    log: Path

    def sent(self) -> tuple[int, int]:
        """Requests answered and bytes of content sent so far."""
        time.sleep(0.3)  # until nginx has written its log
        lines = self.log.read_text().split("\n") if self.log.exists() else []
        sizes = [int(line.split()[1]) for line in lines[:-1] if line[:2] == "20"]
        return len(sizes), sum(sizes)


def _has_nginx() -> bool:
    return bool(shutil.which("nginx")) and (_MODULES / "ngx_http_lua_module.so").exists()


def server_kind() -> str:
    """What answers on this machine."""
    return "nginx" if _has_nginx() else "asyncio (nginx with its Lua module is not installed)"


@contextlib.contextmanager
def serve(folder: Path, latency_s: float) -> Iterator[LatencyServer]:
    """Serves a folder until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = Path(tempfile.mkdtemp(prefix="latency-server-"))
    if _has_nginx():
        # Started as root, nginx reads files as nobody.
        user = "user root;\n" if os.getuid() == 0 else ""
        config = _CONFIG.format(
            modules=_MODULES, work=work, port=port, folder=folder.resolve(), latency_s=latency_s, listing=LISTING
        )
        (work / "nginx.conf").write_text(user + config)
        command = ["nginx", "-p", str(work), "-c", str(work / "nginx.conf"), "-e", str(work / "error.log")]
    else:
        command = [sys.executable, __file__, str(folder.resolve()), str(port), str(latency_s), str(work / "access.log")]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the latency server did not start: see {work}/error.log")
            time.sleep(0.05)
        yield LatencyServer(f"http://127.0.0.1:{port}", work / "access.log")
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(work, ignore_errors=True)


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, folder: Path, latency_s: float, log: Path
) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), log.open("a", buffering=1) as sent:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            await asyncio.sleep(latency_s)
            method, target, _ = head.split(" ", 2)
            address = urllib.parse.urlsplit(target)
            path = folder / urllib.parse.unquote(address.path).lstrip("/")
            if "prefix" in (query := urllib.parse.parse_qs(address.query)):
                path = path / query["prefix"][0] / LISTING
            if not path.is_file():
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            stat = path.stat()
            start, end, status = 0, stat.st_size, "200 OK"
            if wanted := re.search(r"(?im)^range: *bytes=(\d+)-(\d*)", head):
                start, status = int(wanted[1]), "206 Partial Content"
                end = min(end, int(wanted[2]) + 1) if wanted[2] else end
            fields = [
                f"HTTP/1.1 {status}",
                f"Content-Length: {end - start}",
                f'ETag: "{stat.st_mtime_ns:x}-{stat.st_size:x}"',
                f"Last-Modified: {email.utils.formatdate(stat.st_mtime, usegmt=True)}",
                *([f"Content-Range: bytes {start}-{end - 1}/{stat.st_size}"] if wanted else []),
            ]
            content = b""
            if method == "GET":
                with path.open("rb") as file:
                    content = os.pread(file.fileno(), end - start, start)
            writer.write(("\r\n".join(fields) + "\r\n\r\n").encode() + content)
            sent.write(f"{status[:3]} {len(content)}\n")
            await writer.drain()
    writer.close()


async def _serve(folder: Path, port: int, latency_s: float, log: Path) -> None:
    server = await asyncio.start_server(
        lambda reader, writer: _answer(reader, writer, folder, latency_s, log), "127.0.0.1", port
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])))
