"""LitData: chunks of JPEG tiles, two workers."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import cut
import measure
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming.cache import Cache
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor


class Tiles(StreamingDataset):
    """Tiles as uint8 tensors."""

    def __getitem__(self, at):
        return pil_to_tensor(Image.open(io.BytesIO(super().__getitem__(at))))


if __name__ == "__main__":
    task, folder = measure.task(), Path(tempfile.mkdtemp())

    def write() -> None:
        """Chunks of 64 MB."""
        cache = Cache(str(folder), chunk_bytes="64MB")
        for at, tile in enumerate(cut.tiles(task)):
            cache[at] = cut.jpeg(tile)
        cache.done()
        cache.merge()

    found = cut.extraction(task, folder, write)

    def forever():
        """Epoch after epoch."""
        while True:
            yield from StreamingDataLoader(
                Tiles(str(folder), shuffle=True, drop_last=True), batch_size=task["batch"], num_workers=2
            )

    measure.answer(tiles_per_s=measure.tiles_per_s(forever(), task["batch"]), **found)
