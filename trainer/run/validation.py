"""The loss on patients that are never trained on: every term, on the same tiles, crops and masks each time.

Their patients are the last in the order by which shares of a catalog are drawn (`streaming.plan.universe`), so that the
same ones stay out whatever the run's seed, its length or the share of the others that it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from streaming.catalog import Catalog
from streaming.delivery.stream import TileStream
from streaming.plan.universe import HeldOut, Universe
from streaming.reading.reader import TileReader
from trainer.recipe.module import DinoModule
from trainer.run.config import Config
from trainer.run.data import load_catalog, make_stream
from trainer.run.step_batches import for_step

_PREFIX = "validation_"


def held_out_stream(config: Config, catalog: Catalog) -> TileStream:
    """The tiles of the patients that are held out, whatever part of the others is trained on, in whatever order.

    Raises:
        PlanError: none of their slides can give what is asked for.
    """
    data = replace(config.data, universe=Universe(seed=config.data.universe.seed))
    held_out = HeldOut(config.watch.validation_slides, is_drawn=True)
    return make_stream(data, config.run.seed, config.train.shape, catalog, held_out)


class Validation:
    """A rank's share of the tiles that are held out, in memory as uint8."""

    def __init__(self, config: Config, rank: int) -> None:
        """Reads them.

        Raises:
            PlanError: no slide that is held out can give what is asked for.
            CatalogError, StorageError: the catalog or a slide can't be read.
        """
        shape, catalog = config.train.shape, load_catalog(config.data)
        stream = held_out_stream(config, catalog)
        reader = TileReader(stream.plan, catalog, stream.reader)
        rounds = -(-config.watch.validation_tiles // (shape.micro * shape.ranks))
        firsts = [(turn * shape.ranks + rank) * shape.micro for turn in range(rounds)]
        indices = [np.arange(first, first + shape.micro, dtype=np.int64) for first in firsts]
        found = (reader({"index": index}) for index in indices)
        self.batches = [
            {name: torch.from_numpy(column) for name, column in for_step(batch, config.augment).items()}
            for batch in found
        ]

    def terms(self, module: DinoModule, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Each term's mean over all tiles, the same on all ranks; all of them must call it together.

        `gather` gives all ranks' tensors in a new first dimension.
        """
        found = [
            module.validation_terms(
                module.step_input(tree_map_only(Tensor, lambda part: part.to(module.device), module.drawn(batch)))
            )
            for batch in self.batches
        ]
        mean = torch.stack([torch.stack([value.float() for value in terms.values()]) for terms in found]).mean(dim=0)
        values = gather(mean).view(-1, len(mean)).mean(dim=0).tolist()
        return {f"{_PREFIX}{name}": value for name, value in zip(found[0], values, strict=True)}
