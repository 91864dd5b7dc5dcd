"""What options, variables and profiles say reaches every request; credentials are read anew when they end."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.credentials import RefreshableCredentials
from botocore.session import Session

from streaming import storage
from streaming.errors import StorageError, UnreachableError
from streaming.storage import patience, s3_settings
from streaming.storage.ranges import open_ranges, read_range
from tests.faulty_server import FaultyServer

CONTENT = bytes(range(256)) * 100
LISTING = b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with AWS's files, and nothing else that says anything of S3."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path


def write_credentials(home: Path, token: str) -> None:
    lines = ["[default]", "aws_access_key_id = a", "aws_secret_access_key = b", f"aws_session_token = {token}"]
    (home / "credentials").write_text("\n".join(lines))


def test_expired_credentials_are_read_anew(home: Path) -> None:
    write_credentials(home, "old")

    def mood(n: int) -> str:
        if server.headers[-1].get("x-amz-security-token") != "old":
            return ""
        write_credentials(home, "new")  # as whoever signs in again does
        return "400:<Error><Code>ExpiredToken</Code></Error>"

    with FaultyServer(CONTENT) as server:
        options = {"endpoint_url": server.url, "region": "us-east-1"}
        ranges = open_ranges("s3://bucket/a.svs", options)
        server.mood, server.befalls_all = mood, True
        assert read_range(ranges, 10, 90) == CONTENT[10:90]
        assert storage.stat("s3://bucket/a.svs", options).size == len(CONTENT)
        server.source = LISTING
        assert storage.expand("s3://bucket", options) == ([], False)
        assert [headers["x-amz-security-token"] for headers in server.headers[1:]] == ["old", "new", "new", "new"]


def test_credentials_that_end_soon_are_never_kept_past_their_end(home: Path) -> None:
    ends = [datetime.now(UTC) + timedelta(minutes=minutes) for minutes in (12, 60)]
    given = iter(ends)

    def renewed() -> dict[str, Any]:
        return {"access_key": "a", "secret_key": "b", "token": "c", "expiry_time": next(given).isoformat()}

    session = Session()
    session._credentials = RefreshableCredentials.create_from_metadata(renewed(), renewed, "test")
    assert s3_settings._Credentials(session)()["expires_at"] <= ends[0]


@pytest.mark.parametrize("asked", [{"requester_pays": "true"}, {"requester_pays": True}])
def test_who_pays_is_told_in_every_request(home: Path, asked: dict[str, Any]) -> None:
    write_credentials(home, "a")
    with FaultyServer(CONTENT) as server:
        # As `--storage` has it: text.
        options = {"endpoint_url": server.url, "timeout_s": "60", **asked}
        storage.stat("s3://bucket/a.svs", options)
        storage.read_bytes("s3://bucket/a//b", options)
        server.source = LISTING
        storage.expand("s3://bucket", options)
        assert [headers.get("x-amz-request-payer") for headers in server.headers] == ["requester"] * 3


def test_a_profile_says_region_endpoint_addressing_and_authorities(home: Path) -> None:
    write_credentials(home, "a")
    lines = ["[profile lab]", "region = eu-west-3", "endpoint_url = https://s3.lab", "ca_bundle = /lab.pem"]
    (home / "config").write_text("\n".join([*lines, "s3 =", "  addressing_style = virtual"]))
    found = s3_settings.settings({"profile": "lab"})
    assert (found.region, found.endpoint, found.verify) == ("eu-west-3", "https://s3.lab", "/lab.pem")
    assert found.store_config("bucket")["endpoint"] == "https://bucket.s3.lab"
    assert s3_settings.settings({"profile": "lab", "region": "us-east-2"}).region == "us-east-2"
    with pytest.raises(StorageError, match=r"nobody.*AWS_PROFILE"):
        s3_settings.settings({"profile": "nobody"})
    with pytest.raises(StorageError, match=r"/lab\.pem: .*names a file of certificates"):
        storage.stat("s3://bucket/a", {"profile": "lab"})


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("gs://b/a", {"token": dict.fromkeys(("type", "private_key", "private_key_id", "client_email"), "x")}),
        ("az://b/a", {"account_name": "a", "account_key": "no base64!"}),
        ("az://b/a", {"account_name": "a", "sas_token": "nothing"}),
        ("s3://b/a", {"proxy": "http://::"}),
    ],
)
def test_what_is_no_key_signature_or_proxy_is_told_at_once(uri: str, options: dict[str, Any], home: Path) -> None:
    with pytest.raises(StorageError, match=r"^[a-z0-9]+://b/a: ") as caught:
        storage.stat(uri, options)
    assert not isinstance(caught.value, UnreachableError)


def test_a_bucket_s_region_is_asked_for_through_the_proxy(home: Path) -> None:
    with FaultyServer(b"", lambda n: "elsewhere", befalls_all=True) as proxy:
        options = {"endpoint_url": "http://nowhere.invalid", "proxy": proxy.url}
        assert s3_settings.settings(options).region_of("bucket") == "us-east-1"


@pytest.mark.parametrize(
    ("uri", "options", "told"),
    [
        (
            "s3://b/a",
            {"endpont_url": "http://127.0.0.1:9"},
            "no storage option is called endpont_url; use .*endpoint_url",
        ),
        ("az://b/a", {"acount_name": "a"}, "no storage option is called acount_name; use .*account_name"),
        ("gs://b/a", {"tokn": "a"}, "no storage option is called tokn; use .*token"),
        ("https://b/a", {"header": "a"}, "no storage option is called header; use headers"),
        ("https://b/a", {"headers": "a=b"}, "headers holds names and values"),
        ("s3://b/a", {"config_kwargs": {"max_pool": 1}}, "config_kwargs knows no max_pool; use proxies"),
        ("s3://b/a", {"timeout_s": "soon"}, "timeout_s=soon; give seconds"),
        ("s3://b/a", {"endpoint_url": "localhost:9000"}, "begins with http"),
        ("s3://b/a", {"addressing_style": "vitual"}, "use auto, path, virtual"),
        ("s3://b/a", {"key": "a"}, "of the storage options key and secret only one is given"),
        ("s3://b/a", {"secret": "a"}, "of the storage options key and secret only one is given"),
        ("gs://b/a", {"token": "ya29.a"}, "the storage option token names no file"),
    ],
)
def test_an_option_that_reaches_nothing_is_refused_with_the_valid_ones(
    home: Path, uri: str, options: dict[str, Any], told: str
) -> None:
    for ask in (storage.stat, storage.expand, open_ranges):
        with pytest.raises(StorageError, match=told):
            ask(uri, options)


@pytest.mark.timeout(120)
def test_without_credentials_or_network_the_answer_comes_soon(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_first_contact_s", 1.0)
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)
    for uri, options, told in (
        ("s3://b/a", {"endpoint_url": "http://127.0.0.1:9"}, "no credentials; set AWS_ACCESS_KEY_ID"),
        ("s3://b/a", {"endpoint_url": "http://127.0.0.1:9", "anon": True}, "check AWS_ENDPOINT_URL"),
        ("az://b/a", {"account_name": "none"}, "no credentials were found; set AZURE_STORAGE_ACCOUNT_KEY"),
        ("gs://b/a", {}, "no credentials were found; set GOOGLE_APPLICATION_CREDENTIALS"),
        ("http://127.0.0.1:9/a", {}, "Connection refused.*check the address"),
    ):
        with pytest.raises(StorageError, match=told):
            storage.stat(uri, options)
