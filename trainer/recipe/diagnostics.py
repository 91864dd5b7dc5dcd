"""What a network's embeddings and targets look like, as numbers that tell a collapse."""

from __future__ import annotations

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
    used = probabilities.new_zeros(num_prototypes).index_fill(0, probabilities.argmax(dim=1), 1).sum()
    perplexity = torch.special.entr(probabilities.float().mean(dim=0)).sum().exp()
    return {
        "prototypes_used": used / num_prototypes,
        "prototype_perplexity": perplexity / num_prototypes,
    }


def teacher_metrics(targets: Tensor, features: Tensor) -> dict[str, Tensor]:
    """The teacher's state, of its targets (M, K) and its class tokens (M, D) in a batch."""
    return {
        "teacher_entropy": losses.teacher_entropy(targets),
        "rankme": rankme(features),
        **prototype_use(targets),
    }
