"""One rank: Lightning turns its steps, in this process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback

from streaming.errors import ConfigError
from trainer.recipe.module import DinoModule, Fill
from trainer.run import first_weights, starting_weights
from trainer.run.after_step import AfterStep, ProbeKind, garbage_left_to_steps
from trainer.run.background_checkpoints import FolderCheckpointIO
from trainer.run.config import Config
from trainer.run.device_feed import DeviceFeed
from trainer.run.execution import TrainConfig
from trainer.run.messages import Report
from trainer.run.step_batches import StepBatches
from trainer.run.stop_signals import Signals
from trainer.run.strategy import OneDevice, Replicas, Shards, autocast_precision, prepare


def bare_module(config: Config, *, few_kernels: bool = False, fill: Fill | None = None) -> DinoModule:
    """What a run trains, on the meta device until it is filled; few_kernels and fill as `DinoModule` takes them.

    Raises:
        ValueError: a model, crops or schedules that make no sense.
    """
    train = config.train
    with torch.device("meta"):
        return DinoModule(
            config.recipe,
            config.run.seed,
            steps=train.steps,
            batch=train.batch,
            log_every=train.log_every,
            few_kernels=few_kernels,
            compile_crops=few_kernels and train.compile,
            prepare=partial(prepare, train),
            fill=fill,
        )


def make_module(config: Config, *, few_kernels: bool = False) -> DinoModule:
    """The same on the host, with the weights that the run starts from.

    Raises:
        ValueError, CheckpointError, StorageError: as `bare_module` and `first_weights.fill`.
    """
    module = bare_module(config, few_kernels=few_kernels)
    device = torch.device("cpu")
    first_weights.fill(config, device, module)
    return module.to(device)  # which Lightning takes from where it was made


def check_model(config: Config, *, resumed: bool = False) -> None:
    """Builds the model without memory for it, and compares names and shapes with `model.init` unless it is resumed.

    Raises:
        ConfigError: a model, crops, schedules or a precision that make no sense.
        CheckpointError: weights of `model.init` that don't fit.
        StorageError: there is no such file.
    """
    if config.train.precision == "bf16-true":
        # Half a unit in the last place of bfloat16 is 0.2 %: AdamW's steps and the teacher's are mostly smaller.
        raise ConfigError("train.precision bf16-true: weights and teacher would hardly move; take bf16-mixed")
    try:
        module = bare_module(config)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if config.model.init and not resumed:
        starting_weights.start_from(config.model.init, module.student, module.teacher, config.data.storage_options)


def wants_few_kernels(train: TrainConfig, device: torch.device) -> bool:
    """Whether steps are of few large operations: as is set, else on whatever is no CPU."""
    return device.type != "cpu" if train.few_kernels is None else train.few_kernels


def own_device(train: TrainConfig) -> torch.device:
    """The device of a process that trains alone: of its GPUs the first, by number, as CUDA wants to be told."""
    return torch.device("cuda", 0) if train.gpu else torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Where a rank stands among the others."""

    device: torch.device
    environment: ClusterEnvironment


def fit(
    config: Config,
    to_storage: FolderCheckpointIO,
    batches: StepBatches,
    resume: str | None,
    report: Report,
    signals: Signals,
    place: Place | None = None,
    probe: ProbeKind | None = None,
    also: Sequence[Callback] = (),
) -> bool:
    """Trains to the last step, or until told to stop, in this process: alone, or as a rank at its place.

    also: who else looks on, behind what is done after each step anyway. Returns whether it stopped so that it can go on
    at once, with more ranks or on other machines.
    """
    # Its advice (more workers for the loader, a product to try) does not apply here.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    train = config.train
    if place is None:
        strategy = OneDevice(own_device(train))
    else:
        strategy = Shards(place.device, train) if train.strategy == "fsdp" else Replicas(place.device)
    after_step = AfterStep(config, batches, report, to_storage, signals, probe)
    trainer = pl.Trainer(
        strategy=strategy,
        # Lightning would look for one, and take a batch job of SLURM for ranks of its own.
        plugins=[LightningEnvironment() if place is None else place.environment, to_storage],
        devices=1 if place is None else "auto",
        accelerator="gpu" if train.gpu else "cpu",
        max_steps=train.steps,
        precision=autocast_precision(train),  # type: ignore[arg-type]
        accumulate_grad_batches=train.accumulate,
        callbacks=[after_step, *also],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    device = strategy.root_device
    few_kernels = wants_few_kernels(train, device)
    if resume is None:
        fill = partial(first_weights.fill, config, device)
    else:  # with the checkpoint's
        fill = partial(DinoModule.to_empty, device=device)
    if train.compile:
        # Few graphs are compiled of a function: those of another run in this process, such as a sweep's, don't count.
        torch.compiler.reset()
    module = bare_module(config, few_kernels=few_kernels, fill=fill)
    feed = DeviceFeed(batches, module.drawn, module.step_input, device, batches.note_wait, beside=few_kernels)
    try:
        with garbage_left_to_steps():
            trainer.fit(module, train_dataloaders=feed, ckpt_path=resume, weights_only=True)
    finally:
        to_storage.teardown()
    return after_step.leaves_to_return
