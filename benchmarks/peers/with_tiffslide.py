"""tiffslide over s3fs, behind a DataLoader with two workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import measure
import numpy as np
import torch
from tiffslide import TiffSlide
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class Tiles(IterableDataset[torch.Tensor]):
    """The tiles that were asked for."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._task = task

    def __iter__(self) -> Iterator[torch.Tensor]:
        """This worker's share."""
        info, size = get_worker_info(), self._task["size"]
        options = {
            "anon": True,
            "endpoint_url": self._task["endpoint"],
            "client_kwargs": {"region_name": "us-east-1"},
        }
        slides = [TiffSlide(uri, storage_options=options) for uri in self._task["slides"]]
        for slide, x, y in self._task["tiles"][info.id :: info.num_workers]:
            yield torch.from_numpy(np.array(slides[slide].read_region((x, y), 0, (size, size), as_array=True)))


if __name__ == "__main__":
    task = measure.task()
    # A batch takes it seconds: small ones, so that there is something to count.
    batch = 16
    measure.answer(tiles_per_s=measure.tiles_per_s(DataLoader(Tiles(task), batch_size=batch, num_workers=2), batch))
