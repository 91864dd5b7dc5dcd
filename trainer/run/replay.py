"""A step of a run again, from seed, index and the checkpoint before it: what its ranks saw, and what came of it.

Tiles, crops and masks follow from the configuration alone. Losses follow from the weights, so the steps since the
newest checkpoint before are trained again, by the same code on as many ranks, without Ray; nothing is saved.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.fabric.plugins.environments.lightning import LightningEnvironment, find_free_network_port
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, spawn

from streaming import storage
from streaming.catalog import Catalog
from streaming.errors import ConfigError, TilestreamError, TrainingError
from streaming.reading.batch import tile_columns
from trainer.recipe.augment import Crops
from trainer.recipe.network import build_backbone
from trainer.run import checkpoints
from trainer.run.background_checkpoints import NoNewCheckpoints
from trainer.run.config import Config
from trainer.run.data import load_catalog
from trainer.run.fit import Place, fit
from trainer.run.messages import Failed, Row
from trainer.run.metrics_log import METRICS
from trainer.run.step_batches import StepBatches, for_step
from trainer.run.stop_signals import Signals

_POLL_S = 0.5
_THREADS = "OMP_NUM_THREADS"

Told = Callable[[Row], None]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A step, counted from 1 as the metrics are, and where it is made again from."""

    run: str
    step: int
    config: Config
    """the run's, with what is to be different now"""
    checkpoint: str | None
    """the newest before the step; none: the run's start"""
    start: int
    """the step of that checkpoint"""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What a rank saw in one round of a step."""

    tiles: list[Tensor]
    """uint8 (B, S, S, 3), of each view"""
    index: Tensor
    """int64 (B,)"""
    slides: list[str]
    """address of each tile's slide"""
    corners: Tensor
    """int64 (B, 2): x and y of each tile in level-0 pixels, of the first view"""
    mpp: Tensor
    """(B,): of the pixels that were read, of the first view"""
    crops: Crops
    masks: Tensor
    """bool (2, B, N), true where a patch of a global crop is hidden from the student"""


def find_replay(run: str, step: int, config: Config, options: storage.StorageOptions | None = None) -> Replay:
    """What it takes to make a step of a run again.

    Raises:
        ConfigError: the run has no such step.
    """
    if not 1 <= step <= config.train.steps:
        raise ConfigError(f"{run}: no step {step}; its steps are 1 to {config.train.steps}, as in {METRICS}")
    start = max((known for known in checkpoints.steps_of(run, options) if known < step), default=0)
    checkpoint = checkpoints.checkpoint_uri(run, start) if start else None
    found = Replay(run=run, step=step, config=config, checkpoint=checkpoint, start=start)
    # So many as there were when it was trained; they are the same from one checkpoint to the next.
    logged, most = round(logged_row(found).get("ranks", 0)), config.train.most_ranks
    return replace(found, config=config.on(logged if logged in config.possible_ranks else most))


def micro_batches(replay: Replay, catalog: Catalog, rank: int) -> Iterator[MicroBatch]:
    """What a rank saw, a round of accumulation after the other.

    Raises:
        ConfigError: the run has no such rank.
        StreamError: hardly any tile passes.
    """
    config, side = replay.config, replay.config.augment.global_size
    if not 0 <= rank < config.train.most_ranks:
        raise ConfigError(f"{replay.run}: no rank {rank}; its ranks are 0 to {config.train.most_ranks - 1}")
    stream = config.stream(catalog)
    # Where the run made them: a GPU rounds otherwise.
    device = torch.device("cuda" if config.train.gpu and torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        patch_grid = build_backbone(config.model, side).patch_grid(side, side)
    for batch in stream.local_batches(replay.step - 1, replay.step, rank):
        index = batch["index"]
        cut = {name: column.to(device) for name, column in for_step(batch, config.augment).items()}
        crops, masks = config.recipe.views(
            cut["tile"], cut["index"], patch_grid, config.run.seed, cut.get("local_tile")
        )
        yield MicroBatch(
            tiles=[batch[name] for name in tile_columns(batch)],
            index=index,
            slides=[catalog[row].slide for row in batch["slide"].tolist()],
            corners=torch.stack([batch["x"], batch["y"]], dim=1),
            mpp=batch["mpp"],
            crops=Crops(*(part.cpu() for part in crops)),
            masks=masks.cpu(),
        )


def logged_row(replay: Replay) -> Row:
    """What the run logged of the step; empty if nothing."""
    uri, options = storage.join(replay.run, METRICS), replay.config.data.storage_options
    if not storage.exists(uri, options):
        return {}
    found = next((row for row in storage.read_table(uri, options).to_pylist() if row["step"] == replay.step), {})
    return {name: value for name, value in found.items() if value is not None}


def train_again(replay: Replay, tell: Told) -> str | None:
    """Trains from the checkpoint to the step and tells the metrics of each step; returns what broke down, if it did.

    One rank trains in this process, so that a debugger stops in it, several in one process each.

    Raises:
        ConfigError: this machine has too few GPUs for the run's ranks.
        TilestreamError: what ended a rank.
    """
    train = replay.config.train
    if train.gpu and (have := torch.cuda.device_count()) < train.most_ranks:
        raise ConfigError(
            f"{replay.run}: its losses take {train.most_ranks} GPUs, this machine has {have}; "
            "leave them out by --no-losses"
        )
    if train.most_ranks > 1 or train.strategy != "ddp":
        return _train_ranks(replay, tell)
    before = torch.get_num_threads()
    torch.set_num_threads(_num_threads(replay))
    try:
        return _train_rank(replay, 0, None, tell)
    finally:
        torch.set_num_threads(before)


def _num_threads(replay: Replay) -> int:
    """Threads of a rank as Ray has them, by which sums are rounded: what the environment says, else its CPU slots."""
    told = os.environ.get(_THREADS, "").split(",")[0]  # it may be a list, by depth
    return int(told) if told else max(int(replay.config.train.rank_cpus), 1)


class LocalRank(LightningEnvironment):
    """A rank of one machine that somebody else has started."""

    def __init__(self, rank: int, num_ranks: int, port: int) -> None:
        super().__init__()
        self._rank, self._num_ranks, self._port = rank, num_ranks, port

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts none."""
        return True

    @property
    def main_address(self) -> str:
        """Where rank 0 listens."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Its port."""
        return self._port

    def world_size(self) -> int:
        """How many ranks there are."""
        return self._num_ranks

    def global_rank(self) -> int:
        """This one's number."""
        return self._rank

    def local_rank(self) -> int:
        """The same: there is one machine."""
        return self._rank

    def node_rank(self) -> int:
        """That machine's number."""
        return 0

    def set_world_size(self, size: int) -> None:
        """It is known."""

    def set_global_rank(self, rank: int) -> None:
        """It is known."""

    def teardown(self) -> None:
        """Whoever started the rank ends it."""


def _alone(replay: Replay) -> Config:
    """The run's configuration up to the step, every step logged, with nobody watching."""
    config = replay.config
    schedule_steps = config.optim.schedule_steps or config.train.steps
    return replace(
        config,
        run=replace(config.run, out=replay.run),
        optim=replace(config.optim, schedule_steps=schedule_steps),
        train=replace(
            config.train, steps=replay.step, log_every=1, checkpoint_every=replay.step, checkpoint_minutes=None
        ),
        watch=replace(config.watch, knn_dataset=None, validation_slides=0.0),
    )


def _train_rank(replay: Replay, rank: int, place: Place | None, tell: Told) -> str | None:
    config, alone = replay.config, _alone(replay)
    catalog = load_catalog(config.data)
    stream = config.stream(catalog)
    batches = StepBatches(stream.local_batches(replay.start, replay.step, rank), replay.start, config)

    def report(row: Row | Failed) -> None:
        if not isinstance(row, Failed) and "step" in row:
            tell(row)

    try:
        fit(
            alone,
            NoNewCheckpoints(alone, config.identity(catalog)),
            batches,
            replay.checkpoint,
            report,
            Signals(),
            place,
        )
    except TrainingError as error:
        return str(error)
    return None


def _rank_process(rank: int, replay: Replay, port: int, messages: Any) -> None:
    train = replay.config.train
    device = torch.device("cuda", rank) if train.gpu else torch.device("cpu")
    try:
        trouble = _train_rank(replay, rank, Place(device, LocalRank(rank, train.most_ranks, port)), messages.put)
    except TilestreamError as error:
        messages.put(error)
        raise
    if trouble and rank == 0:  # every rank has the same
        messages.put(trouble)


def _train_ranks(replay: Replay, tell: Told) -> str | None:
    messages: Any = mp.get_context("spawn").Queue()
    trouble, errors = list[str](), list[TilestreamError]()

    def take() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                message = messages.get(timeout=_POLL_S)
                if isinstance(message, TilestreamError):
                    errors.append(message)
                elif isinstance(message, str):
                    trouble.append(message)
                else:
                    tell(message)

    arguments = (replay, find_free_network_port(), messages)
    # As Ray starts its ranks, before torch is imported: with `torch.set_num_threads` alone the first step was the same,
    # and the next one differed in the seventh digit.
    before, os.environ[_THREADS] = os.environ.get(_THREADS), str(_num_threads(replay))
    try:
        running: Any = spawn(_rank_process, arguments, replay.config.train.most_ranks, join=False, daemon=True)
    finally:
        if before is None:
            del os.environ[_THREADS]
    try:
        while not running.join(timeout=0):
            take()
        take()
    except ProcessException as error:  # the other ranks were ended, too
        take()
        raise (errors[0] if errors else error) from error
    return trouble[0] if trouble else None
