"""wsistream on local files with OpenSlide, behind a DataLoader with two workers; it draws its own tiles."""

from __future__ import annotations

import measure
from torch.utils.data import DataLoader
from wsistream import OpenSlideBackend, OtsuTissueDetector, RandomSampler
from wsistream.torch import WsiStreamDataset

if __name__ == "__main__":
    task = measure.task()
    dataset = WsiStreamDataset(
        slide_paths=task["slides"],
        backend=OpenSlideBackend(),
        tissue_detector=OtsuTissueDetector(),
        sampler=RandomSampler(patch_size=task["size"], level=0),
        output_dtype="uint8",
        patches_per_slide=100_000,
        seed=0,
    )
    loader = DataLoader(dataset, batch_size=task["batch"], num_workers=2)
    measure.answer(tiles_per_s=measure.tiles_per_s(loader, task["batch"]))
