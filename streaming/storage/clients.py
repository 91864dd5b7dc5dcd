"""Which options and variables a storage takes: the one place that makes obstore's stores of them.

`storage_options` have fsspec's names (s3fs's, adlfs's, gcsfs's), plus `region`, `requester_pays`, `query` and, for all,
`timeout_s`, `verify`, `proxy` and `mirrors` (see `places`); what they leave open comes from the usual variables and
profiles. A run may mix storages, so that options of another one are passed over; a name that none knows is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

from obstore.store import AzureStore, GCSStore, HTTPStore, ObjectStore, S3Store

from streaming.errors import StorageError
from streaming.storage import cloud_settings, s3_settings
from streaming.storage.addresses import AZURE, GCS, HTTP, S3, protocol_of, shown

StorageOptions = Mapping[str, Any]

_NAMES: dict[str, frozenset[str]] = {
    S3: s3_settings.OPTIONS,
    AZURE: cloud_settings.AZURE_OPTIONS,
    GCS: cloud_settings.GCS_OPTIONS,
    "http": frozenset({"headers", "query"}),
    "all": frozenset({"timeout_s", "verify", "proxy", "mirrors"}),
}
# What decides what a store is, besides its options.
_VARIABLES = ("AWS_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

# So long nothing may come, not even a byte. An answer may take as long as it needs: on a slow line that many readers
# share, two megabytes take a minute, and to break them off would only make it slower.
_SILENCE_S = 20.0
# While a part of an upload is on its way, nothing comes back.
_UPLOAD_PATIENCE = 6


def has_store(uri: str) -> bool:
    """Whether obstore knows the protocol of a URI."""
    return protocol_of(uri) in (S3, GCS, AZURE, *HTTP)


def check(uri: str, options: StorageOptions) -> None:
    """Refuses options that no storage knows; those of storages which only fsspec knows are its own.

    Raises:
        StorageError: there is one; it tells those that the address takes.
    """
    unknown = sorted(set(options) - frozenset[str]().union(*_NAMES.values()))
    if unknown and has_store(uri):
        protocol = protocol_of(uri)
        names = sorted(_NAMES["http" if protocol in HTTP else protocol] | _NAMES["all"])
        raise StorageError(f"{shown(uri)}: no storage option is called {', '.join(unknown)}; use {', '.join(names)}")


def environment() -> str:
    """The part of the environment that decides what a store is."""
    names = (*_VARIABLES, *s3_settings.CERTIFICATES)
    return repr(sorted((name, value) for name, value in os.environ.items() if name.upper().startswith(names)))


def endpoint(options: StorageOptions) -> str:
    """What tells storages apart that have buckets of one name."""
    variables = sorted(
        (name, value) for name, value in os.environ.items() if "_ENDPOINT" in name or "_BASE_URL" in name
    )
    return repr((options.get("endpoint_url"), variables))


def silence_s(options: StorageOptions) -> float:
    """Seconds without a byte after which a request is sent anew: `timeout_s`.

    Raises:
        StorageError: it is no number.
    """
    given = options.get("timeout_s", _SILENCE_S)
    try:
        seconds = float(given)
    except (TypeError, ValueError):
        seconds = 0.0
    if not seconds > 0:
        raise StorageError(f"storage option timeout_s={given}; give seconds, such as 20")
    return seconds


def object_store(
    root: str, options: StorageOptions, *, uploads: bool = False, region: str | None = None
) -> ObjectStore:
    """The obstore store of a bucket or web host.

    It sends no failed request again by itself: `patience` does, and counts how often. One for `uploads` does so some
    times, or else one part of a thousand that fails would cost them all. `region` is where the bucket was found to lie.

    Raises:
        StorageError: the options make no sense.
    """
    check(root, options)
    protocol, name = root.split("://", 1)
    silence = silence_s(options) * (_UPLOAD_PATIENCE if uploads else 1)
    # `timeout` would bound the whole answer, from connecting to the last byte of the body.
    client: Any = {"allow_http": True, "connect_timeout": "5s", "read_timeout": f"{silence}s", "timeout": "7days"}
    client |= _security(root, options)
    retry: Any = {"max_retries": 3 if uploads else 0}
    if protocol in HTTP:
        headers = options.get("headers", {})
        if not isinstance(headers, Mapping):
            raise StorageError("storage option headers holds names and values; give it in a YAML file, or from Python")
        client["default_headers"] = dict(cast(Mapping[str, str], headers))
        query = str(options.get("query", "")).lstrip("?")
        url = root if not query else f"{root}{'&' if '?' in root else '?'}{query}"
        return HTTPStore.from_url(url, client_options=client, retry_config=retry)
    if protocol == GCS:
        client["default_headers"] = cloud_settings.gcs_headers(options)
        config = cloud_settings.gcs_config(options)
        # To write, obstore asks for credentials whatever `skip_signature` says; who takes none takes any.
        nobody: Any = (lambda: {"token": "nobody", "expires_at": None}) if config.get("skip_signature") else None
        return GCSStore(
            name,
            config=cast(Any, config),
            client_options=client,
            retry_config=retry,
            credential_provider=nobody if uploads else None,
        )
    if protocol == AZURE:
        config = cloud_settings.azure_config(cloud_settings.of_account(root, options))
        return AzureStore(name, config=cast(Any, config), client_options=client, retry_config=retry)
    settings = s3_settings.settings(options, region)
    if proxy := settings.proxy:
        client.setdefault("proxy_url", proxy)
    return S3Store(
        name,
        config=cast(Any, settings.store_config(name)),
        credential_provider=settings.credentials(),
        client_options=client,
        retry_config=retry,
    )


def _security(root: str, options: StorageOptions) -> dict[str, Any]:
    """Whom a client trusts, and through whom it asks. Proxies that variables name are obstore's own business."""
    proxy = options.get("proxy")
    found: dict[str, Any] = {"proxy_url": s3_settings.with_protocol(str(proxy))} if proxy else {}
    trusted = options.get("verify")
    if trusted is None:
        trusted = s3_settings.authorities(options) if root.startswith(f"{S3}://") else s3_settings.certificates()
    if trusted is False:
        return found | {"allow_invalid_certificates": True}
    if trusted is None or trusted is True:
        return found
    try:
        with open(os.path.expanduser(str(trusted)), encoding="ascii", errors="replace") as file:
            return found | {"root_certificate": file.read()}
    except OSError as error:
        reason = error.strerror or "can't be read"
        raise StorageError(f"{trusted}: {reason}; verify= or AWS_CA_BUNDLE names a file of certificates") from error
