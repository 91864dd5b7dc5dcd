"""Batches through a model: on a GPU, one is on its way there, and one on its way back, while another is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming.errors import ConfigError
from trainer.embed.model import Model

NOT_FINITE = "not finite: the model broke down; take an earlier checkpoint, or --precision 32"
"""what is said of an embedding"""


class Made(NamedTuple):
    """What a model makes of n tiles."""

    embeddings: NDArray[np.float32]
    """(n, width)"""
    patches: NDArray[np.float16] | None
    """patch tokens (n, rows, columns, D); None where they are not wanted"""


def check_finite(what: str, embeddings: NDArray[Any]) -> None:
    """Refuses embeddings (n, width) that no score or picture can be made of.

    Raises:
        ConfigError: some are not finite.
    """
    if num := len(embeddings) - np.isfinite(embeddings).all(axis=1).sum():
        raise ConfigError(f"{what}: {num:,} of {len(embeddings):,} embeddings are {NOT_FINITE}")


class Begun:
    """Tiles that are on their way through a model; its parts one after the other."""

    def __init__(self, parts: list[tuple[list[Tensor], torch.cuda.Event | None]]) -> None:
        self._parts = parts

    def result(self) -> Made:
        """Waits for them."""
        for _, done in self._parts:
            if done is not None:
                done.synchronize()
        columns = [
            np.concatenate(column) for column in zip(*(map(Tensor.numpy, part) for part, _ in self._parts), strict=True)
        ]
        return Made(columns[0], columns[1] if len(columns) > 1 else None)


class Passes:
    """Passes batches of tiles through a model, on the device that it is on.

    What does not fit into a GPU's memory at once goes through in halves, from then on.

    Args:
        model: what they go through.
        patches: whether patch tokens are wanted, too.
        compiled: whether its blocks are compiled at the first batch, which takes a minute.
    """

    def __init__(self, model: Model, *, patches: bool, compiled: bool = False) -> None:
        self._model, self._patches = model, patches
        self._most: int | None = None
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        if compiled:
            for block in cast(Any, model.backbone.vit.blocks):
                block.compile()

    def begin(self, tiles: NDArray[np.uint8]) -> Begun:
        """Starts with tiles uint8 (n, H, W, 3), without waiting for a GPU.

        Raises:
            torch.OutOfMemoryError: not even one fits into the GPU's memory.
        """
        parts: list[tuple[list[Tensor], torch.cuda.Event | None]] = []
        at = 0
        while at < len(tiles):
            some = tiles[at : at + (self._most or len(tiles))]
            try:
                parts.append(self._start(some))
            except torch.OutOfMemoryError:
                if len(some) == 1:
                    raise
                self._most = len(some) // 2
            else:
                at += len(some)
        return Begun(parts)

    def through(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[Made]:
        """What the model makes of batches, in order, each given when the next one has begun."""
        begun: Begun | None = None
        for tiles in batches:
            last, begun = begun, self.begin(tiles)
            if last is not None:
                yield last.result()
        if begun is not None:
            yield begun.result()

    def _start(self, tiles: NDArray[np.uint8]) -> tuple[list[Tensor], torch.cuda.Event | None]:
        model = self._model
        tokens = model.tokens(self._uploaded(tiles))
        made = [model.embedding(tokens)]
        if self._patches:
            rows, columns = (model.side(side) // model.backbone.patch_size for side in tiles.shape[1:3])
            made.append(tokens.patches.unflatten(1, (rows, columns)).half())
        if self._stream is None:
            return made, None
        hosts = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in made]
        for host, one in zip(hosts, made, strict=True):
            host.copy_(one, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return hosts, done

    def _uploaded(self, tiles: NDArray[np.uint8]) -> Tensor:
        """The tiles where the model is."""
        # A copy in any case: what comes from Ray's object store is read-only, which torch has no notion of.
        host = torch.empty(tiles.shape, dtype=torch.uint8, pin_memory=self._stream is not None)
        host.numpy()[...] = tiles
        if self._stream is None:
            return host
        with torch.cuda.stream(self._stream):
            pixels = host.to(self._model.device, non_blocking=True)
        here = torch.cuda.current_stream(self._model.device)
        here.wait_stream(self._stream)
        pixels.record_stream(here)
        return pixels
