"""Vectors as colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

Floats = NDArray[np.floating[Any]]
_FIT_MOST = 50_000  # vectors that a PCA is fitted to
_COLOUR_ENDS = (2, 98)  # percentiles of a component that become its darkest and brightest


def principal_colours(vectors: Sequence[NDArray[Any]]) -> tuple[list[Floats], float]:
    """The first three principal components of vectors (…, D) as colours from 0 to 1, (…, 3), alike for all.

    Returns them, and the share of the variance that they show.
    """
    every = [part.reshape(-1, part.shape[-1]) for part in vectors]
    step = max(1, sum(map(len, every)) // _FIT_MOST)
    sample = np.concatenate([part[::step] for part in every]).astype(np.float32)
    pca = PCA(n_components=min(3, *sample.shape)).fit(sample)
    low, high = np.percentile(pca.transform(sample), _COLOUR_ENDS, axis=0)
    found: list[Floats] = []
    for part, shaped in zip(every, vectors, strict=True):
        colour = np.zeros((len(part), 3), dtype=np.float32)
        scaled = (pca.transform(part.astype(np.float32)) - low) / np.maximum(high - low, 1e-12)
        colour[:, : scaled.shape[1]] = scaled.clip(0, 1)
        found.append(colour.reshape(*shaped.shape[:-1], 3))
    return found, float(pca.explained_variance_ratio_.sum())
