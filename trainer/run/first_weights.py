"""What a run starts to train: of several ranks the first draws or reads it, and each keeps its share."""

from __future__ import annotations

import torch
import torch.distributed as dist

from trainer.recipe.module import DinoModule
from trainer.run.config import Config
from trainer.run.sending import send
from trainer.run.starting_weights import start_from
from trainer.run.weight_layouts import Weights


@torch.no_grad()
def fill(config: Config, device: torch.device, module: DinoModule) -> None:
    """Gives a module on the meta device, sharded or not, memory and the weights that a run starts from.

    All ranks of a process group call it together. They are sent tensor by tensor: a host has the whole of none but the
    first rank's.

    Raises:
        CheckpointError: weights of `model.init` that don't fit the model.
        StorageError: there is no such file.
    """
    is_reader = not dist.is_initialized() or dist.get_rank() == 0
    with torch.device("cpu"):
        first = _first_weights(config) if is_reader else (Weights(), Weights())
    for network, weights in zip((module.student, module.teacher), first, strict=True):
        network.to_empty(device=device)
        send(weights, network.state_dict())
        weights.clear()
    for name, buffer in module.named_buffers(recurse=False):
        module.register_buffer(name, torch.zeros(buffer.shape, device=device))


def _first_weights(config: Config) -> tuple[Weights, Weights]:
    """Of student and teacher, by name; they may share tensors."""
    student = config.recipe.network(config.run.seed)
    with torch.device("meta"):
        teacher = config.recipe.network(config.run.seed)
    teacher.predictor = None
    if config.model.init:
        start_from(config.model.init, student, teacher, config.data.storage_options)
    first = student.state_dict()
    return first, teacher.state_dict() if config.model.init else {key: first[key] for key in teacher.state_dict()}
