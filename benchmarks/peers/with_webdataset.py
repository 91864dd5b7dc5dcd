"""WebDataset: tar shards of JPEG tiles, two workers."""

from __future__ import annotations

from pathlib import Path

import cut
import measure
import torch
import webdataset
from torch.utils.data import DataLoader

if __name__ == "__main__":
    task = measure.task()

    def write(folder: Path) -> None:
        """Shards of 500 tiles."""
        with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=500, verbose=0) as shards:
            for at, tile in enumerate(cut.jpegs(task)):
                shards.write({"__key__": f"{at:09d}", "jpg": tile})

    folder, found = cut.extraction(task, write)
    # From a store it reads through a pipe; nothing is kept.
    base = f"{task['endpoint']}/{task['remote']}" if "remote" in task else str(folder)
    urls = [f"{base}/{path.name}" for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=100, resampled=True).shuffle(1000).decode("torchrgb8")
    loader = DataLoader(dataset.to_tuple("jpg"), batch_size=task["batch"], num_workers=2)
    assert next(iter(loader))[0].dtype == torch.uint8
    measure.answer(tiles_per_s=measure.tiles_per_s(loader, task["batch"]), **found)
