"""How an address is spelled: the one place that takes addresses apart, makes them alike, and hides what is secret.

An address is a local path or `protocol://…`. S3's, Azure's and Google's name a bucket and a key, which is taken as it
stands: `%20`, `#`, `?` and `+` are characters of it. An HTTP address is a URL: `%20` stands for a space, what follows
`?` is a query. A query or `user:password@` in it may be a secret, so `shown` leaves them out wherever it is told.
"""

from __future__ import annotations

import os
import posixpath
import re
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from streaming.errors import EMPTY_ADDRESS, ConfigError
from streaming.secrets import without_login

S3, GCS, AZURE = "s3", "gs", "az"
HTTP = ("http", "https")
# Those of fsspec's packages that mean the same.
_SPELLINGS = {"s3a": S3, "gcs": GCS, "abfs": AZURE, "abfss": AZURE}
# What obstore takes for no part of a path.
_ODD_PART = re.compile(r"[\x00-\x1f\x7f]|^\.{0,2}$")

_NAME_NBYTES = 200


def is_local(uri: str) -> bool:
    """Whether a URI names a path on this machine."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def local_path(uri: str) -> str:
    """The absolute path of a local URI.

    Raises:
        ConfigError: it is empty.
    """
    if not uri:  # it would name the folder that a command happens to run in
        raise ConfigError(EMPTY_ADDRESS)
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://").removeprefix("local://")))


def protocol_of(uri: str) -> str:
    """The protocol of a URI, of several spellings always the same one; `file` of a local path."""
    if is_local(uri):
        return "file"
    protocol = uri.split("://", 1)[0].lower()
    return _SPELLINGS.get(protocol, protocol)


def canonical(uri: str) -> str:
    """The same address in one spelling: local paths absolute, no trailing slash, `abfs://` is `az://`."""
    if is_local(uri):
        return local_path(uri)
    protocol = protocol_of(uri)
    rest = uri.split("://", 1)[1]
    if protocol in HTTP:
        # A raw space or `#` is meant as a character, and `%20` says the same as a space.
        rest, question, query = rest.partition("?")
        parts = [quote(unquote(part), safe="@:!$&'()*+,;=~") for part in rest.split("/")[1:]]
        rest = "/".join([rest.split("/")[0], *parts])
        if question:
            return f"{protocol}://{rest}?{query}"
    return f"{protocol}://{rest.rstrip('/')}"


def shown(uri: str) -> str:
    """An address as messages, logs and files may tell it: without query and password."""
    if is_local(uri):
        return uri
    if protocol_of(uri) not in HTTP:
        return without_login(uri)
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", parts.fragment))


def has_secret(uri: str) -> bool:
    """Whether `shown` leaves something out."""
    return uri != shown(uri)


def split(uri: str) -> tuple[str, str]:
    """A remote URI as what one store serves (a bucket, a host) and the key within.

    An HTTP address that a host's store could not ask for as it stands (a query, an empty part, an encoded slash) is a
    store of its own, and the key empty.
    """
    uri = canonical(uri)
    protocol, rest = uri.split("://", 1)
    root, _, key = rest.partition("/")
    if protocol not in HTTP:
        return f"{protocol}://{root}", key
    key = unquote(key)
    if has_secret(uri) or "?" in uri or not is_plain(key) or key.count("/") != rest.count("/") - 1:
        return uri, ""
    return f"{protocol}://{root}", key


def is_plain(key: str) -> bool:
    """Whether obstore can ask for a key: no part of it is empty, `.` or `..`, and there is no control character."""
    return not key or not any(_ODD_PART.search(part) for part in key.split("/"))


def join(uri: str, *names: str) -> str:
    """A URI below another; below an empty one, as the folder of a relative path is, just the names."""
    return posixpath.join(uri.rstrip("/") or uri[:1], *names)


def folder_of(uri: str) -> str:
    """The folder that a file's URI names it in; of S3's `a//b`, `a/`."""
    return uri.rpartition("/")[0]


def beside(uri: str, name: str) -> str:
    """The URI of a file in the folder of another one."""
    return f"{folder_of(uri)}/{name}"


def shortened(name: str) -> str:
    """The beginning of a name that has room for what is put behind it: most disks allow 255 bytes."""
    return name.encode()[:_NAME_NBYTES].decode(errors="ignore")


def name_of(uri: str) -> str:
    """The last part of a URI: a file's name with its suffix."""
    name = posixpath.basename(shown(uri).rstrip("/"))
    return unquote(name).replace("/", "%2F") if protocol_of(uri) in HTTP else name
