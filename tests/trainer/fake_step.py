"""A step on tensors that have a device, a type and a shape, and no memory."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from trainer.recipe import image_ops
from trainer.recipe.module import DinoModule
from trainer.recipe.step_input import Drawn
from trainer.run.config import Config
from trainer.run.fit import bare_module
from trainer.run.strategy import uncompiled


@contextmanager
def fake_step(device: str, config: Config) -> Iterator[tuple[DinoModule, Drawn]]:
    """A module and what is drawn for it on a fake device, at step 3, which logs nothing.

    What image operations keep for later steps is forgotten before, and after: a fake constant would make the losses of
    all real steps of this process nan.
    """
    module = bare_module(config, few_kernels=True)
    micro, side = config.train.shape.micro, config.data.tile_size
    tiles = torch.zeros(micro, side, side, 3, dtype=torch.uint8)
    made = module.drawn({"tile": tiles, "index": torch.arange(micro)})
    _forget()
    try:
        with (
            patch.object(DinoModule, "global_step", 3),
            patch.object(DinoModule, "is_logged", lambda self, step: False),
            FakeTensorMode(allow_non_fake_inputs=True),
            uncompiled(),  # which would have fakes of its own
        ):
            module = module.to_empty(device=device)
            yield (
                module,
                tree_map_only(Tensor, lambda one: torch.empty(one.shape, dtype=one.dtype, device=device), made),
            )
    finally:
        _forget()


def _forget() -> None:
    for held in (image_ops.constant, image_ops._reflected):
        inspect.unwrap(held, stop=lambda one: hasattr(one, "cache_clear")).cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
