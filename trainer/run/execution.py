"""How a run is executed: where it lies, how long and large it is, and on what machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from streaming.delivery.segments import groups_of
from streaming.delivery.stream import BatchShape
from trainer.recipe.free_field import FREE


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives."""

    out: str = field(default="runs/default", metadata=FREE)
    """folder or URI of the run: checkpoints, metrics, the resolved configuration; a run found there is resumed"""
    seed: int = 0
    """decides the tiles, the crops, the masks and the initial weights"""
    loggers: tuple[str, ...] = ("csv",)
    """where metrics go beside metrics.parquet: csv (local runs), tensorboard, wandb, mlflow"""

    def __post_init__(self) -> None:
        for name in self.loggers:
            if name not in ("csv", "tensorboard", "wandb", "mlflow"):
                raise ValueError(f"loggers names {name!r}; take csv, tensorboard, wandb or mlflow")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how large, on what."""

    steps: int = 1000
    """optimiser steps of the whole run"""
    flops: float | None = None
    """floating-point operations of the whole run, forward and backward, of student and teacher: `steps` follow from it;
    none: steps says how long"""
    batch: int = 64
    """tiles of an optimiser step, over all ranks and accumulation rounds"""
    ranks: int = field(default=1, metadata=FREE)
    """trainer workers"""
    ranks_per_stream: int | None = field(default=None, metadata=FREE)
    """ranks that share a dataset of Ray Data, with their part of the readers; none: those of a node"""
    accumulate: int = 1
    """rounds of gradient accumulation within a step"""
    gpu: bool = field(default=False, metadata=FREE)
    """whether each rank takes a GPU"""
    rank_cpus: float = field(default=1.0, metadata=FREE)
    """CPU slots of a rank"""
    rank_resources: dict[str, float] = field(default_factory=dict, metadata=FREE)
    """what else a rank takes of its node: Ray's resources by name, such as another maker's accelerator"""
    rank_labels: dict[str, str] = field(default_factory=dict, metadata=FREE)
    """labels of the nodes that ranks run on; empty: any node"""
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    """32-true; bf16-mixed: weights in float32, products in bfloat16 (with fsdp, what blocks hand on is bfloat16, too);
    bf16-true, all in bfloat16, is of old runs: it loses small steps, and is refused"""
    strategy: Literal["ddp", "fsdp"] = field(default="ddp", metadata=FREE)
    """ddp: each rank holds the model; fsdp: each holds its share of weights, gradients, moments and teacher (FSDP2);
    with bf16-mixed, another one is another recipe"""
    compile: bool = field(default=False, metadata=FREE)
    """whether torch.compile is run on the blocks"""
    activation_checkpointing: bool = field(default=False, metadata=FREE)
    """whether the backward pass computes the blocks' activations anew instead of keeping them"""
    log_every: int = field(default=10, metadata=FREE)
    """steps between two rows of the metrics"""
    checkpoint_every: int = field(default=500, metadata=FREE)
    """steps between two checkpoints"""
    checkpoint_minutes: float | None = field(default=30.0, metadata=FREE)
    """minutes after which a checkpoint is due besides; none: only by steps"""
    keep_checkpoints: int = field(default=3, metadata=FREE)
    """newest checkpoints that are kept"""
    max_restarts: int = field(default=3, metadata=FREE)
    """how often Ray Train starts the workers again from the last checkpoint when one is lost"""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.checkpoint_minutes is not None and not self.checkpoint_minutes > 0:
            raise ValueError(f"checkpoint_minutes is {self.checkpoint_minutes}; it must be above 0, or none")
        if self.flops is not None and not self.flops > 0:
            raise ValueError(f"flops is {self.flops}; it must be above 0, or none")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts is {self.max_restarts}; it must not be negative")
        groups_of(self.ranks, self.ranks_per_stream)
        _ = self.shape  # tells at once when the ranks don't divide the batch

    @property
    def shape(self) -> BatchShape:
        """How the batch is cut."""
        return BatchShape(self.batch, self.ranks, self.accumulate)
