"""What options, variables and profiles say of S3, as botocore finds it and as obstore wants it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from botocore import UNSIGNED
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, NoCredentialsError, ProfileNotFound
from botocore.httpsession import URLLib3Session
from botocore.session import Session
from botocore.utils import get_environ_proxies

from streaming.errors import StorageError

if TYPE_CHECKING:
    from obstore.store import S3Credential  # there is none at run time

Options = Mapping[str, Any]

OPTIONS = frozenset(
    {"key", "secret", "token", "profile", "anon", "region", "endpoint_url", "addressing_style", "requester_pays"}
    | {"client_kwargs", "config_kwargs"}
)
# What these two of s3fs's may hold: what else they could say reaches no request.
_CLIENT = frozenset({"region_name", "endpoint_url", "verify"})
_CONFIG = frozenset({"region_name", "proxies", "s3"})
CERTIFICATES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_STYLES = ("auto", "path", "virtual")
# botocore renews what ends within ten minutes before it hands it out, so that this may be kept for less.
_KEPT_FOR = timedelta(minutes=5)


class _Credentials:
    """What obstore asks for credentials. It asks again every few minutes: botocore knows when they end."""

    # obstore would renew what ends within five minutes, which is all that this tells.
    refresh_threshold = timedelta(0)

    def __init__(self, session: Session) -> None:
        self._found: Any = session.get_credentials()
        if self._found is None:
            raise NoCredentialsError

    def __call__(self) -> S3Credential:
        now = self._found.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _KEPT_FOR,
        }


@dataclass(frozen=True, kw_only=True)
class S3Settings:
    """All that a request to S3 depends on."""

    session: Session
    anon: bool
    region: str
    endpoint: str | None
    virtual: bool
    """whether the bucket is a part of the host's name"""
    requester_pays: bool
    proxy: str | None
    verify: Any

    def store_config(self, bucket: str) -> dict[str, Any]:
        """Obstore's configuration."""
        config: dict[str, Any] = {"region": self.region, "virtual_hosted_style_request": self.virtual}
        if self.endpoint:
            scheme, host = self.endpoint.split("://", 1)
            config["endpoint"] = f"{scheme}://{bucket}.{host}" if self.virtual else self.endpoint
        config["skip_signature"] = self.anon
        if self.requester_pays:
            config["request_payer"] = True
        return config

    def credentials(self) -> Any:
        """Obstore's provider of credentials; None where requests are not signed.

        Raises:
            NoCredentialsError: there are none.
        """
        return None if self.anon else _Credentials(self.session)

    def client(self, timeout_s: float) -> Any:
        """Botocore's client, which tries nothing again."""
        self.credentials()
        proxies = {"http": self.proxy, "https": self.proxy} if self.proxy else None
        config = Config(
            connect_timeout=5,
            read_timeout=timeout_s,
            retries={"total_max_attempts": 1},
            proxies=proxies,
            s3={"addressing_style": "virtual" if self.virtual else "path"},
            max_pool_connections=32,
            **({"signature_version": UNSIGNED} if self.anon else {}),
        )
        return self.session.create_client(
            "s3", region_name=self.region, endpoint_url=self.endpoint, verify=self.verify, config=config
        )

    def region_of(self, bucket: str) -> str | None:
        """Where S3 says that a bucket lies, which it tells whoever asks."""
        url = f"{self.endpoint or 'https://s3.amazonaws.com'}/{bucket}"
        proxies = {"http": self.proxy, "https": self.proxy} if self.proxy else get_environ_proxies(url)
        asked = URLLib3Session(verify=True if self.verify is None else self.verify, proxies=proxies, timeout=10)
        try:
            return asked.send(AWSRequest("HEAD", url).prepare()).headers.get("x-amz-bucket-region")
        except BotoCoreError:
            return None


def settings(options: Options, region: str | None = None) -> S3Settings:
    """What options say, then variables, then the profile; `region` goes before all.

    Raises:
        StorageError: an option is not known or makes no sense, or there is no such profile.
    """
    client, config = _inner(options, "client_kwargs", _CLIENT), _inner(options, "config_kwargs", _CONFIG)
    session = _session(options)
    profile = _profile(session)
    of_s3: dict[str, Any] = {**_section(profile, "s3"), **dict(config.get("s3", {}))}
    if _true(of_s3.get("use_accelerate_endpoint")) or _true(of_s3.get("use_dualstack_endpoint")):
        raise StorageError("s3://: accelerated and dual-stack endpoints are not supported; give endpoint_url instead")
    style = str(options.get("addressing_style") or of_s3.get("addressing_style") or "auto")
    if style not in _STYLES:
        raise StorageError(f"s3://: addressing_style={style}; use {', '.join(_STYLES)}")
    proxies: Mapping[str, Any] = config.get("proxies", {})
    proxy = options.get("proxy") or proxies.get("https") or proxies.get("http")
    return S3Settings(
        session=session,
        anon=_true(options.get("anon")) or _true(os.environ.get("AWS_SKIP_SIGNATURE")),
        region=str(
            region
            or options.get("region")
            or client.get("region_name")
            or config.get("region_name")
            or os.environ.get("AWS_REGION")
            or session.get_config_variable("region")
            or "us-east-1"
        ),
        endpoint=_endpoint(options, client, session, profile),
        virtual=style == "virtual",
        requester_pays=_true(options.get("requester_pays")) or _true(os.environ.get("AWS_REQUEST_PAYER")),
        proxy=with_protocol(str(proxy)) if proxy else None,
        verify=authorities(options),
    )


def authorities(options: Options) -> Any:
    """Who may vouch for a server's certificate: a file's path, False for anybody, None for those of the system."""
    for found in (options.get("verify"), _inner(options, "client_kwargs", _CLIENT).get("verify")):
        if found is not None:
            return found
    # A variable that botocore reads itself, and the profile's `ca_bundle`.
    return _session(options).get_config_variable("ca_bundle") or certificates()


def with_protocol(proxy: str) -> str:
    """A proxy's address in full: of another one, messages would not know a password in it."""
    return proxy if "://" in proxy else f"http://{proxy}"


def certificates() -> str | None:
    """The file of certificates that variables name which are not S3's alone."""
    return next((os.environ[name] for name in CERTIFICATES if os.environ.get(name)), None)


def _session(options: Options) -> Session:
    session = Session(profile=options.get("profile"))
    try:
        _profile(session)
    except ProfileNotFound as error:
        raise StorageError(f"s3://: {error}; see ~/.aws/config, AWS_PROFILE and the option profile") from error
    if bool(options.get("key")) != bool(options.get("secret")):
        raise StorageError("s3://: of the storage options key and secret only one is given; give both")
    if options.get("key"):
        session.set_credentials(options["key"], options["secret"], options.get("token"))
    return session


def _profile(session: Session) -> dict[str, Any]:
    return cast("dict[str, Any]", session.get_scoped_config())


def _section(profile: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = profile.get(name, {})
    return cast("dict[str, Any]", dict(found)) if isinstance(found, Mapping) else {}


def _endpoint(options: Options, client: Options, session: Session, profile: Mapping[str, Any]) -> str | None:
    given = options.get("endpoint_url") or client.get("endpoint_url")
    if not given and not _true(session.get_config_variable("ignore_configured_endpoint_urls")):
        services = cast("dict[str, Any]", session.full_config.get("services", {}))
        of_service = services.get(str(profile.get("services")), {}).get("s3", {})
        given = (
            os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL")
            or of_service.get("endpoint_url")
            or profile.get("endpoint_url")
        )
    if given and "://" not in str(given):
        raise StorageError("s3://: endpoint_url begins with http:// or https://")
    return str(given).rstrip("/") if given else None


def _inner(options: Options, name: str, known: frozenset[str]) -> Mapping[str, Any]:
    found: Any = options.get(name) or {}
    if not isinstance(found, Mapping):
        raise StorageError(f"s3://: storage option {name} holds names and values ({', '.join(sorted(known))})")
    unknown = sorted(set(cast("Mapping[str, Any]", found)) - known)
    if unknown:
        raise StorageError(
            f"s3://: storage option {name} knows no {', '.join(unknown)}; use {', '.join(sorted(known))}, "
            "or options of their own such as timeout_s"
        )
    return cast("Mapping[str, Any]", found)


def _true(value: Any) -> bool:
    return str(value or "").lower() in ("true", "1", "yes", "requester")
