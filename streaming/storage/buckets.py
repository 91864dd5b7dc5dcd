"""What a process has open to its object stores: a bucket (or web host) each, asked patiently."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from obstore.store import ObjectStore

from streaming.secrets import revealed
from streaming.storage import addresses, clients, s3_settings, trouble
from streaming.storage.brake import Brake
from streaming.storage.patience import Patience, Tries

T = TypeVar("T")


class Bucket:
    """A bucket or web host with the options it is asked with. Safe to use from several threads."""

    def __init__(self, root: str, options: clients.StorageOptions) -> None:
        self.root, self.options = root, options
        self._patience, self._lock = Patience(Brake(f"{root} {clients.endpoint(options)}")), threading.Lock()
        self._region: str | None = None
        self._stores: dict[bool, ObjectStore] = {}
        self._settings: s3_settings.S3Settings | None = None
        self._client: Any = None

    @property
    def store(self) -> ObjectStore:
        """obstore's, which holds connections and credentials; another one after these were renewed.

        Raises:
            StorageError: the options make no sense, or there are no credentials.
        """
        # Each range asks: no lock where there is one.
        return self._stores.get(False) or self._made(uploads=False)

    @property
    def uploads(self) -> ObjectStore:
        """The same for uploads in parts."""
        return self._stores.get(True) or self._made(uploads=True)

    @property
    def s3_client(self) -> Any:
        """Botocore's client of an S3 bucket, for keys that obstore can't ask for, and for listings with such."""
        with self._lock:
            if self._client is None:
                self._client = self._s3().client(clients.silence_s(self.options))
            return self._client

    def s3_object(self, **what: str) -> dict[str, str]:
        """What a request of that client names: the bucket, what else is given, and who pays."""
        with self._lock:
            payer = {"RequestPayer": "requester"} if self._s3().requester_pays else {}
        return {"Bucket": self.root.split("://", 1)[1], **what, **payer}

    def _s3(self) -> s3_settings.S3Settings:
        if self._settings is None:
            clients.check(self.root, self.options)
            self._settings = s3_settings.settings(self.options, self._region)
        return self._settings

    def ask(self, uri: str, call: Callable[[], T]) -> tuple[T, Tries]:
        """What a call to this bucket brings, and what that took, as `Patience.ask` tells.

        Raises:
            StorageError: it can't be had.
        """
        return self._patience.ask(uri, call, self._mend)

    def _made(self, *, uploads: bool) -> ObjectStore:
        with self._lock:
            if uploads not in self._stores:
                self._stores[uploads] = clients.object_store(
                    self.root, self.options, uploads=uploads, region=self._region
                )
            return self._stores[uploads]

    def _mend(self, error: BaseException) -> bool:
        """Has the next call read the credentials anew where they ended, or go to the region where the bucket lies."""
        if self.root.startswith(f"{addresses.S3}://") and trouble.is_elsewhere(error):
            found = s3_settings.settings(self.options).region_of(self.root.split("://", 1)[1])
            if found is None or found == self._region:
                return False
            self._region = found
        elif not trouble.has_expired(error):
            return False
        with self._lock:
            self._stores, self._client, self._settings = {}, None, None
        return True


_BUCKETS: dict[tuple[str, str], Bucket] = {}


def bucket_at(uri: str, options: clients.StorageOptions | None) -> tuple[Bucket, str]:
    """The bucket of a remote URI, one for each set of options, and the key within."""
    root, key = addresses.split(uri)
    options = revealed(options or {})
    known = (root, repr(sorted(options.items(), key=str)) + clients.environment())
    # Of two threads that come at once, both take the first.
    return _BUCKETS.setdefault(known, Bucket(root, options)), key
