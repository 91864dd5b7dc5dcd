"""Storage options that may be secret: they reach the storage, and no file, report, log, event or error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What says where a storage is and how it is asked; whatever else is given may open it.
_PUBLIC = frozenset(
    {"account_host", "account_name", "addressing_style", "anon", "endpoint_url", "profile", "project", "region"}
    | {"mirrors", "requester_pays", "timeout_s", "verify"}
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
    """Storage options with the values made Secrets that may be some."""
    return {
        name: value if isinstance(value, Secret) or _is_public(name, value) else Secret(value)
        for name, value in options.items()
    }


def revealed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same with their values, for whoever talks to the storage."""
    return {name: value.value if isinstance(value, Secret) else value for name, value in options.items()}


def _is_public(name: str, value: Any) -> bool:
    # An endpoint, too, may be https://user:password@….
    return name in _PUBLIC and "@" not in str(value)
