"""How ranks share the model: replicas (DDP) or shards (FSDP2), with checkpoints that are the same for both.

Each rank of a replica saves its part of each tensor by the tensor's name, so that a run may go on with another number
of ranks or another strategy; and a copy of it, so that the next steps may change the weights while it is written.
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
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from trainer.recipe.network import Network
from trainer.run.background_checkpoints import FolderCheckpointIO
from trainer.run.execution import TrainConfig
from trainer.run.sending import local, send
from trainer.run.state_files import Index, named_tensors


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The state with memory of its own."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), state)


def _bare(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


class _KeptInParts(Strategy):
    """Saves and loads the parts of the state that the ranks of the first replica hold; the others are sent theirs."""

    _keepers: dist.ProcessGroup | None = None
    """the ranks of the first replica, on their hosts, if there are several"""
    _alike: dist.ProcessGroup | None = None
    """the ranks that hold what this one holds, that of the first replica first, if there are several"""
    _loaded: tuple[str, Index] | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded where they will stay: NCCL can't send what lies on the host."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimiser's state is loaded through this class, too."""
        return True

    @property
    def _keeps(self) -> bool:
        return self._alike is None or dist.get_rank(self._alike) == 0

    def _own(self, state: dict[str, Any]) -> dict[str, Any]:
        # On a GPU, moving the state to the host has copied it already.
        return _copied(state) if self.root_device.type == "cpu" else state

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Student and teacher, this rank's part, on its host; empty on ranks that save nothing."""
        assert self.lightning_module is not None
        if not self._keeps:
            return {}
        return self._own(get_model_state_dict(self.lightning_module, options=StateDictOptions(cpu_offload=True)))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """AdamW's moments by parameter name, likewise."""
        assert self.lightning_module is not None
        if not self._keeps:
            return {}
        options = StateDictOptions(cpu_offload=True)
        state = get_optimizer_state_dict(self.lightning_module, _bare(optimizer), options=options)
        return self._own(cast(dict[str, Any], state))

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any | None = None) -> None:
        """Hands it to the storage, which writes while training goes on."""
        if self._keeps:
            assert isinstance(self.checkpoint_io, FolderCheckpointIO)
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, self._keepers)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """All but the tensors' values, which one rank reads for all."""
        assert isinstance(self.checkpoint_io, FolderCheckpointIO)
        uri = str(checkpoint_path)
        found = [self.checkpoint_io.read_index(uri) if self.is_global_zero else None]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        assert found[0] is not None, "rank 0 has read it"
        self._loaded = uri, found[0]
        return found[0].state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Fills student and teacher."""
        assert self.lightning_module is not None
        self._fill({"state_dict": get_model_state_dict(self.lightning_module)})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Fills AdamW's moments, and sets the rest of its state."""
        assert self.lightning_module is not None
        states = [get_optimizer_state_dict(self.lightning_module, optimizer) for optimizer in self.optimizers]
        self._fill({"optimizer_states": [{"state": state["state"]} for state in states]})
        for optimizer, state, saved in zip(self.optimizers, states, checkpoint["optimizer_states"], strict=True):
            state["param_groups"] = saved["param_groups"]
            set_optimizer_state_dict(self.lightning_module, optimizer, state)

    @torch.no_grad()
    def _fill(self, state: dict[str, Any]) -> None:
        """Gives tensors, or this rank's parts of them, the values that the checkpoint has for their names."""
        assert self._loaded is not None, "it was opened before"
        assert isinstance(self.checkpoint_io, FolderCheckpointIO)
        uri, index = self._loaded
        into = named_tensors(state)
        if index.is_one_file:
            send(self.checkpoint_io.read_whole(uri) if self.is_global_zero else {}, into)
            return
        if self._keeps:
            self.checkpoint_io.read_parts(uri, index, into, self._keepers)
        if self._alike is not None:
            for tensor in into.values():
                dist.broadcast(local(tensor), group=self._alike, group_src=0)


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


class OneDevice(_KeptInParts, SingleDeviceStrategy):
    """One process without a process group."""


class Replicas(_KeptInParts, DDPStrategy):
    """Each rank holds the whole model (DDP)."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(gradient_as_bucket_view=True)
        self._device = device

    @property
    def root_device(self) -> torch.device:
        """This rank's device, as whoever started the rank chose it."""
        return self._device

    def setup_environment(self) -> None:
        """All ranks hold the same."""
        super().setup_environment()
        self._alike = dist.group.WORLD


class Shards(_KeptInParts, ModelParallelStrategy):
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
        self._alike = mesh["replicas"].get_group() if mesh.ndim > 1 else None
        first = mesh.mesh[0] if mesh.ndim > 1 else mesh.mesh
        self._keepers = cast(dist.ProcessGroup, dist.new_group(first.tolist(), backend="gloo"))
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
