"""Stops a run that has broken down: what counts as that, and the look at each row of the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.recipe.free_field import COUNTS


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run is stopped for its own good; a loss or gradient that is not finite always stops it."""

    min_rankme: float | None = 1.05
    """effective rank of a batch's class tokens at which the embeddings count as collapsed; none: never"""
    min_teacher_entropy: float | None = 0.01
    """mean entropy of the teacher's targets in nats at which they count as collapsed; none: never"""
    min_prototypes: float | None = 1.5
    """how many prototypes a batch's targets use in effect (exp of their mean's entropy) at which they count as
    collapsed, all on one; none: never, for DINO's centring on one or two tiles a rank"""
    grace_steps: int = 2000
    """steps from the start in which a collapse stops nothing: embeddings start out nearly equal"""
    patience: int = 3
    """rows of the metrics in a row that must show a collapse"""
    knn_dataset: str | None = None
    """labelled tiles, as `tilestream evaluate` takes them, on which kNN accuracy is followed; none: not"""
    knn_every: int = 1000
    """steps from one look at it to the next; a multiple of train.log_every"""
    knn_k: int = 20
    """neighbours that vote"""
    knn_tiles: int = 2000
    """tiles that the set may have; each rank holds its share in memory"""

    validation_slides: float = field(default=0.0, metadata=COUNTS)
    """share of the slides, chosen by patient, that is never trained on; the loss on their tiles is followed"""
    validation_every: int = 1000
    """steps from one look at that loss to the next; a multiple of train.log_every"""
    validation_tiles: int = 256
    """tiles of those slides, rounded up to whole micro-batches; each rank holds its share in memory"""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_slides < 1:
            raise ValueError(f"validation_slides is {self.validation_slides}; it is a share from 0 and below 1")
        for name in ("knn_every", "knn_k", "knn_tiles", "validation_every", "validation_tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.grace_steps < 0 or self.patience < 1:
            raise ValueError(f"grace_steps {self.grace_steps} must be at least 0, patience {self.patience} at least 1")


class Guard:
    """Looks at each row of the metrics for a run that has broken down."""

    def __init__(self, config: WatchConfig, num_prototypes: int) -> None:
        """num_prototypes are the class head's, K."""
        least = config.min_prototypes
        self._floors = {
            "rankme": config.min_rankme,
            "teacher_entropy": config.min_teacher_entropy,
            "prototype_perplexity": None if least is None else least / num_prototypes,
        }
        self._config = config
        self._rows, self._before = 0, 0
        self.well_until = 0
        """The last step that showed no trouble."""

    def trouble(self, row: Mapping[str, float]) -> str | None:
        """What is wrong with the run, in words with numbers, once it has been so for long enough."""
        step = int(row["step"])
        if infinite := [name for name, value in row.items() if not math.isfinite(value)]:
            self.well_until = self._before
            return f"{', '.join(infinite[:3])} not finite"
        low = [
            f"{name} {row[name]:.3g}, not above {floor:g}"
            for name, floor in self._floors.items()
            if floor is not None and name in row and row[name] <= floor
        ]
        if not low or step <= self._config.grace_steps:
            self._rows, self._before = 0, step
            return None
        self._rows += 1
        self.well_until = self._before
        return f"collapsed: {', '.join(low)}" if self._rows >= self._config.patience else None
