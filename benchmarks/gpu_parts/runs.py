"""Trainings of some steps in this process, by the code that trains: on constant tiles, or on the stream's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from trainer.run.background_checkpoints import NoNewCheckpoints
from trainer.run.config import Config, read_config
from trainer.run.fit import Place, fit
from trainer.run.fitted import fitted
from trainer.run.metrics_log import Failed, Row
from trainer.run.replay import LocalRank
from trainer.run.step_batches import StepBatches
from trainer.run.stop_signals import Signals

Batches = Callable[[Config], Iterable[dict[str, Any]]]
"""The micro-batches of a run, as the stream gives them."""


def settled(preset: str, *overrides: str) -> Config:
    """A preset on one rank, from random weights, as `tilestream train` would settle it."""
    alone = ("--train.ranks", "1", "--train.accumulate", "1", "--model.init", "null", "--run.loggers", "[]")
    config, _ = fitted(read_config(preset, [*alone, *overrides]))
    return config


def smooth_tiles(num: int, side: int) -> Tensor:
    """Smooth coloured tiles, uint8 (num, side, side, 3), the same each time."""
    noise = torch.rand(num, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=side, mode="bilinear") * 255
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def constant(config: Config) -> Iterator[dict[str, Any]]:
    """The same tiles for each step, which take no time."""
    micro = config.train.shape.micro
    tiles, none = smooth_tiles(micro, config.data.tile_size), torch.zeros(micro, dtype=torch.int64)
    for step in range(config.train.steps):
        index = step * micro + torch.arange(micro)
        yield {"tile": tiles, "index": index, "filtered": none, "failures": [[]] * micro, "turned_down": [[]] * micro}


def trained(
    config: Config,
    batches: Batches = constant,
    *,
    also: Sequence[Callback] = (),
    stop: Callable[[], bool] = lambda: False,
    with_group: bool = False,
) -> list[Row]:
    """Trains a run to its end on one rank, and gives the rows of its metrics; nothing is saved.

    stop is asked after each step. with_group: as one rank of several would, with a process group.
    """
    rows = list[Row]()

    def report(row: Row | Failed) -> None:
        if not isinstance(row, Failed) and "step" in row:
            rows.append(row)

    place = None
    if with_group:
        device = torch.device("cuda", 0) if config.train.gpu else torch.device("cpu")
        place = Place(device, LocalRank(0, 1, find_free_network_port()))
    fed = StepBatches(batches(config), 0, config)
    try:
        fit(config, NoNewCheckpoints(config, ""), fed, None, report, Signals(stop=stop), place, also=also)
    finally:
        if with_group and dist.is_initialized():
            dist.destroy_process_group()
        torch.compiler.reset()
        gc.collect()
        if config.train.gpu:
            torch.cuda.empty_cache()
    return rows
