"""Classifiers on frozen embeddings: nearest neighbours, logistic regression, the published linear probe."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from trainer.evaluate.neighbours import nearest
from trainer.evaluate.options import PROBE_STEPS

Ints = NDArray[np.int64]
Embeddings = NDArray[np.float32]

_PROBE_LR = 3e-4
_PROBE_BATCH = 256


def nearest_neighbours(
    train: Embeddings, labels: Ints, test: Embeddings, k: int = 20, device: torch.device | None = None
) -> Ints:
    """Classes (M,) by a vote of the k training embeddings (at most all) of the highest cosine similarity.

    Of classes with as many votes, the first.
    """
    near = nearest(train, test, k, device=device or torch.device("cpu")).index
    votes = np.stack([(labels[near] == kind).sum(axis=1) for kind in range(labels.max() + 1)], axis=1)
    return votes.argmax(axis=1)


def fitted_logistic(train: Embeddings, labels: NDArray[Any]) -> Any:
    """Logistic regression on standardised embeddings, L2 penalty with C = 1, fitted: a classifier of scikit-learn."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, labels)


def logistic(train: Embeddings, labels: Ints, test: Embeddings) -> Ints:
    """Classes (M,) by `fitted_logistic`."""
    return fitted_logistic(train, labels).predict(test)


def linear_probe(
    train: Embeddings, labels: Ints, test: Embeddings, num_classes: int, steps: int = PROBE_STEPS, seed: int = 0
) -> Ints:
    """Classes (M,) by a linear layer: AdamW, learning rate 3e-4 to 0 by cosine, batches of 256.

    Source: arXiv 2404.15217 and the configurations of eva 0.4, which train 12,500 steps.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.from_numpy(train), torch.from_numpy(labels)
    layer = nn.Linear(inputs.shape[1], num_classes)
    with torch.no_grad():  # nn.Linear's own start, by this generator
        for weight in layer.parameters():
            weight.uniform_(-(inputs.shape[1] ** -0.5), inputs.shape[1] ** -0.5, generator=generator)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=_PROBE_LR, fused=True)
    order = torch.zeros(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < min(_PROBE_BATCH, len(inputs)):
            order = torch.randperm(len(inputs), generator=generator)
        chosen, order = order[:_PROBE_BATCH], order[_PROBE_BATCH:]
        # CosineAnnealingLR's formula: its bookkeeping takes longer than the step.
        optimiser.param_groups[0]["lr"] = _PROBE_LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        nn.functional.cross_entropy(layer(inputs[chosen]), targets[chosen]).backward()
        optimiser.step()
    with torch.inference_mode():
        return layer(torch.from_numpy(test)).argmax(dim=1).numpy()
