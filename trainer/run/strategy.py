"""How ranks share the model: replicas (DDP) or shards (FSDP2), with checkpoints that are the same for both.

State dicts hold whole tensors by name, gathered on rank 0 and copied, so that a run may go on with another number of
ranks or another strategy, and that a checkpoint can be written while the next steps change the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from trainer.recipe.network import Network
from trainer.run.execution import TrainConfig


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The state with memory of its own."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), state)


def _bare(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _WholeState(Strategy):
    """Saves and loads whole tensors by name, through rank 0."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded where they will stay: NCCL can't send what lies on the host."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimiser's state is loaded through this class, too."""
        return True

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        # On a GPU, moving the state to the host has copied it already.
        return _copied(state) if self.root_device.type == "cpu" else state

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Student and teacher; empty on other ranks than 0."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return self._gathered(get_model_state_dict(self.lightning_module, options=options))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """AdamW's moments by parameter name; empty on other ranks than 0."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.lightning_module, _bare(optimizer), options=options)
        return self._gathered(cast(dict[str, Any], state))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Spreads rank 0's weights over all ranks."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=_several_ranks(), strict=strict)
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Spreads rank 0's moments over all ranks."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=_several_ranks())
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.lightning_module, optimizer, state, options=options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads on rank 0; the others get all but the tensors."""
        if not _several_ranks():
            return self.checkpoint_io.load_checkpoint(checkpoint_path)
        whole = self.checkpoint_io.load_checkpoint(checkpoint_path) if self.is_global_zero else {}
        heavy: dict[str, Any] = {"state_dict": {}, "optimizer_states": [{}] * len(self.optimizers)}
        light = [{**whole, **heavy}]
        dist.broadcast_object_list(light, src=0)
        return whole if self.is_global_zero else light[0]

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any | None = None) -> None:
        """Rank 0 hands it to the storage, which writes while training goes on."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)


def prepare(train: TrainConfig, network: Network, mesh: DeviceMesh | None) -> None:
    """Checkpoints activations, compiles and shards a network as the configuration says, block by block.

    mesh is of all ranks: of one dimension, to shard over, or of two, replicas and within each the ranks that share it.
    Names of parameters stay.
    """
    if train.compile:
        from torch._dynamo import config  # takes seconds

        # Graphs would be cut into pieces for DDP's buckets: blocks are such pieces.
        config.optimize_ddp = False
    shard = None
    if mesh is not None:
        # A teacher has no backward pass to reshard it: it would stay as it is for good.
        is_trained = any(parameter.requires_grad for parameter in network.parameters())
        reshard = not (is_trained and train.keeps_gathered)
        shard = partial(fully_shard, mesh=mesh, mp_policy=_mixed_precision(train), reshard_after_forward=reshard)
    for block in network.backbone.vit.blocks:
        if train.activation_checkpointing:
            block.forward = _recomputed(block.forward)
        if train.compile:
            # A block is one graph or an error: what is silently not compiled would be slow without a word. Shapes stay
            # the same from step to step, whatever is not a step runs uncompiled (`uncompiled`).
            block.compile(fullgraph=True, dynamic=False)
        if shard is not None:
            shard(block)
    if shard is not None:
        heads = [head for head in (network.dino_head, network.ibot_head, network.predictor) if head is not None]
        for head in heads:
            shard(head)
        shard(network)
        _prefetch([*network.backbone.vit.blocks, *heads])


def _prefetch(parts: Sequence[nn.Module]) -> None:
    """Has each part's neighbour gathered while it is computed, however far the host is ahead of the device."""
    for one, two in pairwise(cast(Sequence[FSDPModule], parts)):
        one.set_modules_to_forward_prefetch([two])
        two.set_modules_to_backward_prefetch([one])


def uncompiled() -> AbstractContextManager[None]:
    """Within it, compiled blocks run as they are written.

    What is no step has other shapes: each would cost a compilation, and a few of them would end all compiling.
    """
    return torch.compiler.set_stance("force_eager")


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its activations computed anew in the backward pass.

    A function of Python's, not a `partial`: torch.compile looks into no other, and would compile nothing. Blocks draw
    nothing, so that there is no state of random numbers to keep.
    """

    def recomputed(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return recomputed


def _mixed_precision(train: TrainConfig) -> MixedPrecisionPolicy:
    """Gathers bfloat16 weights and adds gradients up in float32, which autocast would gather in float32, too."""
    if train.precision != "bf16-mixed":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def autocast_precision(train: TrainConfig) -> str:
    """What Lightning is told: shards see to mixed precision themselves."""
    return "32-true" if train.strategy == "fsdp" and train.precision == "bf16-mixed" else train.precision


def ranks_mesh(train: TrainConfig, device: str) -> DeviceMesh:
    """The ranks of a process group: those that share the weights, in as many replicas as there are."""
    shares, ranks = train.shares, train.most_ranks
    if shares == ranks:
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shards",))
    return init_device_mesh(device, (ranks // shares, shares), mesh_dim_names=("replicas", "shards"))


class OneDevice(_WholeState, SingleDeviceStrategy):
    """One process without a process group."""


class Replicas(_WholeState, DDPStrategy):
    """Each rank holds the whole model (DDP)."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(gradient_as_bucket_view=True)
        self._device = device

    @property
    def root_device(self) -> torch.device:
        """This rank's device, as whoever started the rank chose it."""
        return self._device


class Shards(_WholeState, ModelParallelStrategy):
    """Each rank holds its share of every weight, gradient, moment and teacher weight (FSDP2)."""

    def __init__(self, device: torch.device, train: TrainConfig) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self._device, self._train = device, train

    @property
    def root_device(self) -> torch.device:
        """This rank's device, as whoever started the rank chose it."""
        return self._device

    def setup_environment(self) -> None:
        """Spreads the shards over the ranks that share them."""
        assert self.cluster_environment is not None
        assert self.lightning_module is not None
        self._data_parallel_size = self.cluster_environment.world_size()
        super().setup_environment()
        mesh = ranks_mesh(self._train, self.root_device.type)
        self.lightning_module._device_mesh = mesh  # pyright: ignore[reportPrivateUsage] — as Lightning does, of its own

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Keeps gradients unreduced within an accumulation, as DDP's `no_sync` does."""
        assert self.lightning_module is not None
        student = cast(FSDPModule, self.lightning_module.student)  # with all its parts; the teacher has no gradients
        student.set_requires_gradient_sync(False)
        if self._train.keeps_gathered:
            student.set_reshard_after_backward(False)
        try:
            yield
        finally:
            student.set_requires_gradient_sync(True)
            student.set_reshard_after_backward(True)
