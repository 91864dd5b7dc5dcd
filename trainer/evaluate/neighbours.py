"""Nearest neighbours by cosine similarity."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


def nearest(among: Floats, queries: Floats | None, k: int) -> tuple[Floats, Ints]:
    """Cosine distances and indices (M, k) of the k (at most all) of `among` (N, D) nearest to queries (M, D).

    The nearest come first. Without queries, those of each of `among` itself, which is not its own neighbour.
    """
    search: Any = NearestNeighbors(metric="cosine", algorithm="brute").fit(among)
    return search.kneighbors(queries, n_neighbors=min(k, len(among) - (queries is None)))
