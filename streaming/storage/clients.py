"""From a URI and its options to the storage behind it, as fsspec and as obstore want it.

A URI is a local path or anything fsspec knows (`s3://`, `gs://`, `az://`, `http(s)://`, …). `storage_options` are
fsspec's, plus `region` for S3 and `timeout_s` for one request; what they leave open comes from the usual environment
variables (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, …; Azure's and Google's in
`cloud_settings`). An HTTP server takes `headers` alone.
"""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, cast

from botocore.exceptions import NoCredentialsError
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from obstore.store import AzureStore, GCSStore, HTTPStore, ObjectStore, S3Store

from streaming.errors import StorageError
from streaming.storage import cloud_settings

StorageOptions = Mapping[str, Any]

_S3, _GCS, _AZURE, _HTTP = ("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss"), ("http", "https")

# A wrong endpoint should be told within seconds, not after botocore's minute-long default timeouts and retries.
_S3_CONFIG = {"connect_timeout": 5, "retries": {"mode": "standard", "max_attempts": 5}}

# The default of `timeout_s`. In obstore it bounds a whole answer, from connecting to the last byte of the body, also
# where bytes keep coming; in s3fs and adlfs it bounds the silence between two pieces of an answer.
_TIMEOUT_S = 20


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
        options = {**timeouts, **cloud_settings.adlfs_options(_of_account(uri, options))}
    elif protocol in _GCS:
        options = cloud_settings.gcsfs_options(options)
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

    It sends no failed request again by itself: `ranges` does, and counts how often.
    """
    options = dict(storage_options or {})
    protocol, name = bucket.split("://", 1)
    client: Any = {"allow_http": True, "connect_timeout": "5s", "timeout": f"{options.get('timeout_s', _TIMEOUT_S)}s"}
    retry: Any = {"max_retries": 0}
    if protocol in _HTTP:
        client["default_headers"] = dict(options.get("headers", {}))
        return HTTPStore.from_url(bucket, client_options=client, retry_config=retry)
    if protocol in _GCS:
        config = cloud_settings.gcs_config(options)
        return GCSStore(name, config=cast(Any, config), client_options=client, retry_config=retry)
    if protocol in _AZURE:
        config = cloud_settings.azure_config(_of_account(bucket, options))
        return AzureStore(name, config=cast(Any, config), client_options=client, retry_config=retry)
    # For S3 alone: its import is a third of what a reader's start costs besides Ray's.
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider

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
        return cloud_settings.gcs_endpoint(options)
    if protocol in _AZURE:
        return cloud_settings.azure_endpoint(options)
    given = options.get("endpoint_url") or options.get("client_kwargs", {}).get("endpoint_url")
    given = given or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = options.get("region") or os.environ.get("AWS_REGION") or "us-east-1"
    return str(given or f"https://s3.{region}.amazonaws.com")


def settings_of(uri: str) -> str:
    """The variables that say where a URI's storage is."""
    protocol = uri.split("://", 1)[0]
    if protocol in _AZURE:
        return "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT, the key"
    if protocol in _GCS:
        return "GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_BASE_URL"
    return "the address" if protocol in _HTTP else "AWS_ENDPOINT_URL, AWS_REGION"
