"""Azure, Google and plain HTTP storage: real servers where they are installed, and what options and variables say."""

import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import obstore
import pytest

from benchmarks.latency_server import serve
from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.given import Given
from streaming.catalog.index_packs import save_indexes
from streaming.catalog.inspection import inspect
from streaming.catalog.sources import find_slides
from streaming.catalog.writing import merge, part_of, write
from streaming.errors import MissingError, StorageError
from streaming.plan import TilePlan
from streaming.reading.batch import failures_of
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.slide import open_slide
from streaming.storage import clients, cloud_settings
from streaming.storage.clock import clock_skew
from streaming.storage.staging import Staging
from tests.cloud_servers import ACCOUNT, KEY, Options, azurite, fake_gcs, make_bucket


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AZURE_", "GOOGLE_", "STORAGE_EMULATOR_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Options]:
    with azurite(tmp_path_factory.mktemp("azurite")) as options:
        yield options


@pytest.fixture(scope="module")
def gcs() -> Iterator[Options]:
    with fake_gcs() as options:
        yield options


def upload(root: str, slides: list[Path], options: Options) -> None:
    make_bucket(root, options)
    for path in slides:
        storage.write_bytes(f"{root}/slides/{path.name}", path.read_bytes(), options)


def assert_same_pixels(uri: str, path: Path, options: Options) -> None:
    there, here = open_slide(uri, options), open_slide(str(path))
    assert there.backend == "blocks"
    region = (100, 70), 0, (700, 500)
    assert np.array_equal(there.read_region(*region), here.read_region(*region))


def assert_serves_a_catalog(root: str, slides: list[Path], options: Options, tmp_path: Path) -> None:
    """Slides, catalog and tiles lie at a store; pixels are those of the local slides."""
    upload(root, slides, options)
    out, staging = f"{root}/catalog", Staging(folder=str(tmp_path))
    found = find_slides([f"{root}/slides"], options)
    assert [info.uri for info in found] == [f"{root}/slides/{path.name}" for path in slides]
    assert_same_pixels(found[0].uri, slides[0], options)
    looked_at = save_indexes([inspect(info, Given(), options, staging) for info in found], out, options)
    write(out, *merge([part_of(looked_at)], None), options)
    catalog = Catalog.load(out, options, staging)
    reader = TileReader(
        TilePlan(catalog, mpp={0.5: 1}, size=64), catalog, ReaderOptions(storage_options=options, staging=staging)
    )
    batch = reader({"index": np.arange(16)})
    local = [open_slide(str(path)) for path in slides]
    assert set(batch["slide"]) == set(range(len(slides)))
    for tile, slide, x, y, mpp in zip(*(batch[k] for k in ("tile", "slide", "x", "y", "mpp")), strict=True):
        assert np.array_equal(tile, local[slide].read_tile(int(x), int(y), float(mpp), 64))
    assert not failures_of(batch)


def assert_versions_and_errors(root: str, options: Options) -> None:
    storage.write_bytes(f"{root}/a", b"one", options)
    before = storage.stat(f"{root}/a", options)
    storage.write_bytes(f"{root}/a", b"two", options)
    assert storage.stat(f"{root}/a", options).version != before.version
    assert storage.read_bytes(f"{root}/a", options) == b"two"
    assert abs(clock_skew(root, options)) < 60
    storage.remove(f"{root}/a", options)
    for content in (b"first", b"second"):  # there is none, there is one
        current = storage.read_current(f"{root}/b", options)
        assert storage.replace(f"{root}/b", current, content, options)
        if not root.startswith("gs://"):  # the fake one does not compare
            assert not storage.replace(f"{root}/b", current, b"late", options)
        assert storage.read_bytes(f"{root}/b", options) == content
    for uri in (f"{root}/a", f"{root}-none/a"):
        assert not storage.exists(uri, options)
        for ask in (storage.read_bytes, open_slide):
            with pytest.raises(MissingError, match=r"not found|the bucket does not exist"):
                ask(uri, options)


def test_azure_serves_slides_catalog_and_tiles(azure: Options, slides: list[Path], tmp_path: Path) -> None:
    assert_serves_a_catalog("az://tiles", slides, azure, tmp_path)
    assert_versions_and_errors("az://tiles", azure)


def test_google_serves_slides_catalog_and_tiles(gcs: Options, slides: list[Path], tmp_path: Path) -> None:
    assert_serves_a_catalog("gs://tiles", slides, gcs, tmp_path)
    assert_versions_and_errors("gs://tiles", gcs)


def test_azure_is_configured_by_a_connection_string_a_shared_access_signature_or_variables(
    azure: Options, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

    upload("az://ways", slides[:1], azure)
    uri, endpoint = f"az://ways/slides/{slides[0].name}", azure["endpoint_url"]
    size = storage.stat(uri, azure).size
    lifetime = {"start": datetime.now(UTC) - timedelta(days=1), "expiry": datetime.now(UTC) + timedelta(days=1)}
    rights = AccountSasPermissions(read=True, list=True)
    sas = generate_account_sas(ACCOUNT, KEY, ResourceTypes(object=True, container=True), rights, **lifetime)
    text = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
    ways: list[tuple[Options, Options]] = [
        ({"connection_string": text}, {}),
        ({}, {"AZURE_STORAGE_CONNECTION_STRING": text}),
        ({"account_name": ACCOUNT, "sas_token": sas, "endpoint_url": endpoint}, {}),
        (
            {"endpoint_url": endpoint},
            {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY, "AZURE_STORAGE_ENDPOINT": "gone"},
        ),
    ]
    for options, variables in ways:
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(name, value)
            assert storage.stat(uri, options).size == size
            assert_same_pixels(uri, slides[0], options)


def test_a_wrong_key_is_told_in_one_line(azure: Options, slides: list[Path]) -> None:
    upload("az://locked", slides[:1], azure)
    wrong = azure | {"account_key": "AAAA"}
    for ask in (storage.stat, open_slide):
        with pytest.raises(StorageError, match=r"az://locked/.*(key|credentials)") as caught:
            ask(f"az://locked/slides/{slides[0].name}", wrong)
        assert "\n" not in str(caught.value)


def test_a_slide_behind_plain_http_has_the_pixels_of_the_file(slides: list[Path]) -> None:
    with serve(slides[0].parent, 0.0) as server:
        uri = f"{server.url}/{slides[0].name}"
        # Options of other stores are not for this one.
        assert_same_pixels(uri, slides[0], {"endpoint_url": "http://127.0.0.1:9", "account_name": "none"})
        info = storage.stat(uri)
        assert info.size == slides[0].stat().st_size
        assert info.version
        with pytest.raises(StorageError, match="not found"):
            open_slide(f"{server.url}/none.svs")


def test_http_headers_of_the_options_go_with_listing_and_ranges(slides: list[Path]) -> None:
    asked: list[tuple[str, str | None]] = []

    class Guarded(SimpleHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(b"")

        def do_GET(self) -> None:
            self.answer(b"tile")

        def answer(self, content: bytes) -> None:
            asked.append((self.command, self.headers["Authorization"]))
            allowed = self.headers["Authorization"] == "Bearer tiles"
            self.send_response(200 if allowed else 403)
            self.send_header("Content-Length", "4" if allowed else "0")
            self.end_headers()
            self.wfile.write(content if allowed else b"")

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root, options = f"http://127.0.0.1:{server.server_port}", {"headers": {"Authorization": "Bearer tiles"}}
        try:
            assert storage.read_bytes(f"{root}/a", options) == b"tile"
            store = clients.object_store(root, options)
            assert obstore.get(store, "a").bytes().to_bytes() == b"tile"
            with pytest.raises(StorageError):
                storage.read_bytes(f"{root}/a")
        finally:
            server.shutdown()
    assert {token for _, token in asked} == {"Bearer tiles", None}


def test_an_azure_connection_string_names_account_key_and_endpoint() -> None:
    portal = "DefaultEndpointsProtocol=https;AccountName=lab;AccountKey=a2V5==;EndpointSuffix=core.windows.net"
    config = cloud_settings.azure_config({"connection_string": portal})
    assert config == {
        "account_name": "lab",
        "account_key": "a2V5==",
        "endpoint": "https://lab.blob.core.windows.net",
    }
    signed = "BlobEndpoint=https://lab.blob.core.windows.net/;SharedAccessSignature=sv=2024&sig=x%3D"
    assert cloud_settings.azure_config({"connection_string": signed})["account_name"] == "lab"
    assert cloud_settings.azure_config({"connection_string": signed})["sas_key"] == "sv=2024&sig=x%3D"


@pytest.mark.parametrize(
    ("uri", "options", "message"),
    [
        ("az://tiles/a", {}, "AZURE_STORAGE_ACCOUNT_NAME"),
        ("az://tiles/a", {"connection_string": "hello"}, "connection string"),
        ("abfss://tiles@lab.dfs.core.windows.net/a", {"account_name": "lab"}, "az://container"),
    ],
)
def test_what_azure_lacks_is_said(uri: str, options: Options, message: str) -> None:
    for ask in (storage.stat, open_slide):
        with pytest.raises(StorageError, match=message):
            ask(uri, options)


def test_google_credentials_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "key.json")
    Path(path).touch()
    assert cloud_settings.gcs_config({"token": path}) == {"application_credentials": path}
    assert cloud_settings.gcs_config({"token": "anon"}) == {"skip_signature": True}
    assert cloud_settings.gcs_config({"token": "google_default"}) == cloud_settings.gcs_config({}) == {}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", path)
    assert cloud_settings.gcs_config({}) == {"application_credentials": path}
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:4443")
    assert cloud_settings.gcs_config({"token": "anon"}) == {"skip_signature": True, "base_url": "http://127.0.0.1:4443"}
