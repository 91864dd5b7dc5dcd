"""Tensors from the first rank to all, one after the other, of which each rank keeps its share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def send(whole: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Fills tensors, or this rank's parts of them, with those of their names that the first rank has.

    All ranks of a process group call it together; no other one ever holds more than one whole tensor of a share.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    for name, own in into.items():
        tensor = whole[name].to(own.device) if is_first else torch.empty(own.shape, dtype=own.dtype, device=own.device)
        if dist.is_initialized():
            dist.broadcast(tensor, src=0)
        if isinstance(own, DTensor):
            tensor = distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)
        own.copy_(tensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
