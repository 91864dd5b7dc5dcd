"""MosaicML Streaming: MDS shards of JPEG tiles, two workers. Its import name is ours too: never in one environment."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import cut
import measure
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from streaming import MDSWriter, StreamingDataset


class Tiles(StreamingDataset):
    """Tiles as uint8 tensors."""

    def __getitem__(self, at):
        return pil_to_tensor(Image.open(io.BytesIO(super().__getitem__(at)["tile"])))


if __name__ == "__main__":
    task, folder = measure.task(), Path(tempfile.mkdtemp())

    def write() -> None:
        """Shards of its default size."""
        with MDSWriter(out=str(folder), columns={"tile": "bytes"}) as shards:
            for tile in cut.tiles(task):
                shards.write({"tile": cut.jpeg(tile)})

    found = cut.extraction(task, folder, write)
    dataset = Tiles(local=str(folder), shuffle=True, batch_size=task["batch"], epoch_size=len(task["tiles"]) * 20)
    loader = DataLoader(dataset, batch_size=task["batch"], num_workers=2)
    measure.answer(tiles_per_s=measure.tiles_per_s(loader, task["batch"]), **found)
