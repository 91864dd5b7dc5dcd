"""A frozen model, and what it makes of tiles: embeddings, and patch tokens kept on disk."""

from __future__ import annotations

import difflib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming import storage
from streaming.errors import CheckpointError, ConfigError, SlideError
from streaming.reader import SlidePool
from streaming.slide import Slide, open_slide
from streaming.slide.geometry import Pixels, resize
from trainer.backbone import Backbone, Tokens, create_backbone
from trainer.config import Config
from trainer.embed import Token, load_backbone
from trainer.evaluate.annotations import checked_mpp
from trainer.evaluate.datasets import Tile
from trainer.evaluate.images import read_image
from trainer.weights import hub_weights, load_published, read_weights

_READERS = 8
_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class Model:
    """A frozen backbone and how it wants its images."""

    name: str
    backbone: Backbone
    mean: tuple[float, ...]
    std: tuple[float, ...]
    token: Token = "cls"
    """what an embedding is: class token, mean patch token, or one after the other"""

    def on(self, device: torch.device) -> Model:
        """The model on that device."""
        return replace(self, backbone=self.backbone.to(device))

    @torch.inference_mode()
    def tokens(self, tiles: Pixels) -> Tokens:
        """Tokens of tiles uint8 (n, H, W, 3), resized where the patch size does not divide their sides."""
        device = self.backbone.mask_token.device
        images = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2).float() / 255
        patch = self.backbone.patch_size
        height, width = (max(patch, side // patch * patch) for side in images.shape[-2:])
        if (height, width) != images.shape[-2:]:
            images = torch.nn.functional.interpolate(
                images, size=(height, width), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (self.mean, self.std))
        return self.backbone((images - mean) / std)

    def embedding(self, tokens: Tokens) -> Tensor:
        """Embeddings (n, D), or (n, 2D) of class and patch token."""
        mean_patch = tokens.patches.mean(dim=1)
        chosen = {"cls": [tokens.cls], "patch": [mean_patch], "cls+patch": [tokens.cls, mean_patch]}[self.token]
        return torch.cat(chosen, dim=1).float()


def load_model(source: str, token: Token | None = None, options: storage.StorageOptions | None = None) -> Model:
    """The model of a run's folder or checkpoint, of a folder that `tilestream export` wrote, or of timm's hub.

    token None: the class token, or what the export says.

    Raises:
        CheckpointError: there is none, it is damaged, or it can't be fetched.
        ConfigError: a name of timm's that is no plain vision transformer.
    """
    config_uri = storage.join(source, "config.json")
    if "://" not in source and timm.is_model(source):
        model = _of_hub(source)
    elif storage.exists(config_uri, options):
        model = _of_export(source, json.loads(storage.read_bytes(config_uri, options)), options)
    else:
        try:
            config, backbone = load_backbone(source, options)
        except CheckpointError as error:
            if "no checkpoint here" not in str(error):
                raise
            close = difflib.get_close_matches(source, timm.list_models("vit_*"), n=1)
            hint = f", such as {close[0]}" if close else ""
            raise CheckpointError(
                f"{source}: neither a run, nor an exported model, nor a model of timm's{hint}; check the name"
            ) from error
        model = model_of(source, config, backbone)
    return replace(model, token=token or model.token)


def model_of(name: str, config: Config, backbone: Backbone) -> Model:
    """A backbone as its training showed it images."""
    augment = config.augment
    return Model(name=name, backbone=backbone.eval(), mean=tuple(augment.mean), std=tuple(augment.std))


def _of_hub(name: str) -> Model:
    if not timm.is_model_pretrained(name):
        raise CheckpointError(f"{name}: timm has no weights of this name; see timm.list_pretrained('vit_*')")
    about = cast(Any, timm.get_pretrained_cfg(name))
    weights = hub_weights(name)
    backbone = _built(name, weights, img_size=int(about.input_size[-1]))
    load_published(backbone, weights, name)
    return Model(name=name, backbone=backbone.eval(), mean=tuple(about.mean), std=tuple(about.std))


def _of_export(folder: str, about: dict[str, Any], options: storage.StorageOptions | None) -> Model:
    if "architecture" not in about or "pretrained_cfg" not in about:
        raise CheckpointError(f"{folder}: config.json is not in timm's layout; export it by --layout timm")
    arguments, images = about.get("model_args") or {}, about["pretrained_cfg"]
    weights = read_weights(storage.join(folder, "model.safetensors"), options)
    registers, patch = arguments.get("reg_tokens"), arguments.get("patch_size")
    size = int(np.max(arguments.get("img_size") or images["input_size"][-1]))  # timm notes a pair
    backbone = _built(about["architecture"], weights, img_size=size, num_registers=registers, patch_size=patch)
    load_published(backbone, weights, folder)
    token = cast(Token, (about.get("tilestream") or {}).get("embedding", "cls"))
    mean, std = tuple(images["mean"]), tuple(images["std"])
    return Model(name=folder, backbone=backbone.eval(), mean=mean, std=std, token=token)


def _built(name: str, weights: dict[str, Tensor], **options: Any) -> Backbone:
    """The network that weights in timm's naming are of.

    Raises:
        ConfigError: timm's model of that name is no plain vision transformer.
    """
    layer_scale = 1e-5 if any(key.endswith("ls1.gamma") for key in weights) else None
    try:
        return create_backbone(name, layer_scale=layer_scale, **options)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error


class TileFiles:
    """Reads tiles wherever they are, in threads; slides stay open."""

    def __init__(self, options: storage.StorageOptions | None, size: int | None = None) -> None:
        """`size` is what images are resized to; None: as they are, which must all be of one size then."""
        self._options, self._size = options, size
        self._pool: SlidePool[tuple[str, float, float | None]] = SlidePool(self._open)

    def _open(self, key: tuple[str, float, float | None]) -> Slide:
        uri, wanted, mpp = key
        slide = open_slide(uri, self._options, mpp=mpp)
        checked_mpp(uri, slide.mpp, wanted)
        return slide

    def read(self, tile: Tile) -> Pixels:
        """One tile, uint8 (H, W, 3).

        Raises:
            SlideError: it can't be read, or the slide lacks its resolution.
            StorageError: it can't be reached.
        """
        region = tile.region
        if region is None:
            pixels = read_image(tile.uri, self._options)
        else:
            pixels = np.empty((region.size, region.size, 3), dtype=np.uint8)
            key = (tile.uri, region.mpp, region.slide_mpp)
            self._pool.begin_tile(key, region.x, region.y, region.mpp, region.size)(pixels)
        if self._size is None or pixels.shape[:2] == (self._size, self._size):
            return pixels
        resized = np.empty((self._size, self._size, 3), dtype=np.uint8)
        resize(pixels, resized)
        return resized

    def batches(self, tiles: Sequence[Tile], batch: int) -> Iterator[Pixels]:
        """Tiles uint8 (n, H, W, 3), so many at once, in order, read a few batches ahead.

        Raises:
            SlideError, StorageError: as `read`; images differ in size.
        """
        waiting, queued = iter(tiles), deque[Future[Pixels]]()
        shape: tuple[int, ...] | None = None
        with ThreadPoolExecutor(_READERS) as threads:
            while True:
                queued.extend(threads.submit(self.read, tile) for tile in islice(waiting, batch * _AHEAD - len(queued)))
                if not queued:
                    return
                try:
                    found = [queued.popleft().result() for _ in range(min(batch, len(queued)))]
                except BaseException:
                    threads.shutdown(cancel_futures=True)
                    raise
                shape = shape or found[0].shape
                if other := next((pixels.shape for pixels in found if pixels.shape != shape), None):
                    raise SlideError(
                        f"{tiles[0].uri} and others: {shape[1]} × {shape[0]} px, and {other[1]} × {other[0]} px; "
                        "give one --resize for all"
                    )
                yield np.stack(found)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a model makes of tiles, in their order."""

    embeddings: NDArray[np.float32]
    """(N, D)"""
    patches: NDArray[np.float16] | None
    """patch tokens (N, rows, columns, D), a file that is mapped; None where they are not wanted"""
    side: tuple[int, int]
    """height and width of the tiles in px"""


@contextmanager
def extracted(
    model: Model,
    tiles: Sequence[Tile],
    *,
    patches: bool = False,
    resize_to: int | None = None,
    batch: int = 64,
    options: storage.StorageOptions | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Generator[Features]:
    """Passes tiles through a model once; patch tokens, which may be many, lie in a file while the block runs.

    Raises:
        SlideError, StorageError: a tile can't be read, or the tiles differ in size.
    """
    embeddings: list[NDArray[np.float32]] = []
    held: NDArray[np.float16] | None = None
    done, side = 0, (0, 0)
    with TemporaryDirectory(prefix="tilestream-") as folder:
        for pixels in TileFiles(options, resize_to).batches(tiles, batch):
            tokens = model.tokens(pixels)
            embeddings.append(model.embedding(tokens).cpu().numpy())
            side = (pixels.shape[1], pixels.shape[2])
            if patches:
                patch = model.backbone.patch_size
                grid = tokens.patches.unflatten(1, (max(1, side[0] // patch), max(1, side[1] // patch)))
                if held is None:
                    shape, path = (len(tiles), *grid.shape[1:]), Path(folder, "patches.npy")
                    held = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
                held[done : done + len(pixels)] = grid.half().cpu().numpy()
            done += len(pixels)
            progress(done)
        yield Features(embeddings=np.concatenate(embeddings), patches=held, side=side)
