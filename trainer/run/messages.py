"""What ranks tell the driver while they train.

The actor that keeps the messages until the driver takes them imports this module, and is to need no torch for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streaming.reading.batch import Failure

Row = dict[str, float]
"""a step's metrics by name, lines of the summary, or that a checkpoint is being written"""


@dataclass(frozen=True)
class Failed:
    """Tiles that a rank could not get, and the generation of ranks, those that started together, that it is one of."""

    generation: str
    failures: list[Failure]


@dataclass(frozen=True)
class Ranks:
    """Whether the ranks run; told where they start, and where one is lost."""

    run: bool


Report = Callable[["Row | Failed"], None]
