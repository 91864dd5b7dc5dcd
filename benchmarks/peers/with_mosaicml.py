"""MosaicML Streaming: MDS shards of JPEG tiles, two workers. Its import name is ours too: never in one environment."""

from __future__ import annotations

import io
import os
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
    task = measure.task()

    def write(folder: Path) -> None:
        """Shards of its default size."""
        with MDSWriter(out=str(folder), columns={"tile": "bytes"}) as shards:
            for tile in cut.jpegs(task):
                shards.write({"tile": tile})

    folder, found = cut.extraction(task, write)
    if "remote" in task:
        os.environ["S3_ENDPOINT_URL"] = task["endpoint"]
        where = {"remote": f"s3://{task['remote']}", "local": tempfile.mkdtemp()}
    else:
        where = {"local": str(folder), "epoch_size": len(task["tiles"]) * 20}
    dataset = Tiles(shuffle=True, batch_size=task["batch"], **where)
    loader = DataLoader(dataset, batch_size=task["batch"], num_workers=2)
    measure.answer(tiles_per_s=measure.tiles_per_s(loader, task["batch"]), **found)
