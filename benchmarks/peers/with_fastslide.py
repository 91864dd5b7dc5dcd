"""fastslide on local files, behind a DataLoader with two workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import measure
import torch
from fastslide import FastSlide
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class Tiles(IterableDataset[torch.Tensor]):
    """The tiles that were asked for."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._task = task

    def __iter__(self) -> Iterator[torch.Tensor]:
        """This worker's share."""
        info, size = get_worker_info(), self._task["size"]
        slides = [FastSlide.from_file_path(path) for path in self._task["slides"]]
        for slide, x, y in self._task["tiles"][info.id :: info.num_workers]:
            yield torch.from_numpy(slides[slide].read_region((x, y), 0, (size, size)).numpy().copy())


if __name__ == "__main__":
    task = measure.task()
    loader = DataLoader(Tiles(task), batch_size=task["batch"], num_workers=2)
    measure.answer(tiles_per_s=measure.tiles_per_s(loader, task["batch"]))
