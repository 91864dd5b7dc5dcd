"""kNN accuracy of the teacher while it trains: on a small labelled set, each rank embedding its share between steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from streaming.errors import ConfigError

if TYPE_CHECKING:
    from trainer.embed.table_slides import TableSlides
    from trainer.evaluate.datasets import Samples
    from trainer.recipe.module import DinoModule
    from trainer.run.config import Config

# What scores (scikit-learn, two seconds) is imported where it is asked for: every training names this class.

_BATCH = 64


def watched(config: Config) -> Samples:
    """The labelled tiles of `watch.knn_dataset`.

    Raises:
        ConfigError: they can't be scored by kNN, or are more than `watch.knn_tiles`.
        SlideError, StorageError: they can't be read.
    """
    from trainer.evaluate.options import EvaluateOptions
    from trainer.evaluate.scoring import labelled

    watch, options = config.watch, EvaluateOptions(tasks=("knn",), k=config.watch.knn_k)
    assert watch.knn_dataset is not None, "there is a dataset"
    samples = labelled(watch.knn_dataset, options, config.data.storage_options, _slides(config))
    if len(samples) > watch.knn_tiles:
        raise ConfigError(
            f"watch.knn_dataset {watch.knn_dataset}: {len(samples):,} tiles, which each rank would hold its share of; "
            f"take a smaller set, or raise watch.knn_tiles above {watch.knn_tiles:,}"
        )
    return samples


def _slides(config: Config) -> TableSlides:
    """Opens the slides that the dataset names: as the run's catalog knows them, others as they are."""
    from trainer.embed.options import SlideOptions
    from trainer.embed.table_slides import TableSlides

    data = config.data
    wanted = SlideOptions(
        slides_in=(data.catalog,) if data.catalog else (), max_upsampling=max(1.0, data.max_upsampling)
    )
    remedy = "add it to data.catalog, which may tell it, or take images of tiles for watch.knn_dataset"
    return TableSlides(wanted, data.slide_options, or_elsewhere=True, remedy=remedy)


class KnnWatch:
    """Holds a rank's share of the tiles, read once, and scores the teacher on all of them."""

    def __init__(self, config: Config, rank: int, num_ranks: int) -> None:
        from trainer.evaluate.features import TileFiles
        from trainer.evaluate.options import EvaluateOptions
        from trainer.evaluate.splits import make_folds

        self._samples = samples = watched(config)
        self._options = EvaluateOptions(tasks=("knn",), k=config.watch.knn_k)
        self._folds = make_folds(samples, self._options.folds, self._options.seed)
        # As many for each rank, so that all pass the same number of batches through what may be sharded.
        count = math.ceil(len(samples) / num_ranks)
        own = [samples.tiles[(at * num_ranks + rank) % len(samples)] for at in range(count)]
        tiles = TileFiles(config.data.storage_options, slides=_slides(config))
        self._tiles = np.concatenate([pixels for pixels, _ in tiles.batches(own, _BATCH)])
        self._config = config

    @staticmethod
    def check(config: Config) -> int:
        """How many tiles are followed.

        Raises:
            TilestreamError: as `watched`.
        """
        return len(watched(config))

    @torch.no_grad()
    def accuracy(self, module: DinoModule, gather: Callable[[Tensor], Tensor]) -> float:
        """Balanced accuracy over the folds; `gather` gives all ranks' tensors in a new first dimension."""
        from trainer.embed.model import model_of
        from trainer.evaluate.scoring import score_tiles

        was_training = module.teacher.training
        model, teacher = model_of("teacher", self._config.augment, module.teacher.backbone), module.teacher
        no_patches = torch.zeros(0, dtype=torch.int64, device=module.device)
        parts: list[Tensor] = []
        for at in range(0, len(self._tiles), _BATCH):
            images = model.images(torch.from_numpy(self._tiles[at : at + _BATCH]).to(module.device))
            # The whole network, heads and all: shards are gathered by its outermost module.
            (cls,), _, _ = teacher([images], [None], no_patches)
            parts.append(cls.float())
        teacher.train(was_training)  # in another mode, compiled blocks would be compiled anew
        # Ranks side by side, tile by tile: the order of the samples.
        found = gather(torch.cat(parts)).reshape(-1, len(self._tiles), parts[0].shape[1]).transpose(0, 1)
        embeddings = found.flatten(0, 1)[: len(self._samples)].cpu().numpy()
        (score,) = score_tiles(embeddings, self._samples, self._folds, ("knn",), self._options)
        return score.value
