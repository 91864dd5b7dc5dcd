"""Where an address is read: at itself, or in a mirror of its bucket.

A slide is called by one address for ever, `s3://idc-open-data/…`, wherever its bytes come from: so plans, digests and
checkpoints do not depend on mirrors. `mirrors` among the storage options maps the beginning of an address to another
one (`gs://idc-open-data`, `/data/idc`), which may bring options of its own: `s3://copy?endpoint_url=http://…&anon=true`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl

from streaming.mirrors import default_mirrors
from streaming.secrets import hidden, revealed
from streaming.storage.addresses import canonical
from streaming.storage.clients import StorageOptions
from streaming.storage.object_info import ObjectInfo
from streaming.storage.objects import stat

# Buckets that anybody may read, all in us-east-1; of the first, a key's content never changes (a revised series has a
# new one), of the second neither (a file has the uuid that the GDC gave it).
_PUBLIC = {
    "s3://idc-open-data": {"anon": True, "region": "us-east-1"},
    "s3://tcga-2-open": {"anon": True, "region": "us-east-1"},
    "gs://idc-open-data": {"token": "anon"},
}
_CREDENTIALS = ("anon", "key", "profile", "token")


BY_SIZE = ""
"""The version of an object whose size tells it"""


@dataclass(frozen=True)
class Place:
    """Where an address is read."""

    uri: str
    options: StorageOptions
    by_size: bool
    """whether its size alone tells its version: two mirrors have different tags for one object"""

    source: str = ""
    """the beginning of addresses that a mirror serves"""
    target: str = ""
    """what it begins with there"""

    def there(self, file: ObjectInfo) -> ObjectInfo:
        """A file of its own address as it is read."""
        return replace(file, uri=self.target + file.uri.removeprefix(self.source))

    def named(self, file: ObjectInfo) -> ObjectInfo:
        """A file that was found there by its own address, and with its version told by its size where need be."""
        return replace(
            file,
            uri=self.source + file.uri.removeprefix(self.target),
            version=BY_SIZE if self.by_size else file.version,
            files=tuple(map(self.named, file.files)),
        )


def place_of(uri: str, options: StorageOptions | None = None) -> Place:
    """Where an address is read, by the mirrors among the options (else those of the environment).

    Raises:
        ConfigError: the environment's make no sense.
    """
    rest = dict(options or {})
    mirrors: Mapping[str, str] = revealed({"mirrors": rest.pop("mirrors", None)})["mirrors"] or default_mirrors()
    source = max((name for name in mirrors if _is_below(uri, name)), key=len, default=None)
    if source is None:
        return Place(uri, _of_public(uri, rest), any(_is_below(uri, name) for name in _PUBLIC))
    address, _, own = mirrors[source].partition("?")
    source, target = source.rstrip("/"), canonical(address)
    at = target + uri.removeprefix(source)
    return Place(at, _of_public(at, {**rest, **hidden(_options_of(own))}), True, source, target)


def identified(uri: str, options: StorageOptions | None = None) -> ObjectInfo:
    """Size and version of an object, by its own address wherever it is read.

    Raises:
        StorageError: it does not exist or can't be reached.
    """
    place = place_of(uri, options)
    return place.named(stat(place.uri, place.options))


def _is_below(uri: str, prefix: str) -> bool:
    return f"{uri}/".startswith(prefix.rstrip("/") + "/")


def _of_public(uri: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, and that nobody signs in, where anybody may read and the user has given no credentials."""
    own = next((own for name, own in _PUBLIC.items() if _is_below(uri, name)), None)
    return options if own is None or any(name in options for name in _CREDENTIALS) else {**own, **options}


def _options_of(query: str) -> dict[str, Any]:
    return {key: {"true": True, "false": False}.get(value.lower(), value) for key, value in parse_qsl(query)}
