"""A mark on fields of the configuration that may change from one start of a run to the next."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FREE: Mapping[str, bool] = MappingProxyType({"free": True})
"""Metadata of a field, or of a whole section, that does not change what is trained. All others are the recipe: a run
found with another one is not gone on with unless that is forced (`trainer.run.resuming`)."""
