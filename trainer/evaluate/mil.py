"""Slide classification: gated attention over a slide's embeddings (ABMIL, arXiv 1802.04712)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streaming import storage
from streaming.catalog.known import keys, keys_of_series
from streaming.errors import ConfigError, SlideError
from trainer.embed.feature_files import FeatureFile, check_alike, find_features, read_features
from trainer.evaluate.datasets import Samples
from trainer.evaluate.scores import Score, auroc, balanced_accuracy
from trainer.evaluate.scratch import Scratch
from trainer.evaluate.splits import Fold

TASK = "slide"
Bag = NDArray[np.float32]
_CPU = torch.device("cpu")

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
        self.mean, self.spread = nn.Buffer(torch.zeros(width)), nn.Buffer(torch.ones(()))

    def normalise(self, mean: NDArray[np.float32], spread: float) -> None:
        """Takes off the mean (D,) and divides by the spread, before anything else."""
        self.mean.copy_(torch.from_numpy(mean))
        self.spread.fill_(spread)

    def forward(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (K,) and the tiles' attention (n,), which sums to 1."""
        hidden = self.hidden((bag - self.mean) / self.spread)
        scores = self.weight(torch.tanh(self.value(hidden)) * torch.sigmoid(self.gate(hidden)))[:, 0]
        attention = scores.softmax(dim=0)
        return self.head(attention @ hidden), attention


def read_bags(folder: str, samples: Samples, room: Scratch, options: storage.StorageOptions | None = None) -> list[Bag]:
    """The embeddings (n, D) of each slide, mapped, from files of `tilestream embed`, TRIDENT or CLAM.

    A file is a slide's by the address that it tells, else by the slide's name with or without suffix.

    Raises:
        SlideError: a slide has no embeddings, or no tile.
        ConfigError: several files are of one slide, or several slides of one name; widths differ; there is no room.
    """
    found = find_features([folder], options)
    chosen = _chosen(folder, found, samples)
    check_alike(folder, chosen)
    makers = sorted({file.maker for file in chosen})
    sys.stderr.write(f"{folder}: {len(chosen):,} files of embeddings, as {' and '.join(makers)} write them\n")
    held = room.array("embeddings", (sum(file.num for file in chosen), chosen[0].width), np.float32)
    ends = np.cumsum([file.num for file in chosen]).tolist()
    bags = [held[end - file.num : end] for end, file in zip(ends, chosen, strict=True)]
    for bag, file in zip(bags, chosen, strict=True):
        bag[:] = read_features(file, options)
    return bags


def _chosen(folder: str, found: Sequence[FeatureFile], samples: Samples) -> list[FeatureFile]:
    """The file of each slide."""
    of_key: dict[str, list[FeatureFile]] = {}
    for file in found:
        for key in (*keys(file.slide), *keys_of_series(file.slide)):
            of_key.setdefault(key, []).append(file)
    named = [
        next((of_key[key] for key in keys(tile.uri.removesuffix("*")) if key in of_key), []) for tile in samples.tiles
    ]
    if missing := [tile.uri for tile, files in zip(samples.tiles, named, strict=True) if not files]:
        raise SlideError(
            f"{missing[0]}: no embeddings in {folder} ({len(missing)} of {len(samples)} slides have none); "
            "run `tilestream embed` on them, or leave them out"
        )
    taken: dict[str, str] = {}
    for tile, files in zip(samples.tiles, named, strict=True):
        if len(files) > 1:
            how = "embedded in two ways" if len({file.slide for file in files}) == 1 else "slides of one name"
            raise ConfigError(
                f"{folder}: {files[0].uri} and {files[1].uri} are both of {storage.name_of(tile.uri)}, {how}; "
                "keep one of them, or give the slides' whole addresses"
            )
        if (other := taken.setdefault(files[0].uri, tile.uri)) != tile.uri:
            raise ConfigError(
                f"{samples.source}: {other} and {tile.uri} are slides of one name, and {files[0].uri} is the one file "
                "of that name; embed both, and give their whole addresses"
            )
        if not files[0].num:
            raise SlideError(f"{tile.uri}: {files[0].uri} holds no tile; leave the slide out")
    return [files[0] for files in named]


def fit(
    bags: Sequence[Bag],
    labels: NDArray[np.int64],
    num_classes: int,
    epochs: int,
    seed: int,
    device: torch.device = _CPU,
) -> GatedAttention:
    """Trains on bags: AdamW, learning rate 2e-4 to 0 by cosine, 8 slides a step, up to 2,048 random tiles of each."""
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GatedAttention(bags[0].shape[1], num_classes).train()
        model.normalise(*_mean_and_spread(bags))
        model.to(device)
        optimiser = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY)
        batches = -(-len(bags) // _BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
        for _ in range(epochs):
            for chosen in np.array_split(random.permutation(len(bags)), batches):
                logits = [model(torch.from_numpy(_some(bags[i], random)).to(device))[0] for i in chosen]
                loss = nn.functional.cross_entropy(torch.stack(logits), torch.from_numpy(labels[chosen]).to(device))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return model.eval()


def _some(bag: Bag, random: np.random.Generator) -> Bag:
    """Up to so many tiles, in the order of the file, held in memory."""
    if len(bag) <= _MOST_TILES:
        return np.array(bag)
    return np.asarray(bag[np.sort(random.choice(len(bag), _MOST_TILES, replace=False))])


@torch.inference_mode()
def predict(model: GatedAttention, bags: Sequence[Bag]) -> NDArray[np.float32]:
    """Class probabilities (N, K)."""
    device = model.mean.device
    found = [model(torch.from_numpy(np.array(bag)).to(device))[0].softmax(dim=0) for bag in bags]
    return torch.stack(found).cpu().numpy()


def score_slides(
    bags: Sequence[Bag],
    samples: Samples,
    folds: Sequence[Fold],
    epochs: int,
    seed: int,
    device: torch.device = _CPU,
) -> list[Score]:
    """Balanced accuracy and AUROC of slides, each fold's by a model of its own; the AUROC is the folds' mean."""
    assert samples.labels is not None, "slides have labels"
    num_classes, found = len(samples.classes), list[NDArray[np.float32]]()
    for fold in folds:
        model = fit([bags[i] for i in fold.train], samples.labels[fold.train], num_classes, epochs, seed, device)
        found.append(predict(model, [bags[i] for i in fold.test]))
    tested, probabilities = np.concatenate([fold.test for fold in folds]), np.concatenate(found)
    labels = samples.labels[tested]
    groups = None if samples.groups is None else samples.groups[tested]
    of_fold = np.repeat(np.arange(len(folds)), [len(fold.test) for fold in folds])
    return [
        balanced_accuracy(TASK, labels, probabilities.argmax(axis=1), groups, num_classes, seed),
        auroc(TASK, labels, probabilities, groups, of_fold, seed),
    ]


def _mean_and_spread(bags: Sequence[Bag]) -> tuple[NDArray[np.float32], float]:
    """The mean embedding, each slide alike, and one standard deviation for all dimensions."""
    means, spreads = zip(*((bag.mean(axis=0), bag.var(axis=0).mean()) for bag in bags), strict=True)
    return np.mean(means, axis=0), max(float(np.sqrt(np.mean(spreads))), 1e-6)
