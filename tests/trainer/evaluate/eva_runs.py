"""What kaiko's eva 0.4.5 makes of small data: `PYTHON tests/trainer/evaluate/eva_runs.py tests/data/eva-0.4.5.json`.

PYTHON is one that has `kaiko-eva[vision]==0.4.5`. The file has the scores of every epoch, and of the head of the best
one. Heads begin with given weights and see all samples in each step, so that nothing is left to chance. The data and
the weights are what `test_eva.py` takes, too; nothing else here is of this project.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZES = {"train": 90, "val": 60, "test": 60}
WIDTH, PIXELS = 16, 32


def labels_of(split: str, num_classes: int) -> np.ndarray:
    """Labels (N,)."""
    return np.arange(SIZES[split]) % num_classes


def embeddings(split: str, num_classes: int) -> np.ndarray:
    """Noisy embeddings (N, WIDTH) of a part."""
    random = np.random.default_rng(sorted(SIZES).index(split))
    found = random.standard_normal((SIZES[split], WIDTH)) + 0.9 * np.eye(WIDTH)[labels_of(split, num_classes)]
    return (8 * found).astype(np.float32)  # so that a small learning rate does something


def bags(split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Slides' embeddings, and their labels: a few tiles tell the class."""
    random = np.random.default_rng(10 + sorted(SIZES).index(split))
    labels = np.arange(24 if split == "train" else 16) % 2
    found = [random.standard_normal((int(random.integers(5, 20)), WIDTH)).astype(np.float32) for _ in labels]
    for bag, label in zip(found, labels, strict=True):
        bag[:2, 0] += 2.0 * label
    return found, labels


def tokens(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Patch tokens (n, 8, 4, 4), halves' numbers, and masks (n, PIXELS, PIXELS) of three classes."""
    random = np.random.default_rng(20 + sorted(SIZES).index(split))
    coarse = random.integers(0, 3, (12, 4, 4))
    coarse[0] = 0  # an image of background alone
    found = random.standard_normal((12, 8, 4, 4)) + 1.5 * np.eye(8)[coarse].transpose(0, 3, 1, 2)
    return found.astype(np.float16), coarse.repeat(PIXELS // 4, 1).repeat(PIXELS // 4, 2)


def pinned(head: torch.nn.Module) -> torch.nn.Module:
    """The head with weights that follow from their order and shape."""
    for i, weight in enumerate(head.parameters()):
        values = np.random.default_rng(100 + i).standard_normal(tuple(weight.shape)) * 0.1
        weight.data = torch.from_numpy(values.astype(np.float32))
    return head


def sums(head: torch.nn.Module) -> list[float]:
    """A number of each weight, which tells it from others."""
    found = []
    for weight in head.parameters():
        values = weight.detach().numpy().astype(np.float64).ravel()
        found.append(float((values * np.cos(np.arange(len(values)))).sum()))
    return found


def _recorded() -> Any:
    from lightning.pytorch import Callback

    class Recorder(Callback):
        """Writes the scores of each epoch on `val`, then those on `test` and the head that gave them."""

        def __init__(self, out: str, monitor: str) -> None:
            self.out, self.monitor, self.scores = out, monitor, []

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking and trainer.state.fn == "fit":
                self.scores.append(float(trainer.callback_metrics[self.monitor]))

        def on_test_end(self, trainer: Any, module: Any) -> None:
            head = module.head if hasattr(module, "head") else module.decoder
            test = {name: float(value) for name, value in trainer.callback_metrics.items() if "test/" in name}
            Path(self.out).write_text(json.dumps({"val": self.scores, "test": test, "head": sums(head)}))

    return Recorder


def linear(outputs: int) -> torch.nn.Module:
    return pinned(torch.nn.Linear(WIDTH, outputs))


def attention() -> torch.nn.Module:
    from eva.vision.models.networks import ABMIL

    return pinned(ABMIL(input_size=WIDTH, output_size=1, projected_input_size=128))


def decoder() -> torch.nn.Module:
    from eva.vision.models.networks.decoders.segmentation import ConvDecoderMS

    return pinned(ConvDecoderMS(in_features=8, num_classes=3))


def _session(folder: Path, make: Any, model: Any, dataset: Any, monitor: str, batch: int, **limits: int) -> Any:
    """One run of eva's own session, with the limits of a configuration."""
    import eva
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    patience = limits.pop("patience")
    trainer = eva.Trainer(
        default_root_dir=str(folder / "logs"),
        accelerator="cpu",
        checkpoint_type="best",
        logger=False,
        enable_progress_bar=False,
        callbacks=[
            ModelCheckpoint(filename="best", save_top_k=1, monitor=monitor, mode="max"),
            EarlyStopping(min_delta=0, patience=patience, monitor=monitor, mode="max"),
            _recorded()(str(folder / "found.json"), monitor),
        ],
        **limits,
    )
    loader = {"batch_size": batch, "num_workers": 0, "persistent_workers": False, "prefetch_factor": None}
    data = eva.DataModule(
        datasets=eva.core.data.datamodules.schemas.DatasetsSchema(**{part: dataset(part) for part in SIZES}),
        dataloaders=eva.core.data.datamodules.schemas.DataloadersSchema(
            train=eva.DataLoader(shuffle=True, **loader), val=eva.DataLoader(**loader), test=eva.DataLoader(**loader)
        ),
    )
    trainer.run_evaluation_session(model(make()), data)
    return json.loads((folder / "found.json").read_text())


def golden(out: str) -> None:
    """What eva makes of it all."""
    from functools import partial

    import eva
    import pandas as pd
    from eva.core.data import transforms
    from eva.core.metrics.structs import MetricsSchema
    from eva.core.models.modules.utils.batch_postprocess import BatchPostProcess
    from eva.core.models.transforms import AsDiscrete
    from eva.vision import losses
    from eva.vision.data import datasets as vision
    from eva.vision.metrics.defaults import MulticlassSegmentationMetrics
    from eva.vision.models.modules import SemanticSegmentationModule

    folder, found = Path(tempfile.mkdtemp()), {}

    def written(name: str, part: str, items: list[Any], targets: list[Any], **more: Any) -> dict[str, str]:
        place = folder / name
        place.mkdir(exist_ok=True)
        rows = []
        for i, (item, target) in enumerate(zip(items, targets, strict=True)):
            torch.save(torch.from_numpy(item), place / f"{part}{i}.pt")
            if isinstance(target, np.ndarray):
                torch.save(torch.from_numpy(target), place / f"{part}{i}-mask.pt")
                target = f"{part}{i}-mask.pt"
            rows.append({"embeddings": f"{part}{i}.pt", "target": target, "split": part, "wsi_id": f"{part}{i}"})
        pd.DataFrame(rows).to_csv(place / f"{part}.csv", index=False)
        return {"root": str(place), "manifest_file": f"{part}.csv", "split": part, **more}

    optimizer = partial(torch.optim.AdamW, lr=3e-4)
    for num_classes in (2, 3):
        binary = num_classes == 2

        def classified(part: str, num_classes: int = num_classes, binary: bool = binary) -> Any:
            labels = labels_of(part, num_classes).tolist()
            more = {"target_transforms": lambda label: label.float()} if binary else {}
            where = written(f"linear{num_classes}", part, list(embeddings(part, num_classes)), labels, **more)
            return eva.datasets.EmbeddingsClassificationDataset(**where)

        kind = eva.metrics.BinaryClassificationMetrics() if binary else None
        metrics = MetricsSchema(common=[kind or eva.metrics.MulticlassClassificationMetrics(num_classes=num_classes)])
        loss = torch.nn.BCEWithLogitsLoss() if binary else torch.nn.CrossEntropyLoss()
        monitor = "val/BinaryBalancedAccuracy" if binary else "val/MulticlassAccuracy"
        found[f"linear {num_classes}"] = _session(
            folder,
            partial(linear, 1 if binary else num_classes),
            lambda head, loss=loss, metrics=metrics: eva.HeadModule(
                head=head, criterion=loss, optimizer=optimizer, metrics=metrics
            ),
            classified,
            monitor,
            256,
            max_steps=150,
            patience=30,
        )

    def slides(part: str) -> Any:
        some, labels = bags(part)
        where = written("slides", part, some, labels.tolist())
        return eva.datasets.MultiEmbeddingsClassificationDataset(
            embeddings_transforms=transforms.Pad2DTensor(20),
            target_transforms=transforms.dtype.ArrayToFloatTensor(),
            **where,
        )

    found["slide"] = _session(
        folder,
        attention,
        lambda head: eva.HeadModule(
            head=head,
            criterion=torch.nn.BCEWithLogitsLoss(),
            optimizer=partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.999)),
            metrics=MetricsSchema(common=[eva.metrics.BinaryClassificationMetrics()]),
        ),
        slides,
        "val/BinaryBalancedAccuracy",
        32,
        max_epochs=100,
        patience=20,
    )

    def masked(part: str) -> Any:
        some, masks = tokens(part)
        where = written("masks", part, [one.astype(np.float32) for one in some], list(masks))
        return vision.EmbeddingsSegmentationDataset(**where)

    found["masks"] = _session(
        folder,
        decoder,
        lambda head: SemanticSegmentationModule(
            decoder=head,
            criterion=losses.DiceLoss(softmax=True, batch=True),
            optimizer=partial(torch.optim.AdamW, lr=2e-3),
            postprocess=BatchPostProcess(predictions_transforms=[AsDiscrete(argmax=True, keepdim=False)]),
            metrics=MetricsSchema(evaluation=[MulticlassSegmentationMetrics(num_classes=3)]),
        ),
        masked,
        "val/MonaiDiceScore",
        64,
        max_steps=60,
        patience=12,
    )
    random = np.random.default_rng(7)
    logits, target = random.standard_normal((2, 3, 8, 8)).astype(np.float32), random.integers(0, 3, (2, 8, 8))
    target[0, :3] = 255
    loss = losses.DiceLoss(softmax=True, batch=True, ignore_index=255)
    found["loss with unknown pixels"] = float(loss(torch.from_numpy(logits), torch.from_numpy(target)))
    from eva.vision.data.transforms.common import ResizeAndCrop
    from torchvision import tv_tensors

    image = random.integers(0, 256, (3, 300, 260), dtype=np.uint8)
    shown = ResizeAndCrop(224, mean=[0.0] * 3, std=[1.0] * 3)(tv_tensors.Image(torch.from_numpy(image)))
    found["image"] = (shown[:, ::37, ::41] * 255).round().int().tolist()
    Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    golden(sys.argv[1])
