"""What embeddings look like without any training: rank, neighbours, retrieval, biology against site."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.evaluate.datasets import Samples
from trainer.evaluate.neighbours import nearest_others
from trainer.evaluate.scores import Ints, Score, share
from trainer.recipe import diagnostics

TASK = "quality"
_RANK_SAMPLE = 4096


def rankme(embeddings: NDArray[np.float32], seed: int = 0) -> Score:
    """Effective rank of the embeddings, of 4,096 at most: arXiv 2210.02885."""
    chosen = np.random.default_rng(seed).permutation(len(embeddings))[:_RANK_SAMPLE]
    value = float(diagnostics.rankme(torch.from_numpy(embeddings[chosen])))
    return Score(task=TASK, metric="RankMe", value=value, low=np.nan, high=np.nan, n=len(chosen))


def neighbour_scores(
    embeddings: NDArray[np.float32],
    samples: Samples,
    k: int = 20,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[Score]:
    """Scores of the k nearest neighbours, as far as the samples tell what they need.

    - purity by class, slide, patient: share of neighbours of the same one. By slide and patient the less the better:
      that much a model looks at stain and scanner.
    - retrieval: share of queries whose nearest tile of another patient (or slide) is of their class.
    - robustness index: neighbours of the same class from another site, over those plus neighbours of another class from
      the same site; 1: biology alone, 0: the site alone. arXiv 2501.18055, in the form of PathoROB (arXiv 2507.17845).
      Theirs are of subsets balanced over class and site; ours is of the tiles as given, so compare models on one set.
    """
    groups, labels = samples.groups, samples.labels
    retrieved = labels is not None and groups is not None and len(np.unique(groups)) > 1
    wanted = [(None, k), (groups, 1)] if retrieved else [(None, k)]
    found_near = nearest_others(embeddings, wanted, device or torch.device("cpu"))
    near = found_near[0].index
    all_of = np.full(len(near), float(near.shape[1]))
    found: list[Score] = []
    named = {"class": samples.labels, "slide": samples.slides, "patient": samples.patients}
    for kind, names in named.items():
        if names is not None and len(np.unique(names)) > 1:
            same = _same(names, near).sum(axis=1)
            found.append(share(TASK, f"purity by {kind}, k={near.shape[1]}", same, all_of, groups, seed))
    if labels is not None and retrieved:
        hits, ones = _same(labels, found_near[1].index)[:, 0].astype(np.float64), np.ones(len(labels))
        found.append(share(TASK, "retrieval, top 1 of other patients", hits, ones, groups, seed))
    if labels is not None and samples.sites is not None and len(np.unique(samples.sites)) > 1:
        biology, site = _same(labels, near), _same(samples.sites, near)
        good, bad = (biology & ~site).sum(axis=1), (~biology & site).sum(axis=1)
        found.append(share(TASK, f"robustness index, k={near.shape[1]}", good, good + bad, groups, seed))
    return found


def _same(names: NDArray[Any], near: Ints) -> NDArray[np.bool_]:
    return names[near] == names[:, None]
