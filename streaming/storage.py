"""The one place that turns a URI and its options into storage.

A URI is a local path or anything fsspec knows (`s3://`, `gs://`, `az://`, `http(s)://`, …). `storage_options` are
fsspec's, plus `region` for S3 and `timeout_s` for one request; what they leave open comes from the usual environment
variables (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, …; Azure's and Google's in
`clouds`). An HTTP server takes `headers` alone.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import posixpath
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import boto3
import obstore.exceptions
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import AzureStore, GCSStore, HTTPStore, ObjectStore, S3Store

from streaming import clouds
from streaming.errors import StorageError

StorageOptions = Mapping[str, Any]

_S3, _GCS, _AZURE, _HTTP = ("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss"), ("http", "https")

# Packages behind fsspec's, which may not be installed: their errors are known by where they come from.
_FOREIGN = ("aiohttp", "azure", "gcsfs", "google")

# A wrong endpoint should be told within seconds, not after botocore's minute-long default timeouts and retries.
_S3_CONFIG = {"connect_timeout": 5, "retries": {"mode": "standard", "max_attempts": 5}}


# A request of which nothing has come for so long is sent anew, on another connection; `timeout_s` sets it.
_TIMEOUT_S = 20


@dataclass(frozen=True)
class ObjectInfo:
    """A stored object: where it is and what tells its version (ETag where there is one, else the modification time)."""

    uri: str
    size: int
    version: str

    @property
    def digest(self) -> str:
        """SHA-256 of all three, in hex: names what is made of just this version."""
        return hashlib.sha256(f"{self.uri}\n{self.version}\n{self.size}".encode()).hexdigest()


def filesystem(uri: str, storage_options: StorageOptions | None = None) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem of a URI and the path within it.

    Raises:
        StorageError: the protocol is unknown, its package is not installed, or no account is named.
    """
    options = dict(storage_options or {})
    timeout_s = options.pop("timeout_s", _TIMEOUT_S)
    protocol = uri.split("://", 1)[0] if "://" in uri else "file"
    if protocol in _S3:
        client = {**options.get("client_kwargs", {}), "region_name": _s3_region(options)}
        options.pop("region", None)
        options["client_kwargs"] = {key: value for key, value in client.items() if value}
        options["config_kwargs"] = {**_S3_CONFIG, "read_timeout": timeout_s, **options.pop("config_kwargs", {})}
    elif protocol in _AZURE:
        timeouts = {"connection_timeout": 5, "read_timeout": timeout_s}
        options = {**timeouts, **clouds.adlfs_options(_of_account(uri, options))}
    elif protocol in _GCS:
        options = clouds.gcsfs_options(options)
    elif protocol in _HTTP:
        options = {key: options[key] for key in ("headers",) if key in options}
    elif protocol == "file":
        options = {}  # options configure remote stores; a run may mix both
    # A listing must show what another process wrote a second ago, so no listing is cached.
    options["use_listings_cache"] = False
    try:
        fs, path = url_to_fs(uri, **options)
    except (ValueError, ImportError) as error:
        raise StorageError(
            f"{uri}: no storage for this address ({error}); install the fsspec package for it"
        ) from error
    return fs, path


def _s3_region(options: StorageOptions) -> str | None:
    inner: Mapping[str, Any] = options.get("client_kwargs", {})
    return options.get("region") or inner.get("region_name") or os.environ.get("AWS_REGION")


def _of_account(uri: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an Azure URI, which names the container alone."""
    if "@" in uri.split("://", 1)[1].partition("/")[0]:
        raise StorageError(f"{uri}: names an account; write az://container/… and set AZURE_STORAGE_ACCOUNT_NAME")
    return options


def has_ranges(uri: str) -> bool:
    """Whether `object_store` knows the protocol of a URI."""
    return uri.split("://", 1)[0] in (*_S3, *_GCS, *_AZURE, *_HTTP)


def split_bucket(uri: str) -> tuple[str, str]:
    """A remote URI as its bucket (or host) and the key within."""
    protocol, rest = uri.split("://", 1)
    bucket, _, key = rest.partition("/")
    return f"{protocol}://{bucket}", key


def store_environment() -> str:
    """The part of the environment that decides what a store is."""
    names = ("AWS_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR_")
    return repr(sorted((k, v) for k, v in os.environ.items() if k.startswith(names)))


def object_store(bucket: str, storage_options: StorageOptions | None = None) -> ObjectStore:
    """The obstore store of a bucket, for ranged reads, with the same options and environment as `filesystem`'s.

    Throttling (429, 503), timeouts and resets are tried again for five minutes, with backoff and jitter: a tile that is
    given up because storage hangs for a while would make a run another one.
    """
    options = dict(storage_options or {})
    protocol, name = bucket.split("://", 1)
    client: Any = {"allow_http": True, "connect_timeout": "5s", "timeout": f"{options.get('timeout_s', _TIMEOUT_S)}s"}
    retry: Any = {"max_retries": 100, "retry_timeout": timedelta(seconds=300)}
    if protocol in _HTTP:
        client["default_headers"] = dict(options.get("headers", {}))
        return HTTPStore.from_url(bucket, client_options=client, retry_config=retry)
    if protocol in _GCS:
        config = clouds.gcs_config(options)
        return GCSStore(name, config=cast(Any, config), client_options=client, retry_config=retry)
    if protocol in _AZURE:
        config = clouds.azure_config(_of_account(bucket, options))
        return AzureStore(name, config=cast(Any, config), client_options=client, retry_config=retry)
    inner = options.get("client_kwargs", {})
    session = boto3.Session(
        aws_access_key_id=options.get("key"),
        aws_secret_access_key=options.get("secret"),
        aws_session_token=options.get("token"),
        profile_name=options.get("profile"),
    )
    config = {
        "region": _s3_region(options) or session.region_name,
        "endpoint": options.get("endpoint_url")
        or inner.get("endpoint_url")
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL"),
        "skip_signature": True if options.get("anon") else None,
    }
    if not options.get("anon") and session.get_credentials() is None:
        raise NoCredentialsError
    return S3Store(
        name,
        config=cast(Any, {key: value for key, value in config.items() if value}),
        credential_provider=None if options.get("anon") else Boto3CredentialProvider(session),
        client_options=client,
        retry_config=retry,
    )


def clock_skew(uri: str, storage_options: StorageOptions | None = None) -> float:
    """Seconds by which this machine's clock is ahead of a remote URI's storage, by its `Date` header (whole seconds).

    Raises:
        StorageError: it does not answer, or tells no time.
    """
    address = _endpoint(uri, dict(storage_options or {}))
    request = urllib.request.Request(address, method="HEAD")
    sent = time.time()
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as refusal:
        date = refusal.headers["Date"]  # a refusal without credentials tells the time as well
    except OSError as error:
        raise StorageError(f"{address}: {error}; check the endpoint and the network") from error
    if not date:
        raise StorageError(f"{address}: tells no time")
    skew = (sent + time.time()) / 2 - parsedate_to_datetime(date).timestamp()
    return 0.0 if 0 <= skew <= 1 else skew


def _endpoint(uri: str, options: dict[str, Any]) -> str:
    """The HTTP address of the storage behind a URI."""
    protocol, name = split_bucket(uri)[0].split("://", 1)
    if protocol in _HTTP:
        return f"{protocol}://{name}"
    if protocol in _GCS:
        return clouds.gcs_endpoint(options)
    if protocol in _AZURE:
        return clouds.azure_endpoint(options)
    given = options.get("endpoint_url") or options.get("client_kwargs", {}).get("endpoint_url")
    given = given or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = options.get("region") or os.environ.get("AWS_REGION") or "us-east-1"
    return str(given or f"https://s3.{region}.amazonaws.com")


def is_local(uri: str) -> bool:
    """Whether a URI names a path on this machine."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def local_path(uri: str) -> str:
    """The absolute path of a local URI."""
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://").removeprefix("local://")))


def canonical(uri: str) -> str:
    """The same address in one spelling: local paths absolute, no trailing slash."""
    return local_path(uri) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *names: str) -> str:
    """A URI below another."""
    return posixpath.join(uri.rstrip("/") or "/", *names)


def name_of(uri: str) -> str:
    """The last part of a URI: a file's name with its suffix."""
    return posixpath.basename(uri.rstrip("/"))


@contextlib.contextmanager
def storage_errors(uri: str) -> Generator[None]:
    """Turns what the storage libraries raise into a StorageError with the remedy."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        no_bucket = any(sign in str(error) for sign in ("NoSuchBucket", "bucket does not exist"))
        what = "the bucket does not exist" if no_bucket else "not found"
        raise StorageError(f"{uri}: {what}; check the address and the endpoint") from error
    except PermissionError as error:
        raise StorageError(f"{uri}: access denied; check the credentials and their rights ({error})") from error
    except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError) as error:
        raise StorageError(f"{uri}: access denied; check the credentials and their rights") from error
    except obstore.exceptions.BaseError as error:
        text = " ".join(str(error).split("Debug source")[0].split())
        raise StorageError(f"{uri}: {text}; check {_settings(uri)} and the network") from error
    except (BotoCoreError, ClientError) as error:
        text = " ".join(str(error).split())
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage_options"
        if "credentials" not in text.lower():
            remedy = "check AWS_ENDPOINT_URL, AWS_REGION and the network"
        raise StorageError(f"{uri}: {text}; {remedy}") from error
    except (OSError, ConnectionError, TimeoutError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"{uri}: {text}; check that the storage answers and has room") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _FOREIGN:
            raise
        text = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise StorageError(f"{uri}: {text}; check {_settings(uri)} and the network") from error


def _settings(uri: str) -> str:
    """The variables that say where a URI's storage is."""
    protocol = uri.split("://", 1)[0]
    if protocol in _AZURE:
        return "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT, the key"
    if protocol in _GCS:
        return "GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_BASE_URL"
    return "the address" if protocol in _HTTP else "AWS_ENDPOINT_URL, AWS_REGION"


def _info(fs: AbstractFileSystem, entry: Mapping[str, Any]) -> ObjectInfo:
    etag = entry.get("ETag") or entry.get("etag")
    times = ("mtime", "LastModified", "last_modified", "Last-Modified")
    changed = next((entry[name] for name in times if entry.get(name)), "")
    version = str(etag).strip('"') if etag else repr(changed)
    uri = str(entry["name"]) if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(entry["name"]))
    if uri.startswith("abfs://"):
        uri = f"az://{uri.removeprefix('abfs://')}"  # one spelling for Azure's three, that of the documentation
    return ObjectInfo(uri=uri, size=int(entry.get("size") or 0), version=version)


def stat(uri: str, storage_options: StorageOptions | None = None) -> ObjectInfo:
    """Size and version of one object.

    Raises:
        StorageError: it does not exist or can't be reached.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        return _info(fs, fs.info(path))


def exists(uri: str, storage_options: StorageOptions | None = None) -> bool:
    """Whether there is an object or folder at the URI.

    Raises:
        StorageError: the storage can't be reached, the bucket does not exist, or access is denied.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        try:
            fs.info(path)
        except FileNotFoundError:
            return False
        return True


def expand(uri: str, storage_options: StorageOptions | None = None) -> tuple[list[ObjectInfo], bool]:
    """The objects that a file, folder, prefix or glob names, sorted, and whether it was one file named outright.

    Raises:
        StorageError: nothing is there, or it can't be reached.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        if glob.has_magic(path) and not fs.exists(path):
            found: dict[str, Any] = fs.glob(path, detail=True)  # type: ignore[assignment]
            if not found:
                raise StorageError(f"{uri}: no file matches; check the pattern (and quote it for the shell)")
            return sorted((_info(fs, e) for e in found.values() if e["type"] == "file"), key=lambda o: o.uri), False
        entry = fs.info(path)
        if entry["type"] == "file":
            return [_info(fs, entry)], True
        below: dict[str, Any] = fs.find(path, detail=True)  # type: ignore[assignment]
        # S3 marks an empty "folder" with an object whose name ends in a slash.
        files = [_info(fs, e) for name, e in below.items() if not name.endswith("/")]
        return sorted(files, key=lambda o: o.uri), False


def list_names(uri: str, storage_options: StorageOptions | None = None) -> list[str]:
    """Names of the entries directly below a folder; empty when there is none."""
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        try:
            return sorted(name_of(str(name)) for name in fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []


def list_files(
    uri: str, wanted: Callable[[str], bool], storage_options: StorageOptions | None = None
) -> list[ObjectInfo]:
    """The files directly below a folder whose names are wanted, sorted; none where there is no folder.

    Raises:
        StorageError: it can't be listed.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        try:
            entries: list[dict[str, Any]] = fs.ls(path, detail=True)  # type: ignore[assignment]
        except (FileNotFoundError, NotADirectoryError):
            return []
        found: dict[str, dict[str, Any]] = {}
        for entry in entries:
            name = name_of(str(entry["name"]))
            # A key of an object store may be called like the folder above.
            if entry["type"] == "file" and name not in ("", ".", "..") and wanted(name):
                found[str(entry["name"])] = entry
        # A listing over HTTP tells no sizes.
        infos = [_info(fs, e if e.get("size") is not None else fs.info(name)) for name, e in found.items()]
        return sorted(infos, key=lambda info: info.uri)


def read_bytes(uri: str, storage_options: StorageOptions | None = None) -> bytes:
    """The whole content of an object.

    Raises:
        StorageError: it does not exist or can't be read.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        content = fs.cat_file(path)
        assert isinstance(content, bytes), "cat_file gives bytes unless asked for text"
        return content


def write_bytes(uri: str, content: bytes, storage_options: StorageOptions | None = None) -> None:
    """Writes an object whole or not at all: a put is atomic in object stores, a rename is on disks.

    Raises:
        StorageError: it can't be written.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        if not isinstance(fs, LocalFileSystem):
            fs.pipe_file(path, content)
            return
        with whole_file(path) as temporary:
            Path(temporary).write_bytes(content)


@contextlib.contextmanager
def writing(uri: str, storage_options: StorageOptions | None = None) -> Generator[BinaryIO]:
    """A file to write an object of any size into, piece by piece; a local one appears when the block ends well.

    A remote one that breaks off may be left cut short, so a note written after it must vouch for it.

    Raises:
        StorageError: it can't be written.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        if isinstance(fs, LocalFileSystem):
            with whole_file(path) as temporary, open(temporary, "wb") as file:
                yield file
            return
        with fs.open(path, "wb") as file:
            yield cast(BinaryIO, file)


@contextlib.contextmanager
def reading(uri: str, storage_options: StorageOptions | None = None) -> Generator[BinaryIO]:
    """A file to read an object from, piece by piece.

    Raises:
        StorageError: it does not exist or can't be read.
    """
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        with fs.open(path, "rb") as file:
            yield cast(BinaryIO, file)


@contextlib.contextmanager
def whole_file(path: str) -> Generator[str]:
    """A temporary path beside a local one, renamed to it when the block ends well and removed when it does not."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.part-{uuid.uuid4().hex[:8]}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@contextlib.contextmanager
def written_file(uri: Callable[[], str], storage_options: StorageOptions | None = None) -> Generator[str]:
    """A local path to write a large object to, which appears whole under its address when the block ends well.

    The address is asked for at the end, so that it may tell the content.

    Raises:
        StorageError: it can't be written.
    """
    with tempfile.TemporaryDirectory(prefix="tilestream-") as folder:
        path = os.path.join(folder, "file")
        yield path
        target = uri()
        with storage_errors(target):
            fs, remote = filesystem(target, storage_options)
            if not isinstance(fs, LocalFileSystem):
                fs.put_file(path, remote)
                return
            with whole_file(remote) as temporary:
                shutil.move(path, temporary)


def download(info: ObjectInfo, path: str, storage_options: StorageOptions | None = None) -> None:
    """Copies an object to a local file, whole or not at all.

    Raises:
        StorageError: it can't be read, there is no room, or it has another size than expected.
    """
    with storage_errors(info.uri):
        fs, remote = filesystem(info.uri, storage_options)
        with whole_file(path) as temporary:
            fs.get_file(remote, temporary)
            size = os.path.getsize(temporary)
            if size != info.size:
                raise StorageError(f"{info.uri}: got {size:,} of {info.size:,} bytes; try again, or upload it anew")


def remove(uri: str, storage_options: StorageOptions | None = None) -> None:
    """Removes an object, or a folder with all below it; nothing there is fine."""
    with storage_errors(uri):
        fs, path = filesystem(uri, storage_options)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def read_table(uri: str, storage_options: StorageOptions | None = None) -> pa.Table:
    """A Parquet file as an Arrow table.

    Raises:
        StorageError: it does not exist, can't be read, or is no Parquet.
    """
    content = read_bytes(uri, storage_options)
    try:
        return pq.read_table(pa.BufferReader(content))
    except pa.ArrowInvalid as error:
        raise StorageError(f"{uri}: not a whole Parquet file ({error}); write it again") from error


def write_table(uri: str, table: pa.Table, storage_options: StorageOptions | None = None) -> None:
    """Writes an Arrow table as Parquet, whole or not at all.

    Raises:
        StorageError: it can't be written.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(uri, sink.getvalue().to_pybytes(), storage_options)
