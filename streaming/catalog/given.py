"""What is told of a slide beside its file: its µm/px, by a table or on the command line, and its tissue's mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streaming.catalog import schema
from streaming.catalog.masks import Mask

MppFrom = Literal["metadata", "csv"]
_CONTRADICTS = 0.05


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a user tells of one slide."""

    mpp: float | None = None
    """µm/px at level 0"""
    mpp_from: str = schema.OPTION
    """who tells it: `schema.OPTION` or `schema.TABLE`"""
    mpp_decides: bool = False
    """whether it counts where the metadata tells another; else it stands in where there is none"""
    mask: Mask | None = None
    """tells where its tissue is"""

    def decided(self, own_mpp: float | None) -> tuple[float | None, str]:
        """The µm/px of a slide whose metadata tells own_mpp, and whose word that is."""
        if self.mpp is None or (own_mpp is not None and not self.mpp_decides):
            return own_mpp, schema.METADATA
        return self.mpp, self.mpp_from

    def contradicts(self, own_mpp: float | None) -> bool:
        """Whether it is over 5 % off what the metadata tells."""
        return self.mpp is not None and own_mpp is not None and abs(self.mpp / own_mpp - 1) > _CONTRADICTS
