"""How a run is executed: where it lies, how long and large it is, and on what machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from streaming.delivery.segments import groups_of
from streaming.delivery.stream import BatchShape
from trainer.recipe.free_field import FREE

Tracker = Literal["csv", "tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives."""

    out: str = field(default="runs/default", metadata=FREE)
    """folder or URI of the run: checkpoints, metrics, the resolved configuration; a run found there is resumed"""
    seed: int = 0
    """decides the tiles, the crops, the masks and the initial weights"""
    loggers: tuple[Tracker, ...] = ("csv",)
    """where metrics go beside metrics.parquet: csv (local runs), tensorboard, wandb, mlflow"""


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
    ranks: int | tuple[int, int] = field(default=1, metadata=FREE)
    """trainer workers; two numbers, the least and the most: as many as find room, while nodes come and go"""
    max_micro_batch: int | None = field(default=None, metadata=FREE)
    """tiles that a rank takes at once at most where there are fewer ranks than the most, so that more rounds of
    accumulation make up the batch; none: as many as with the most ranks"""
    ranks_per_stream: int | None = field(default=None, metadata=FREE)
    """ranks that share a dataset of Ray Data, with their part of the readers; none: those of a node"""
    accumulate: int = 1
    """rounds of gradient accumulation within a step"""
    gpu: bool = field(default=False, metadata=FREE)
    """whether each rank takes a GPU"""
    few_kernels: bool | None = field(default=None, metadata=FREE)
    """whether a step is of few large operations and is fed by a thread, as a GPU wants it, or of many that fit a CPU's
    caches; only rounding depends on it; none: by the device"""
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
    shard_ranks: int | None = field(default=None, metadata=FREE)
    """with fsdp, consecutive ranks that share the weights, best those of a node: between such groups only gradients
    travel, and a student's weights are gathered once a round; none, or no divisor of the ranks: all ranks share them"""
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
    """how often Ray Train starts the workers again from one checkpoint when one is lost: a new one counts anew"""
    collective_minutes: float = field(default=20.0, metadata=FREE)
    """minutes that ranks wait for one another before the run's workers are started again, three times as many until the
    first step is done; longer than data.stall_s, which names what stands still"""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.checkpoint_minutes is not None and not self.checkpoint_minutes > 0:
            raise ValueError(f"checkpoint_minutes is {self.checkpoint_minutes}; it must be above 0, or none")
        if self.flops is not None and not self.flops > 0:
            raise ValueError(f"flops is {self.flops}; it must be above 0, or none")
        if not self.collective_minutes > 0:
            raise ValueError(f"collective_minutes is {self.collective_minutes}; it must be above 0")
        if not 1 <= self.least_ranks <= self.most_ranks:
            raise ValueError(f"ranks {self.ranks}: give the least and the most, the least first and at least 1")
        if self.max_micro_batch is not None and self.max_micro_batch < self.shape.micro:
            raise ValueError(
                f"max_micro_batch is {self.max_micro_batch}, but {self.most_ranks} ranks take {self.shape.micro} tiles "
                "at once; raise it, or train.accumulate"
            )
        if not self.rank_cpus >= 0:
            raise ValueError(f"rank_cpus is {self.rank_cpus}; it must not be negative")
        if self.shard_ranks is not None and self.shard_ranks < 1:
            raise ValueError(f"shard_ranks is {self.shard_ranks}; it must be at least 1, or none")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts is {self.max_restarts}; it must not be negative")
        groups_of(self.most_ranks, self.ranks_per_stream)
        _ = self.shape  # tells at once when the ranks don't divide the batch

    @property
    def ranks_range(self) -> tuple[int, int]:
        """The least and the most ranks."""
        return (self.ranks, self.ranks) if isinstance(self.ranks, int) else self.ranks

    @property
    def least_ranks(self) -> int:
        """The fewest that the run goes on with."""
        return self.ranks_range[0]

    @property
    def most_ranks(self) -> int:
        """As many as it takes where there is room."""
        return self.ranks_range[1]

    @property
    def shares(self) -> int:
        """The ranks that share the weights."""
        if self.strategy != "fsdp":
            return 1
        ranks = self.most_ranks
        return self.shard_ranks if self.shard_ranks and ranks % self.shard_ranks == 0 else ranks

    @property
    def keeps_gathered(self) -> bool:
        """Whether a student's weights, once gathered, stay whole until their gradients are there."""
        return self.strategy == "fsdp" and self.shares == self.shard_ranks

    @property
    def shape(self) -> BatchShape:
        """How the batch is cut for the most ranks."""
        return BatchShape(self.batch, self.most_ranks, self.accumulate)

    def rounds_on(self, num_ranks: int, group_size: int) -> int | None:
        """The fewest rounds of accumulation in which so many ranks can take the batch; none: in no number of them.

        A micro-batch is of whole groups of masks, so that masks stay what they are, and holds no more tiles than a rank
        has memory for.
        """
        if num_ranks == self.most_ranks:
            return self.accumulate
        most = self.max_micro_batch or self.shape.micro
        for rounds in range(self.accumulate, self.batch // num_ranks + 1):
            micro, rest = divmod(self.batch, num_ranks * rounds)
            if not rest and micro <= most and micro % group_size == 0:
                return rounds
        return None
