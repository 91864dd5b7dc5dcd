"""A mark on fields that decide nothing of what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FREE: Mapping[str, bool] = MappingProxyType({"free": True})
"""Metadata of a field, or of a whole section, that may change without changing what is trained. All others count."""

COUNTS: Mapping[str, bool] = MappingProxyType({"free": False})
"""Metadata of a field that counts, within a section that else does not."""
