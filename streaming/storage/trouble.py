"""Which errors of a storage pass, and what is said of each: the one place that decides it.

All that storages, their libraries and this machine's network raise passes, and is asked for again (`patience`), except
what `_LASTING` lists. Of an answer, its status and content decide, whichever library asked.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Generator
from dataclasses import dataclass

import obstore.exceptions
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from streaming.errors import DeniedError, MissingError, NoRangesError, StorageError, TilestreamError, UnreachableError
from streaming.secrets import without_secrets
from streaming.storage.addresses import AZURE, GCS, S3, is_local, protocol_of, shown

_STATUS = re.compile(r"status code: (\d{3})")
_FOREIGN = ("aiohttp", "fsspec", "ftplib", "http", "paramiko", "requests", "smbprotocol", "urllib3")
# Errors of local disks that are really of a network's: NFS, FUSE.
_FILES_PASS = {errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.EREMOTEIO}
_ENVIRONMENT = {
    S3: "AWS_ENDPOINT_URL, AWS_REGION",
    AZURE: "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT, the key",
    GCS: "GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_BASE_URL",
}
_CREDENTIALS = {
    S3: "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    AZURE: "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_CONNECTION_STRING",
    GCS: "GOOGLE_APPLICATION_CREDENTIALS",
}


@dataclass(frozen=True)
class _Rule:
    """Errors of one kind: where all that is given fits. The first rule that fits decides."""

    what: str
    """what is said, with the error's own text in place of `{text}`"""
    status: str = ""
    """of the answer, as a regular expression"""
    text: str = ""
    """somewhere in the error, as a regular expression"""
    kind: tuple[type[BaseException], ...] = ()
    told_as: type[StorageError] = StorageError

    @property
    def passes(self) -> bool:
        """Whether it is worth to ask again."""
        return issubclass(self.told_as, UnreachableError)


_EXPIRED = _Rule(
    "the credentials have expired or the clock is off; renew them, compare the clock ({text})",
    text=r"ExpiredToken|TokenRefreshRequired|RequestTimeTooSkewed|ExpiredAuthenticationToken|token is expired",
    told_as=UnreachableError,
)
_ELSEWHERE = _Rule(
    "the bucket lies in another region; set region={region} or AWS_REGION={region}",
    text="Received redirect without LOCATION|PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint",
)
_NO_CREDENTIALS = _Rule(
    # Asked for them, a machine's own service may be slow to answer.
    "no credentials were found; set {credentials}, or give them as storage options ({text})",
    text=r"metadata\.google\.internal|169\.254\.169\.254|Error getting credentials|token request",
    told_as=UnreachableError,
)
_NOT_FOUND = "not found; check the address{endpoint}"
_DENIED = "access denied; check the credentials and their rights"
_RULES = (
    _EXPIRED,
    _ELSEWHERE,
    _NO_CREDENTIALS,
    _Rule(
        "no credentials; set {credentials}, or give them as storage options ({text})",
        kind=(NoCredentialsError, PartialCredentialsError),
    ),
    _Rule(
        "the bucket does not exist; check the address and the endpoint",
        text="NoSuchBucket|bucket does not exist|no bucket named|ContainerNotFound|container does not exist",
        told_as=MissingError,
    ),
    _Rule("a pipe, a socket or a device; name a file", text="no file, but a pipe", kind=(OSError,)),
    _Rule(_NOT_FOUND, kind=(FileNotFoundError, NotADirectoryError), told_as=MissingError),
    _Rule(_NOT_FOUND, status="404|410", told_as=MissingError),
    _Rule(_DENIED, status="401|403", told_as=DeniedError),
    _Rule(f"{_DENIED} ({{text}})", kind=(PermissionError,), told_as=DeniedError),
    _Rule(
        _DENIED,
        kind=(obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError),
        told_as=DeniedError,
    ),
    # A request that took too long, came too early, or too often may be answered the next time.
    _Rule("{text}; check {settings}", status="4(?!08|25|29|99)..|501|505"),
    _Rule(
        "the server's certificate is not trusted; name its authority's file by verify=… or AWS_CA_BUNDLE",
        text=r"InvalidCertificate\(|invalid peer certificate|CERTIFICATE_VERIFY_FAILED|certificate verify failed",
    ),
    _Rule(
        "the server answers no byte ranges, or not what was asked for ({text})",
        kind=(obstore.exceptions.NotSupportedError, NotImplementedError),
        told_as=NoRangesError,
    ),
    _Rule(
        "{text}; check {settings}",
        # A key, a signature or a proxy that is none; nobody was asked.
        text=r"Invalid Access Key|[Uu]nable to (?:open|read|decode|parse|extract) |Missing \w+ name|configuration key|"
        r"Missing component|CryptoProvider error|client error: builder error",
        kind=(obstore.exceptions.BaseError,),
    ),
    _Rule("is no address that can be asked for ({text})", kind=(obstore.exceptions.InvalidPathError, ValueError)),
)
_UNREACHABLE = _Rule("{text}; check {settings} and the network", told_as=UnreachableError)
_DISK = _Rule("{text}; check that the storage answers and has room")
_NETWORK_DISK = _Rule("{text}; check that the storage answers", told_as=UnreachableError)


def passes(error: BaseException) -> bool:
    """Whether what failed so may succeed when it is asked for again. Errors that no storage raises never pass."""
    if isinstance(error, TilestreamError):
        return isinstance(error, UnreachableError)
    return _is_of_storage(error) and _rule(error).passes


def throttles(error: BaseException) -> bool:
    """Whether a storage that answers says that it is asked too much."""
    return _status(error) in ("429", "503")


def takes_no_conditions(error: BaseException) -> bool:
    """Whether a storage that was to write an object if it is as it was knows of no such thing."""
    return _status(error) == "501"


def has_expired(error: BaseException) -> bool:
    """Whether new credentials would help."""
    return _rule(error) is _EXPIRED


def is_elsewhere(error: BaseException) -> bool:
    """Whether the bucket lies in another region."""
    return _rule(error) is _ELSEWHERE


def answered(error: BaseException) -> bool:
    """Whether the storage was reached: whoever it was, somebody answered."""
    rule = _rule(error)
    return rule is not _NO_CREDENTIALS and (_status(error) != "" or rule is _ELSEWHERE or rule.told_as is MissingError)


@contextlib.contextmanager
def storage_errors(uri: str) -> Generator[None]:
    """Turns what storage libraries raise into a StorageError of one line: an UnreachableError if it may pass."""
    try:
        yield
    except TilestreamError:
        raise
    except Exception as error:
        if not _is_of_storage(error):
            raise
        told = as_told(uri, error)
        # A traceback would show the first error's text, too.
        raise told from (error if without_secrets(str(error)) == str(error) else None)


def as_told(uri: str, error: BaseException) -> StorageError:
    """A storage's error as one line: address, what is wrong, what to do."""
    rule, protocol = _rule(error, uri), protocol_of(uri)
    elsewhere = re.search(r"expecting '([\w-]+)'", str(error))
    said = rule.what.format(
        text=_said(error),
        region=elsewhere[1] if elsewhere else "(the bucket's)",
        settings=settings_of(uri),
        endpoint="" if is_local(uri) else " and the endpoint",
        credentials=_CREDENTIALS.get(protocol, "them"),
    )
    return rule.told_as(f"{shown(uri)}: {said}")


def settings_of(uri: str) -> str:
    """The variables that say where a URI's storage is."""
    return _ENVIRONMENT.get(protocol_of(uri), "the address")


def _is_of_storage(error: BaseException) -> bool:
    """Whether a storage, its library or the network raised it, rather than this program."""
    if isinstance(error, (OSError, obstore.exceptions.BaseError, BotoCoreError, ClientError, NotImplementedError)):
        return True
    # Packages behind fsspec's, which may not be installed: their errors are known by where they come from.
    foreign = type(error).__module__.partition(".")[0] in _FOREIGN
    return foreign or (type(error) is ValueError and "parse path" in str(error))


def _rule(error: BaseException, uri: str = "") -> _Rule:
    status, text = _status(error), f"{error!r} {error}"
    for rule in _RULES:
        if rule.kind and not isinstance(error, rule.kind):
            continue
        if rule.status and not re.fullmatch(rule.status, status):
            continue
        if rule.text and not re.search(rule.text, text):
            continue
        return rule
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        if error.errno in _FILES_PASS:
            return _NETWORK_DISK
        # What fsspec's packages raise for remote storage has no number of this machine's disks.
        if error.errno is not None and (not uri or is_local(uri) or error.errno == errno.ENOSPC):
            return _DISK
    return _UNREACHABLE


def _status(error: BaseException) -> str:
    """The status that a server answered with; none where none did."""
    if isinstance(error, ClientError):
        return str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    found = _STATUS.search(str(error)) if isinstance(error, (obstore.exceptions.BaseError, OSError)) else None
    return found[1] if found else str(getattr(error, "status", "") or "")


def _said(error: BaseException) -> str:
    """An error's own words, in one line without its debugging output, and without secrets."""
    text, _, detail = str(error).partition("Debug source")
    text = " ".join(text.split()) or type(error).__name__
    # obstore says "error sending request", and leaves to the debugging output why.
    why = [one or two for one, two in re.findall(r'(?:message|error): "([^"]+)"|kind: (\w+)', detail)]
    if text.startswith("Generic ") and "HTTP error" in text and why:
        text = f"{text} ({'no byte came for timeout_s' if why[0] == 'Timeout' else why[-1]})"
    return without_secrets(text)[:400]
