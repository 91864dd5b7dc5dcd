"""Slide classification: gated attention over a slide's embeddings (ABMIL, arXiv 1802.04712)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streaming import storage
from streaming.errors import ConfigError, SlideError
from trainer.embed.files import REJECTED
from trainer.evaluate.datasets import Samples
from trainer.evaluate.scores import Score, auroc, balanced_accuracy
from trainer.evaluate.splits import Fold

TASK = "slide"
Bag = NDArray[np.float32]

_HIDDEN, _ATTENTION, _DROPOUT = 256, 128, 0.25
_LR, _WEIGHT_DECAY, _BATCH = 2e-4, 1e-2, 8
_MOST_TILES = 2048  # of a bag in a training step; all of them when it is scored


class GatedAttention(nn.Module):
    """Embeddings (n, D) of a slide → logits (K,): an attention-weighted mean of hidden features, then a linear layer.

    The weight of tile i is softmax over i of wᵀ(tanh(V h_i) ⊙ sigmoid(U h_i)): arXiv 1802.04712, equation 9.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU(), nn.Dropout(_DROPOUT))
        self.value, self.gate = nn.Linear(_HIDDEN, _ATTENTION), nn.Linear(_HIDDEN, _ATTENTION)
        self.weight, self.head = nn.Linear(_ATTENTION, 1), nn.Linear(_HIDDEN, num_classes)

    def forward(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (K,) and the tiles' attention (n,), which sums to 1."""
        hidden = self.hidden(bag)
        scores = self.weight(torch.tanh(self.value(hidden)) * torch.sigmoid(self.gate(hidden)))[:, 0]
        attention = scores.softmax(dim=0)
        return self.head(attention @ hidden), attention


def read_bags(folder: str, samples: Samples, options: storage.StorageOptions | None = None) -> list[Bag]:
    """The embeddings (n, D) of each slide, from the Parquet files that `tilestream embed` wrote.

    A file is a slide's by its `slide` column: the same address, or the same name without folder and suffix.

    Raises:
        SlideError: a slide has no embeddings, or no tile.
        ConfigError: two files are of one slide (embedded in two ways), or widths differ.
    """
    wanted = {_stem(tile.uri) for tile in samples.tiles}
    files = [name for name in storage.list_names(folder, options) if name.endswith(".parquet") and name != REJECTED]
    found: dict[str, tuple[str, pa.Table]] = {}
    for name in files:
        table = storage.read_table(storage.join(folder, name), options)
        if "embedding" not in table.column_names or "slide" not in table.column_names or not len(table):
            continue
        stem = _stem(str(table["slide"][0].as_py()))
        if stem in found:
            raise ConfigError(
                f"{folder}: {found[stem][0]} and {name} are both of {stem}, embedded in two ways; keep one of them"
            )
        if stem in wanted:
            found[stem] = (name, table)
    missing = [tile.uri for tile in samples.tiles if _stem(tile.uri) not in found]
    if missing:
        raise SlideError(
            f"{missing[0]}: no embeddings in {folder} ({len(missing)} of {len(samples)} slides have none); "
            "run `tilestream embed` on them, or leave them out"
        )
    bags = [_embeddings(found[_stem(tile.uri)][1]) for tile in samples.tiles]
    if len(widths := {bag.shape[1] for bag in bags}) > 1:
        raise ConfigError(f"{folder}: embeddings of {' and '.join(map(str, sorted(widths)))} numbers; embed all alike")
    return bags


def _stem(uri: str) -> str:
    return PurePosixPath(storage.name_of(uri)).stem


def _embeddings(table: pa.Table) -> Bag:
    rows: Any = table["embedding"].combine_chunks()
    return rows.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), -1)


def fit(bags: Sequence[Bag], labels: NDArray[np.int64], num_classes: int, epochs: int, seed: int) -> GatedAttention:
    """Trains on bags: AdamW, learning rate 2e-4 to 0 by cosine, 8 slides a step, up to 2,048 random tiles of each."""
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GatedAttention(bags[0].shape[1], num_classes).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY)
        batches = -(-len(bags) // _BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
        for _ in range(epochs):
            for chosen in np.array_split(random.permutation(len(bags)), batches):
                logits = [model(torch.from_numpy(_some(bags[i], random)))[0] for i in chosen]
                loss = nn.functional.cross_entropy(torch.stack(logits), torch.from_numpy(labels[chosen]))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return model.eval()


def _some(bag: Bag, random: np.random.Generator) -> Bag:
    return bag if len(bag) <= _MOST_TILES else bag[random.choice(len(bag), _MOST_TILES, replace=False)]


@torch.inference_mode()
def predict(model: GatedAttention, bags: Sequence[Bag]) -> NDArray[np.float32]:
    """Class probabilities (N, K)."""
    return torch.stack([model(torch.from_numpy(bag))[0].softmax(dim=0) for bag in bags]).numpy()


def score_slides(bags: Sequence[Bag], samples: Samples, folds: Sequence[Fold], epochs: int, seed: int) -> list[Score]:
    """Balanced accuracy and AUROC of slides, each fold's by a model of its own; the AUROC is the folds' mean."""
    assert samples.labels is not None, "slides have labels"
    num_classes, found = len(samples.classes), list[NDArray[np.float32]]()
    for fold in folds:
        learnt = [bags[i] for i in fold.train]
        mean, spread = _mean_and_spread(learnt)
        model = fit([(bag - mean) / spread for bag in learnt], samples.labels[fold.train], num_classes, epochs, seed)
        found.append(predict(model, [(bags[i] - mean) / spread for i in fold.test]))
    tested, probabilities = np.concatenate([fold.test for fold in folds]), np.concatenate(found)
    labels = samples.labels[tested]
    groups = None if samples.groups is None else samples.groups[tested]
    of_fold = np.repeat(np.arange(len(folds)), [len(fold.test) for fold in folds])
    return [
        balanced_accuracy(TASK, labels, probabilities.argmax(axis=1), groups, num_classes, seed),
        auroc(TASK, labels, probabilities, groups, of_fold, seed),
    ]


def _mean_and_spread(bags: Sequence[Bag]) -> tuple[NDArray[np.float32], np.float32]:
    """The mean embedding, each slide alike, and one standard deviation for all dimensions."""
    spread = np.sqrt(np.mean([bag.var(axis=0).mean() for bag in bags]))
    return np.mean([bag.mean(axis=0) for bag in bags], axis=0), np.float32(max(spread, 1e-6))
