"""What is secret, in storage options and in texts: it reaches the storage, and no file, report, log, event or error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

# What says where a storage is and how it is asked; whatever else is given may open it.
_PUBLIC = frozenset(
    {"account_host", "account_name", "addressing_style", "anon", "endpoint_url", "profile", "project", "region"}
    | {"requester_pays", "timeout_s", "verify"}
)
_QUERY = re.compile(r"(https?://[^\s?\"'<>]*)\?[^\s\"'<>)]*?(?=[:;,.]*(?:[\s\"'<>)]|$))", re.IGNORECASE)
# Of `sftp://user@host/…` the user is no secret; of `abfss://container@account/…` there is none.
_LOGIN = re.compile(
    r"(https?://(?=[^\s/@\"'<>]+@)|\w+://(?=[^\s/@:\"'<>]*:[^\s/@\"'<>]+@))[^\s/@\"'<>]+@", re.IGNORECASE
)


class Secret:
    """A value that shows itself to nobody who does not ask for it by name."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.value == self.value

    def __hash__(self) -> int:
        return hash(repr(self.value))

    def __repr__(self) -> str:
        return "***"


def hidden(options: Mapping[str, Any]) -> dict[str, Any]:
    """Storage options with the values made Secrets that may be some; of mirrors, those that bring such options."""
    return {
        name: _hidden_mirrors(value or {}) if name == "mirrors" else _hidden(name, value)
        for name, value in options.items()
    }


def revealed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same with their values, for whoever talks to the storage."""
    found = {name: _revealed(value) for name, value in options.items()}
    if mirrors := found.get("mirrors"):
        found["mirrors"] = {name: _revealed(value) for name, value in mirrors.items()}
    return found


def without_login(uri: str) -> str:
    """An address without `user:password@`."""
    return _LOGIN.sub(r"\1", uri)


def without_secrets(text: str) -> str:
    """A text in which no HTTP address has a query, and none a password."""
    return without_login(_QUERY.sub(r"\1", text))


def without_values(arguments: Sequence[str]) -> list[str]:
    """A command line as anybody may see it: options of a storage without what may be secret."""
    shown, before = list[str](), ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if before:
            shown.append(_shown_value(before, argument))
            before = ""
            continue
        if equals and _takes_secrets(option):
            shown.append(f"{option}={_shown_value(option, value)}")
        else:
            shown.append(without_secrets(argument))
        before = argument if _takes_secrets(argument) and not equals else ""
    return shown


def _takes_secrets(option: str) -> bool:
    return option in ("--storage", "--mirrors") or option.startswith(("--data.storage_options", "--data.mirrors"))


def _shown_value(option: str, value: str) -> str:
    if option == "--mirrors":
        return value.partition("?")[0]
    name, equals, given = value.partition("=")
    if option != "--storage" or not equals:
        return "***"
    return value if _is_public(name, given) else f"{name}=***"


def _hidden(name: str, value: Any) -> Any:
    return value if isinstance(value, Secret) or _is_public(name, value) else Secret(value)


def _hidden_mirrors(mirrors: Mapping[str, Any]) -> dict[str, Any]:
    def is_public(target: str) -> bool:
        return all(_is_public(*option) for option in parse_qsl(target.partition("?")[2], keep_blank_values=True))

    return {
        source: target if isinstance(target, Secret) or is_public(target) else Secret(target)
        for source, target in mirrors.items()
    }


def _revealed(value: Any) -> Any:
    return value.value if isinstance(value, Secret) else value


def _is_public(name: str, value: Any) -> bool:
    # An endpoint, too, may be https://user:password@… or, as Azure's portal gives it, end in ?sv=…&sig=….
    return (name in _PUBLIC and not re.search("[@?]", str(value))) or value == "anon"
