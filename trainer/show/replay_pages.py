"""A step that is made again, as files: for each rank a page to look at, and its tensors."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence

import torch
from safetensors.torch import save

from streaming import storage
from streaming.catalog import Catalog
from streaming.reading.batch import of_view
from streaming.show.page import jpeg_url, page
from streaming.show.pictures import mosaic
from trainer.recipe.augment import Augmentation, Crops
from trainer.run.replay import MicroBatch, Replay, micro_batches
from trainer.show.crops import crop_pictures, with_holes

_COLUMNS, _SIDE = 7, 112
_STYLE = """
main{max-width:1120px;margin:0 auto;padding:24px 20px 64px}h1{font-size:24px;margin:0}
p{color:var(--soft);max-width:90ch}img{max-width:100%;display:block}
figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;margin:0 0 12px}
figcaption{padding-bottom:8px;font-size:13px;overflow-wrap:anywhere}
"""


def write_replay(replay: Replay, catalog: Catalog, ranks: Sequence[int], out: str) -> Iterator[str]:
    """Writes `rank-NN.html` and `rank-NN.safetensors` of each rank to the folder `out`; gives each file's address.

    The tensors are `tile` uint8 (n, S, S, 3), of further views `tile_1` and so on, `index` int64 (n,), `corner` int64
    (n, 2) in level-0 pixels, `mpp` (n,), `global` (2, n, 3, g, g) and `local` (L, n, 3, l, l), normalised float32,
    `mask` bool (2, n, N); their metadata has the addresses of the slides as JSON.

    Raises:
        ConfigError: the run has no such rank.
        TilestreamError: the tiles can't be read, or the files written.
    """
    options = replay.config.data.storage_options
    for rank in ranks:
        seen = _joined(list(micro_batches(replay, catalog, rank)))
        name = storage.join(out, f"rank-{rank:02}")
        tensors = {
            **{of_view("tile", view): tiles for view, tiles in enumerate(seen.tiles)},
            "index": seen.index,
            "corner": seen.corners,
            "mpp": seen.mpp,
            "global": seen.crops.global_,
            "local": seen.crops.local,
            "mask": seen.masks,
        }
        content = save({key: value.contiguous() for key, value in tensors.items()}, {"slides": json.dumps(seen.slides)})
        storage.write_bytes(f"{name}.safetensors", content, options)
        storage.write_bytes(f"{name}.html", _page(replay, rank, seen), options)
        yield f"{name}.html"
        yield f"{name}.safetensors"


def _joined(rounds: Sequence[MicroBatch]) -> MicroBatch:
    return MicroBatch(
        tiles=[torch.cat(of_one) for of_one in zip(*(one.tiles for one in rounds), strict=True)],
        index=torch.cat([one.index for one in rounds]),
        slides=[slide for one in rounds for slide in one.slides],
        corners=torch.cat([one.corners for one in rounds]),
        mpp=torch.cat([one.mpp for one in rounds]),
        crops=Crops(*(torch.cat(parts, dim=1) for parts in zip(*(one.crops for one in rounds), strict=True))),
        masks=torch.cat([one.masks for one in rounds], dim=1),
    )


def _page(replay: Replay, rank: int, seen: MicroBatch) -> bytes:
    title = f"{replay.run}: step {replay.step}, rank {rank}"
    text = (
        "Each tile (of a place with views all), its two global crops, the same as the student sees them (masked "
        "patches are grey), and its local crops."
    )
    figures = "".join(_figure(seen, i, replay.config.augment) for i in range(len(seen.index)))
    body = f"<main><h1>{html.escape(title)}</h1><p>{text}</p>{figures}</main>"
    return page(title, _STYLE, body)


def _figure(seen: MicroBatch, i: int, augment: Augmentation) -> str:
    views = crop_pictures(seen.crops.global_[:, i], augment)
    holed = [with_holes(view, mask.numpy()) for view, mask in zip(views, seen.masks[:, i], strict=True)]
    pictures = [
        *(tiles[i].numpy() for tiles in seen.tiles),
        *views,
        *holed,
        *crop_pictures(seen.crops.local[:, i], augment),
    ]
    x, y = seen.corners[i].tolist()
    hidden = " and ".join(str(int(mask.sum())) for mask in seen.masks[:, i])
    where = f"index {seen.index[i]}: {seen.slides[i]}, x {x}, y {y}, {seen.mpp[i]:.4g} µm/px; {hidden} patches masked"
    drawn = jpeg_url(mosaic(pictures, _COLUMNS, _SIDE), 90)
    return f'<figure><figcaption>{html.escape(where)}</figcaption><img alt="" src="{drawn}"></figure>'
