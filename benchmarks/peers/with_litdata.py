"""LitData: chunks of JPEG tiles, two workers."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import cut
import measure
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming import downloader
from litdata.streaming.cache import Cache
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor


class Tiles(StreamingDataset):
    """Tiles as uint8 tensors."""

    def __getitem__(self, at):
        return pil_to_tensor(Image.open(io.BytesIO(super().__getitem__(at))))


if __name__ == "__main__":
    task = measure.task()

    def write(folder: Path) -> None:
        """Chunks of 64 MB."""
        cache = Cache(str(folder), chunk_bytes="64MB")
        for at, tile in enumerate(cut.jpegs(task)):
            cache[at] = tile
        cache.done()
        cache.merge()

    folder, found = cut.extraction(task, write)
    where = {"input_dir": str(folder)}
    if "remote" in task:
        # Its way through obstore takes https only; by boto3 it takes any endpoint.
        downloader._OBSTORE_AVAILABLE = False
        options = {"endpoint_url": task["endpoint"], "region_name": "us-east-1"}
        where = {"input_dir": f"s3://{task['remote']}", "cache_dir": tempfile.mkdtemp(), "storage_options": options}

    def batches():
        """Epoch after epoch; of shards in a store one, as the next ones come from the cache."""
        while True:
            yield from StreamingDataLoader(
                Tiles(shuffle=True, drop_last=True, **where), batch_size=task["batch"], num_workers=2
            )
            if "remote" in task:
                return

    measure.answer(tiles_per_s=measure.tiles_per_s(batches(), task["batch"]), **found)
