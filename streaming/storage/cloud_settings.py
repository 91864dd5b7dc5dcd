"""What `storage_options` and the environment say of Azure and Google, as obstore wants it.

Options go before the environment, a connection string before single values. Nothing is asked for over the network here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from streaming.errors import StorageError

Options = Mapping[str, Any]

# obstore's name of a setting: the names of adlfs's option, then the variables.
_AZURE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "account_name": (("account_name",), ("AZURE_STORAGE_ACCOUNT_NAME",)),
    "account_key": (("account_key",), ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY")),
    "sas_key": (("sas_token",), ("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY")),
    "endpoint": (("endpoint_url", "account_host"), ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")),
    "client_id": (("client_id",), ("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID")),
    "client_secret": (("client_secret",), ("AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET")),
    "tenant_id": (("tenant_id",), ("AZURE_STORAGE_TENANT_ID", "AZURE_TENANT_ID")),
}
AZURE_OPTIONS = frozenset({name for names, _ in _AZURE.values() for name in names} | {"connection_string", "anon"})
GCS_OPTIONS = frozenset({"token", "endpoint_url", "project", "requester_pays", "anon"})
# Ways of gcsfs to find credentials, which obstore goes through by itself.
_GCS_SEARCHES = ("google_default", "cache", "cloud", "browser")


def of_account(uri: str, options: Options) -> Options:
    """The options of an Azure URI, which names the container alone.

    Raises:
        StorageError: it names an account.
    """
    if "@" in uri.split("://", 1)[1].partition("/")[0]:
        raise StorageError(f"{uri}: names an account; write az://container/… and set AZURE_STORAGE_ACCOUNT_NAME")
    return options


def azure_config(options: Options) -> dict[str, Any]:
    """The configuration of an obstore AzureStore.

    Raises:
        StorageError: no account is named, or the connection string is none.
    """
    variables = {key: _first(os.environ, names) for key, (_, names) in _AZURE.items()}
    given = {key: _first(options, names) for key, (names, _) in _AZURE.items()}
    layers = (
        variables,
        _of_connection_string(os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")),
        given,
        _of_connection_string(str(options.get("connection_string") or "")),
    )
    config: dict[str, Any] = {key: value for layer in layers for key, value in layer.items() if value}
    if "account_name" not in config:
        raise StorageError(
            "az://: no storage account is named; set AZURE_STORAGE_ACCOUNT_NAME or AZURE_STORAGE_CONNECTION_STRING, "
            "or give account_name in the storage options"
        )
    if "endpoint" in config and "://" not in config["endpoint"]:
        config["endpoint"] = f"https://{config['endpoint']}"
    if options.get("anon"):
        config["skip_signature"] = True
    return config


def azure_endpoint(options: Options) -> str:
    """The HTTP address of the account.

    Raises:
        StorageError: as azure_config.
    """
    config = azure_config(options)
    return str(config.get("endpoint") or f"https://{config['account_name']}.blob.core.windows.net")


def gcs_config(options: Options) -> dict[str, Any]:
    """The configuration of an obstore GCSStore.

    Raises:
        StorageError: the token names no file.
    """
    endpoint, token = _gcs_endpoint(options), _gcs_token(options)
    config: dict[str, Any] = {"base_url": endpoint} if endpoint else {}
    if token == "anon":
        config["skip_signature"] = True
    elif isinstance(token, Mapping):
        config["service_account_key"] = json.dumps(dict(token))
    elif token and token not in _GCS_SEARCHES:
        path = os.path.expanduser(str(token))
        if options.get("token") and not os.path.isfile(path):  # the secret itself, which no message may show
            raise StorageError(
                "gs://: the storage option token names no file; give the path of a credentials file, or anon"
            )
        config["application_credentials"] = path
    return config


def gcs_headers(options: Options) -> dict[str, str]:
    """Headers of each request: who pays for it."""
    payer = options.get("requester_pays")
    payer = options.get("project") if payer is True else payer
    return {"x-goog-user-project": str(payer)} if payer else {}


def gcs_endpoint(options: Options) -> str:
    """The HTTP address of the storage."""
    return _gcs_endpoint(options) or "https://storage.googleapis.com"


def _gcs_endpoint(options: Options) -> str | None:
    found = options.get("endpoint_url") or _first(os.environ, ("GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"))
    return None if not found else str(found) if "://" in str(found) else f"http://{found}"


def _gcs_token(options: Options) -> Any:
    """Path or content of a credentials file, "anon", or one of gcsfs's searches; None for the usual search."""
    names = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_APPLICATION_CREDENTIALS")
    token = "anon" if options.get("anon") else options.get("token") or _first(os.environ, names)
    # With an endpoint of one's own there is nothing to search for: that would ask Google's servers for credentials.
    return token or ("anon" if _gcs_endpoint(options) else None)


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name)), None)


def _of_connection_string(text: str) -> dict[str, Any]:
    """Its settings by obstore's names, as the portal of Azure writes one."""
    pairs = [part.split("=", 1) for part in text.strip().split(";") if part]
    if any(len(pair) != 2 for pair in pairs):
        raise StorageError("az://: the connection string is not a row of Name=value; copy it anew from the portal")
    found = {name.lower(): value for name, value in pairs}
    account, suffix = found.get("accountname"), found.get("endpointsuffix")
    endpoint = found.get("blobendpoint")
    if not endpoint and account and suffix:
        endpoint = f"{found.get('defaultendpointsprotocol', 'https')}://{account}.blob.{suffix}"
    if endpoint and not account:
        # A string of a shared access signature names no account: its host begins with it.
        account = endpoint.split("://", 1)[-1].split(".", 1)[0]
    return {
        "account_name": account,
        "account_key": found.get("accountkey"),
        "sas_key": found.get("sharedaccesssignature"),
        "endpoint": endpoint,
    }
