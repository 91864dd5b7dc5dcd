"""What each storage's troubles do to each thing that is asked of it: one table, against real servers.

Troubles that pass cost nothing: what is asked for comes, right. Those that last are told at once, with the remedy.
"""

import contextlib
import itertools
import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pytest

from streaming import storage
from streaming.errors import StorageError, UnreachableError
from streaming.storage.ranges import open_ranges, read_range
from streaming.storage.staging import Staging
from tests.cloud_servers import Options, azurite, fake_gcs, make_bucket
from tests.faulty_server import FaultyServer, in_turn
from tests.processes import free_ports

CONTENT = bytes(range(256)) * 1200
LARGE = bytes(range(251)) * 40_000  # more than a part of an upload
TABLE = pa.table({"slide": ["a", "b"], "x": [1, 2]})

Place = tuple[str, Options]
TLS = tuple[ssl.SSLContext, str]


def _list(place: Place, folder: Path) -> None:
    found, outright = storage.expand(f"{place[0]}/table", place[1])
    assert [(info.uri, info.size) for info in found] == [(f"{place[0]}/table/a.bin", len(CONTENT))]
    assert not outright


def _stat(place: Place, folder: Path) -> None:
    assert storage.stat(f"{place[0]}/table/a.bin", place[1]).size == len(CONTENT)


def _range(place: Place, folder: Path) -> None:
    ranges = open_ranges(f"{place[0]}/table/a.bin", place[1])
    assert ranges is not None
    assert read_range(ranges, 1000, 200_000) == CONTENT[1000:200_000]


def _copy(place: Place, folder: Path) -> None:
    uri, options = f"{place[0]}/table/a.bin", place[1]
    copy = Staging(folder=str(folder)).fetch(storage.stat(uri, options), options)
    assert Path(copy).read_bytes() == CONTENT


def _parquet(place: Place, folder: Path) -> None:
    uri, options = f"{place[0]}/table.parquet", place[1]
    if not uri.startswith("http"):
        uri = f"{place[0]}/written/{folder.name}.parquet"
        storage.write_table(uri, TABLE, options)
    assert storage.read_table(uri, options).equals(TABLE)


def _checkpoint(place: Place, folder: Path) -> None:
    uri, options = f"{place[0]}/written/{folder.name}.ckpt", place[1]
    # The fake Google storage knows no uploads in parts.
    content = CONTENT if uri.startswith("gs://") else LARGE

    def write(file: BinaryIO) -> int:
        return file.write(content[:1000]) + file.write(content[1000:])

    assert storage.write_stream(uri, write, options) == len(content)
    with storage.reading(uri, options) as file:
        assert file.read() == content
    storage.remove(uri, options)
    assert not storage.exists(uri, options)


ASKED: dict[str, Callable[[Place, Path], None]] = {
    "list": _list,
    "stat": _stat,
    "range": _range,
    "copy": _copy,
    "parquet": _parquet,
    "checkpoint": _checkpoint,
}
# A web server lists nothing and takes nothing.
WRITTEN = ("parquet", "checkpoint")
NO_HTTP = ("list", "checkpoint")
PAIRS = [
    pair for pair in itertools.product(("s3", "az", "gs", "http"), ASKED) if pair[0] != "http" or pair[1] not in NO_HTTP
]
PASSING = ("503", "reset", "500", "429", "refused", "silent", "slow", "expired", "redirect")
LASTING = {
    "404": "not found|does not exist",
    "403": "access denied; check the credentials",
    "tls": "certificate is not trusted.*verify=",
}
MOODS = {"silent": "stall", "expired": "400:<Error><Code>ExpiredToken</Code></Error>"}


def _cases() -> list[Any]:
    """Each pair with each trouble; one of those that pass, in turn, in the fast suite."""
    found = list[Any]()
    for number, (store, asked) in enumerate(PAIRS):
        for trouble in PASSING:
            if trouble == "redirect" and (store == "az" or (store == "gs" and asked in WRITTEN)):
                continue  # what is signed or written is not sent elsewhere
            # An upload may be silent for longer.
            is_swift = trouble == PASSING[number % len(PASSING)] and (asked, trouble) != ("checkpoint", "silent")
            marks = [] if is_swift else [pytest.mark.long]
            found.append(pytest.param(store, asked, trouble, marks=marks))
    return found


@pytest.fixture(scope="module")
def places(s3_bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Place]]:
    """A bucket at each storage, with its options; the endpoint among them."""
    with azurite(tmp_path_factory.mktemp("azurite")) as azure, fake_gcs() as google:
        found = {"s3": (s3_bucket, {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]})}
        found |= {"az": ("az://table", azure), "gs": ("gs://table", google)}
        for name in ("az", "gs"):
            make_bucket(*found[name])
        for root, options in found.values():
            storage.write_bytes(f"{root}/table/a.bin", CONTENT, options)
        yield found


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TLS:
    """A server's identity for which nobody known vouches, and the file of who does."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (apt-get install openssl)")
    folder = tmp_path_factory.mktemp("tls")
    extensions = folder / "extensions"
    extensions.write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "rsa:2048", "-nodes", "-keyout")
    openssl("req", "-x509", *key, "authority.key", "-out", "authority.pem", "-days", "2", "-subj", "/CN=nobody")
    openssl("req", *key, "server.key", "-out", "server.csr", "-subj", "/CN=127.0.0.1")
    signed_by = ("-CA", "authority.pem", "-CAkey", "authority.key", "-CAcreateserial", "-extfile", "extensions")
    openssl("x509", "-req", "-in", "server.csr", "-out", "server.pem", "-days", "2", *signed_by)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context, str(folder / "authority.pem")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("parquet") / "table.parquet"
    storage.write_table(str(path), TABLE)
    return path.read_bytes()


def behind(url: str, store: str, places: dict[str, Place]) -> Place:
    """The same bucket, asked through the server there."""
    if store == "http":
        return url, {"timeout_s": 1}
    root, options = places[store]
    path = "/" + options["endpoint_url"].split("/", 3)[3] if options["endpoint_url"].count("/") > 2 else ""
    # Its own region is another one, as far as we know.
    return root, {**options, "endpoint_url": url + path, "timeout_s": 1, "region": "eu-west-9"}


def source_of(store: str, asked: str, places: dict[str, Place], parquet: bytes) -> str | bytes:
    if store == "http":
        return parquet if asked == "parquet" else CONTENT
    return "/".join(places[store][1]["endpoint_url"].split("/")[:3])


@pytest.mark.parametrize(("store", "asked", "trouble"), _cases())
def test_what_passes_costs_nothing(
    store: str, asked: str, trouble: str, places: dict[str, Place], parquet: bytes, tmp_path: Path
) -> None:
    source = source_of(store, asked, places, parquet)
    if trouble == "refused":
        (port,) = free_ports(1)
        started = list[FaultyServer]()
        timer = threading.Timer(0.7, lambda: started.append(FaultyServer(source, port=port).__enter__()))
        timer.start()
        try:
            ASKED[asked](behind(f"http://127.0.0.1:{port}", store, places), tmp_path)
        finally:
            timer.join()
            started[0].__exit__()
        return
    with contextlib.ExitStack() as servers:
        moods = [MOODS.get(trouble, trouble)] * (1000 if trouble in ("slow", "redirect") else 2)
        if trouble == "redirect" and store == "s3":
            moods = ["elsewhere"] * 2
        server = servers.enter_context(FaultyServer(source, in_turn(moods), befalls_all=True, stall_s=20))
        if isinstance(source, bytes):
            server.redirects_to = servers.enter_context(FaultyServer(source)).url
        ASKED[asked](behind(server.url, store, places), tmp_path)
        assert server.num_faults >= 1
        assert server.num_broken_off == 0


@pytest.mark.parametrize("asked", ASKED)
def test_certificates_of_a_variable_reach_every_request_and_that_for_the_region(
    asked: str, places: dict[str, Place], tls: TLS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", tls[1])
    source = source_of("s3", asked, places, b"")
    with FaultyServer(source, in_turn(["elsewhere"] * 2), befalls_all=True, tls=tls[0]) as server:
        ASKED[asked](behind(server.url, "s3", places), tmp_path)
        assert server.num_faults == 2


@pytest.mark.parametrize("trouble", LASTING)
@pytest.mark.parametrize(("store", "asked"), PAIRS)
def test_what_lasts_is_told_at_once(
    store: str, asked: str, trouble: str, places: dict[str, Place], parquet: bytes, tls: TLS, tmp_path: Path
) -> None:
    source = source_of(store, asked, places, parquet)
    mood = "" if trouble == "tls" else trouble
    with FaultyServer(source, lambda n: mood, befalls_all=True, tls=tls[0] if trouble == "tls" else None) as server:
        place = behind(server.url, store, places)
        with pytest.raises(StorageError, match=LASTING[trouble]) as caught:
            ASKED[asked](place, tmp_path)
        assert not isinstance(caught.value, UnreachableError)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(place[0])
        assert server.count <= 3
        if trouble == "tls":
            ASKED[asked]((place[0], {**place[1], "verify": tls[1], "region": "us-east-1"}), tmp_path)
