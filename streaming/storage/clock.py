"""What time it is where the storage is: it refuses signatures of clocks that are minutes off."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime

from streaming.errors import StorageError
from streaming.secrets import revealed
from streaming.storage import addresses, cloud_settings, s3_settings
from streaming.storage.clients import StorageOptions


def clock_skew(uri: str, storage_options: StorageOptions | None = None) -> float:
    """Seconds by which this machine's clock is ahead of a remote URI's storage, by its `Date` header (whole seconds).

    Raises:
        StorageError: it does not answer, or tells no time.
    """
    address = _endpoint(uri, revealed(storage_options or {}))
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


def _endpoint(uri: str, options: StorageOptions) -> str:
    """The HTTP address of the storage behind a URI."""
    protocol = addresses.protocol_of(uri)
    if protocol in addresses.HTTP:
        return "/".join(addresses.shown(uri).split("/")[:3])
    if protocol == addresses.GCS:
        return cloud_settings.gcs_endpoint(options)
    if protocol == addresses.AZURE:
        return cloud_settings.azure_endpoint(options)
    settings = s3_settings.settings(options)
    return settings.endpoint or f"https://s3.{settings.region}.amazonaws.com"
