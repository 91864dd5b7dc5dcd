"""The protocol by which kaiko's eva 0.4.5 publishes: `tilestream evaluate --protocol eva`.

Tiles of 224 px by resize and centre crop, a small head on frozen embeddings, AdamW at one learning rate, an end once a
fifth of all steps brought no better score on `val`, the head of the best epoch, and the mean of several runs. Each
number is of eva's code, or of its configurations (`configs/vision/pathology/offline`) where most of them agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from streaming.errors import ConfigError
from streaming.slide.resample import Pixels
from trainer.evaluate.datasets import Samples
from trainer.evaluate.decoders import batches
from trainer.evaluate.features import Shown
from trainer.evaluate.mil import Bag
from trainer.evaluate.scores import Score, auroc, bootstrap, shares
from trainer.evaluate.splits import Fold, Ints, make_folds

SIDE = 224
"""px of what the model sees"""
MOST_TILES = 10_000
"""of a slide, as for CAMELYON16; drawn at random"""
_PATIENCE = 0.2  # of all steps, in whole epochs: 1,250 epochs of BACH, 7 of CRC, 3 of PatchCamelyon, 20 of slides
_CPU = torch.device("cpu")
Probabilities = NDArray[np.float32]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a head is trained."""

    lr: float
    batch: int
    steps: int | None = None
    """of a run at most; None: `epochs`"""
    epochs: int = 100
    runs: int = 5

    def limits(self, num: int) -> tuple[int, int]:
        """The most steps, and the epochs without a better score that end a run, of `num` samples."""
        of_epoch = math.ceil(num / self.batch)
        steps = self.epochs * of_epoch if self.steps is None else self.steps
        return steps, math.ceil(_PATIENCE * steps / of_epoch)


TILES = Setting(lr=3e-4, batch=256, steps=12_500)
SLIDES = Setting(lr=1e-3, batch=32, epochs=100, runs=20)


def eva_fold(samples: Samples) -> tuple[Fold, str | None]:
    """The dataset's own split, and a warning where what is scored is what chose the epoch.

    Raises:
        ConfigError: it has none, or one that `make_folds` refuses.
    """
    if samples.parts is None:
        raise ConfigError(
            f"{samples.source}: protocol eva needs a split, and there is none; give a column split (or folders) of "
            "train, val and test, or take --protocol quick, which cross-validates"
        )
    (fold,) = make_folds(samples)
    if fold.val is not None:
        return fold, None
    return replace(fold, val=fold.test), (
        f"{samples.source}: the part that is scored also chose when training ends, as in eva for datasets of two "
        "parts; give train, val and test for a score of samples that nothing was chosen by"
    )


def resize_and_crop(pixels: Pixels, side: int = SIDE) -> Shown:
    """An image (H, W, 3) whose shorter side becomes `side`, and of it the square in the middle, as eva shows them."""
    resized = transforms.resize(torch.from_numpy(pixels).permute(2, 0, 1), [side], antialias=True)
    cropped = transforms.center_crop(resized, [side, side])
    height, width = resized.shape[-2:]
    return Shown(cropped.permute(1, 2, 0).numpy(), (height, width))


def fit(
    head: nn.Module,
    loss: Callable[[nn.Module, Ints], Tensor],
    score: Callable[[nn.Module], float],
    train: Ints,
    setting: Setting,
    seed: int,
) -> list[float]:
    """Trains a head in place, leaves it as it was after its best epoch, and gives the score after each epoch.

    loss is that of some samples, score that of `val`.
    """
    random = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(head.parameters(), lr=setting.lr)
    # What eva has where a configuration names no schedule: a third of the rate for five epochs.
    schedule = torch.optim.lr_scheduler.ConstantLR(optimiser)
    steps, patience = setting.limits(len(train))
    best, found, done = copy.deepcopy(head.state_dict()), list[float](), 0
    while done < steps:
        head.train()
        for chosen in batches(random.permutation(train), setting.batch):
            if done == steps:
                break
            optimiser.zero_grad()
            loss(head, chosen).backward()
            optimiser.step()
            done += 1
        schedule.step()
        head.eval()
        with torch.inference_mode():
            found.append(score(head))
        if found[-1] > max(found[:-1], default=-math.inf):
            best = copy.deepcopy(head.state_dict())
        elif len(found) - 1 - int(np.argmax(found)) >= patience:
            break
    head.load_state_dict(best)
    return found


def score_tiles(
    embeddings: NDArray[np.float32],
    samples: Samples,
    fold: Fold,
    seed: int = 0,
    device: torch.device = _CPU,
    setting: Setting = TILES,
) -> list[Score]:
    """Balanced accuracy and AUROC of a linear layer on embeddings (N, D)."""
    inputs = torch.from_numpy(embeddings).to(device)
    width, outputs = inputs.shape[1], _outputs(samples)
    return _classified(
        "linear",
        lambda: nn.Linear(width, outputs),
        lambda head, chosen: head(inputs[torch.from_numpy(chosen).to(device)]),
        samples,
        fold,
        seed,
        device,
        setting,
    )


class GatedPooling(nn.Module):
    """A slide's embeddings (n, D) → logits (outputs,), as eva's ABMIL has it: no dropout, two hidden layers behind.

    Source: arXiv 1802.04712, equation 9, on embeddings brought to 128 numbers.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.projector = nn.Linear(width, 128)
        self.value, self.gate, self.weight = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 1)
        self.classifier = nn.Sequential(
            nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, outputs)
        )

    def forward(self, bag: Tensor) -> Tensor:
        """Logits (outputs,)."""
        projected = self.projector(bag)
        scores = self.weight(torch.tanh(self.value(projected)) * torch.sigmoid(self.gate(projected)))[:, 0]
        return self.classifier(scores.softmax(dim=0) @ projected)


def score_slides(
    bags: Sequence[Bag],
    samples: Samples,
    fold: Fold,
    seed: int = 0,
    device: torch.device = _CPU,
    setting: Setting = SLIDES,
) -> list[Score]:
    """Balanced accuracy and AUROC of gated attention over slides' embeddings (n, D)."""
    random = np.random.default_rng(seed)
    kept = [
        None if len(bag) <= MOST_TILES else np.sort(random.choice(len(bag), MOST_TILES, replace=False)) for bag in bags
    ]
    width, outputs = bags[0].shape[1], _outputs(samples)

    def logits(head: nn.Module, chosen: Ints) -> Tensor:
        # One by one: eva pads them to one length, and masks what it padded.
        some = (np.array(bags[i] if (rows := kept[i]) is None else bags[i][rows]) for i in chosen.tolist())
        return torch.stack([head(torch.from_numpy(bag).to(device)) for bag in some])

    return _classified("slide", lambda: GatedPooling(width, outputs), logits, samples, fold, seed, device, setting)


def _outputs(samples: Samples) -> int:
    """Of a head: of two classes, one number tells which."""
    return 1 if len(samples.classes) == 2 else len(samples.classes)


def _classified(
    task: str,
    make: Callable[[], nn.Module],
    logits: Callable[[nn.Module, Ints], Tensor],
    samples: Samples,
    fold: Fold,
    seed: int,
    device: torch.device,
    setting: Setting,
) -> list[Score]:
    assert samples.labels is not None, "they are labelled"
    assert fold.val is not None, "there are samples to choose by"
    labels, val = samples.labels, fold.val

    def loss(head: nn.Module, chosen: Ints) -> Tensor:
        return class_loss(logits(head, chosen), torch.from_numpy(labels[chosen]).to(device))

    def probabilities(head: nn.Module, chosen: Ints) -> Probabilities:
        return np.concatenate([class_shares(logits(head, some)) for some in batches(chosen, setting.batch)])

    def score(head: nn.Module) -> float:
        return balanced(labels[val], probabilities(head, val))

    found = test_results(make, loss, score, probabilities, fold, seed, device, setting)
    groups = None if samples.groups is None else samples.groups[fold.test]
    return _over_runs(task, labels[fold.test], found, groups, seed)


def test_results(
    make: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Ints], Tensor],
    score: Callable[[nn.Module], float],
    result: Callable[[nn.Module, Ints], Result],
    fold: Fold,
    seed: int,
    device: torch.device,
    setting: Setting,
) -> list[Result]:
    """Of each run the result of `test` samples by a head of its own, trained by `fit`."""
    found = list[Result]()
    for run in range(setting.runs):
        head = _made(make, seed, run, device)
        fit(head, loss, score, fold.train, setting, seed + run)
        with torch.inference_mode():
            found.append(result(head, fold.test))
    return found


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (n, K), or, of two classes, of logits (n, 1)."""
    if logits.shape[1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    return nn.functional.cross_entropy(logits, labels)


def class_shares(logits: Tensor) -> Probabilities:
    """Probabilities (n, K) of logits (n, K), or (n, 2) of logits (n, 1)."""
    if logits.shape[1] > 1:
        return logits.softmax(dim=1).cpu().numpy()
    one = logits[:, 0]
    # torchmetrics, by which eva scores two classes, takes numbers that all lie in 0 to 1 for probabilities.
    second = one if bool(((one >= 0) & (one <= 1)).all()) else one.sigmoid()
    return torch.stack([1 - second, second], dim=1).cpu().numpy()


def _predicted(probabilities: Probabilities) -> Ints:
    """The class of each; of two as likely, the first."""
    return probabilities.argmax(axis=1)


def balanced(labels: Ints, probabilities: Probabilities) -> float:
    """Mean over the classes of the share recognised; one that is only predicted counts as 0, as in torchmetrics."""
    predicted, classes = _predicted(probabilities), range(probabilities.shape[1])
    there = [k for k in classes if (labels == k).any() or (predicted == k).any()]
    return float(np.mean([(predicted[labels == k] == k).mean() if (labels == k).any() else 0.0 for k in there]))


def _over_runs(task: str, labels: Ints, found: Sequence[Probabilities], groups: Ints | None, seed: int) -> list[Score]:
    """The mean score of some runs, its deviation over them, and its interval over patients or slides."""
    runs, num, rows = len(found), len(labels), np.arange(len(labels))
    cells = np.zeros((num, found[0].shape[1], 2))
    cells[rows, labels, 0] = np.mean([_predicted(one) == labels for one in found], axis=0)
    cells[rows, labels, 1] = 1
    accuracy = bootstrap(task, "balanced accuracy", cells, groups, shares, seed=seed)
    accuracies = [balanced(labels, one) for one in found]
    # Each run is ranked for itself, as each fold elsewhere.
    of_run, repeated = np.repeat(np.arange(runs), num), np.tile(labels, runs)
    of_group = None if groups is None else np.tile(groups, runs)
    area = auroc(task, repeated, np.concatenate(found), of_group, of_run, seed)
    areas = [auroc(task, labels, one, None, np.zeros(num, np.int64)).value for one in found]
    return [
        replace(accuracy, value=float(np.mean(accuracies)), stdev=stdev(accuracies)),
        replace(area, n=num, stdev=stdev(areas)),
    ]


def stdev(values: Sequence[float]) -> float:
    """Over runs; NaN of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _made(make: Callable[[], nn.Module], seed: int, run: int, device: torch.device) -> nn.Module:
    """A head, as torch initialises it, of that run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + run)
        return make().to(device)
