"""What embeddings look like without any training: rank, neighbours, retrieval, biology against site."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.evaluate.datasets import Samples
from trainer.evaluate.neighbours import nearest
from trainer.evaluate.scores import Floats, Ints, Score, share
from trainer.recipe import diagnostics

TASK = "quality"
_RANK_SAMPLE = 4096


def rankme(embeddings: NDArray[np.float32], seed: int = 0) -> Score:
    """Effective rank of the embeddings, of 4,096 at most: arXiv 2210.02885."""
    chosen = np.random.default_rng(seed).permutation(len(embeddings))[:_RANK_SAMPLE]
    value = float(diagnostics.rankme(torch.from_numpy(embeddings[chosen])))
    return Score(task=TASK, metric="RankMe", value=value, low=np.nan, high=np.nan, n=len(chosen))


def neighbour_scores(embeddings: NDArray[np.float32], samples: Samples, k: int = 20, seed: int = 0) -> list[Score]:
    """Scores of the k nearest neighbours, as far as the samples tell what they need.

    - purity by class, slide, patient: share of neighbours of the same one. By slide and patient the less the better:
      that much a model looks at stain and scanner.
    - retrieval: share of queries whose nearest tile of another patient (or slide) is of their class.
    - robustness index: neighbours of the same class from another site, over those plus neighbours of another class from
      the same site; 1: biology alone, 0: the site alone. arXiv 2501.18055, in the form of PathoROB (arXiv 2507.17845).
      Theirs are of subsets balanced over class and site; ours is of the tiles as given, so compare models on one set.
    """
    (_, near), groups = nearest(embeddings, None, k), samples.groups
    all_of = np.full(len(near), float(near.shape[1]))
    found: list[Score] = []
    named = {"class": samples.labels, "slide": samples.slides, "patient": samples.patients}
    for kind, names in named.items():
        if names is not None and len(np.unique(names)) > 1:
            same = _same(names, near).sum(axis=1)
            found.append(share(TASK, f"purity by {kind}, k={near.shape[1]}", same, all_of, groups, seed))
    if samples.labels is not None and groups is not None and len(np.unique(groups)) > 1:
        found.append(_retrieval(embeddings, samples.labels, groups, seed))
    if samples.labels is not None and samples.sites is not None and len(np.unique(samples.sites)) > 1:
        biology, site = _same(samples.labels, near), _same(samples.sites, near)
        good, bad = (biology & ~site).sum(axis=1), (~biology & site).sum(axis=1)
        found.append(share(TASK, f"robustness index, k={near.shape[1]}", good, good + bad, groups, seed))
    return found


def _same(names: NDArray[Any], near: Ints) -> NDArray[np.bool_]:
    return names[near] == names[:, None]


def _retrieval(embeddings: NDArray[np.float32], labels: Ints, groups: Ints, seed: int) -> Score:
    """Share of queries whose nearest tile of another group is of their class."""
    # Not by `nearest`: its distances round off what tells two near-equal similarities apart.
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    hits: Floats = np.zeros(len(labels))
    for group in np.unique(groups):
        own = groups == group
        best = (unit[own] @ unit[~own].T).argmax(axis=1)
        hits[own] = labels[~own][best] == labels[own]
    return share(TASK, "retrieval, top 1 of other patients", hits, np.ones(len(labels)), groups, seed)
