"""Whether a run is well: what its embeddings and targets look like, and when to stop it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.recipe import losses


@torch.no_grad()
def rankme(features: Tensor) -> Tensor:
    """Effective rank of (M, D): exp of the entropy of the singular values' shares, 1 when all rows are parallel.

    It can't exceed min(M, D), so values of other batch sizes don't compare. Returns a float32 scalar, NaN where a
    feature is not finite.
    Source: RankMe, arXiv 2210.02885.
    """
    finite = features.isfinite().all()
    values = torch.linalg.svdvals(features.float().nan_to_num())  # it raises on what is not finite
    return torch.where(finite, torch.special.entr(values / values.sum()).sum().exp(), torch.nan)


@torch.no_grad()
def prototype_use(probabilities: Tensor) -> dict[str, Tensor]:
    """How many prototypes the rows of (M, K) use, both in 0..1.

    `prototypes_used` is the share that is some row's highest, at most M / K; `prototype_perplexity` is the exp of the
    mean row's entropy over K, 1 when all are used alike.
    """
    num_prototypes = probabilities.shape[1]
    used = probabilities.argmax(dim=1).unique().numel()
    perplexity = torch.special.entr(probabilities.float().mean(dim=0)).sum().exp()
    return {
        "prototypes_used": probabilities.new_tensor(used / num_prototypes),
        "prototype_perplexity": perplexity / num_prototypes,
    }


def teacher_metrics(targets: Tensor, features: Tensor) -> dict[str, Tensor]:
    """The teacher's state, of its targets (M, K) and its class tokens (M, D) in a batch."""
    return {
        "teacher_entropy": losses.teacher_entropy(targets),
        "rankme": rankme(features),
        **prototype_use(targets),
    }


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

    def __post_init__(self) -> None:
        for name in ("knn_every", "knn_k", "knn_tiles"):
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
