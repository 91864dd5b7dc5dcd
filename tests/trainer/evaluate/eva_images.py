"""A table of images as a data set of kaiko's eva; imported by eva alone, where it is installed."""

import csv
from pathlib import Path

import torch
from eva.vision.data.datasets import VisionDataset
from eva.vision.utils import io


class Images(VisionDataset):
    """Images of one part of a table of path, label and split."""

    def __init__(self, table: str, split: str, transforms=None) -> None:
        super().__init__(transforms=transforms)
        with Path(table).open() as file:
            rows = list(csv.DictReader(file))
        self._folder, self._codes = Path(table).parent, sorted({row["label"] for row in rows})
        self._rows = [row for row in rows if row["split"] == split]

    def filename(self, index: int) -> str:
        return self._rows[index]["path"]

    def load_data(self, index: int):
        return io.read_image_as_tensor(str(self._folder / self.filename(index)))

    def load_target(self, index: int) -> torch.Tensor:
        return torch.tensor(self._codes.index(self._rows[index]["label"]), dtype=torch.long)

    def __len__(self) -> int:
        return len(self._rows)
