"""What a user's source names: slides by their files, or folders that hold the files of one series of DICOM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from streaming import storage


@dataclass(frozen=True, kw_only=True)
class Named:
    """A slide, or a series that is looked into when it is catalogued."""

    uri: str
    """of the slide's file, or of the series' folder"""
    info: storage.ObjectInfo | None = None
    """the slide, once it was looked at; none: its key is of one content for ever, so that what is catalogued is done"""
    nbytes: int = 0
    num_files: int = 1
    is_series: bool = False
    levels: tuple[storage.ObjectInfo, ...] = ()
    """of a series, the files of its levels, where a table told them"""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    """free columns that the source tells"""
