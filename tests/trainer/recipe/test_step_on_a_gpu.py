"""A step as a GPU would run it, without one: on tensors that have a device, a type and a shape, and no memory.

What is counted are the operations that torch sends to the device. A fake GPU's autograd would ask for a real one, so
the backward pass is counted on a fake CPU, in the same form: there, what waits is told by its name alone.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.trainer.fake_step import fake_step
from trainer.recipe.module import DinoModule
from trainer.recipe.step_input import Drawn
from trainer.run.config import Config, read_config

# What only looks at memory otherwise, or sets some aside, starts no kernel.
_NO_KERNELS = {
    *("view", "_unsafe_view", "_reshape_alias", "view_as", "expand", "permute", "transpose", "t", "slice", "select"),
    *(
        "unsqueeze",
        "squeeze",
        "squeeze_",
        "split",
        "split_with_sizes",
        "unsafe_split_with_sizes",
        "unbind",
        "detach",
        "alias",
        "as_strided",
    ),
    *("empty", "empty_strided", "empty_like", "new_empty", "lift_fresh", "is_same_size", "unfold"),
}
_WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "linalg_inv_ex", "is_nonzero", "equal"}


class Counted(TorchDispatchMode):
    """Counts kernels, and where something goes from host to device or back, or is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.")
        if name not in _NO_KERNELS and not name.startswith("prim."):
            self.kernels[name] += 1
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        # A number of the host may stand beside tensors of the device: it goes with the kernel.
        devices = {one.device.type for one in tensors if one.ndim or name in ("_to_copy", "copy_")}
        indices = tree_leaves(args[1]) if name in ("index", "index_put_") else []
        by_mask = any(isinstance(one, Tensor) and one.dtype == torch.bool for one in indices)
        if len(devices) > 1 or name in _WAITS or by_mask:
            here = [frame for frame in traceback.extract_stack() if "/trainer/" in frame.filename]
            self.waits[f"{name} in {here[-1].filename}:{here[-1].lineno}"] += 1
        return out


SMALL = [
    *("--augment.global_size", "32", "--augment.local_size", "16", "--model.patch_size", "8"),
    *("--model.backbone", "vit_tiny_patch16_224", "--model.num_prototypes", "64", "--model.head_hidden", "16"),
    *("--model.head_bottleneck", "8", "--data.tile_size", "64", "--train.batch", "8", "--model.init", "null"),
    *("--train.ranks", "1", "--train.accumulate", "1", "--train.gpu", "false", "--train.strategy", "ddp"),
]
EVERYTHING = ["--augment.reinhard_prob", "0.2", "--augment.hed_prob", "0.5", "--augment.solarise_prob", "0.2"]


Counts = dict[str, Counted]


def on_fake(device: str, config: Config, use: Callable[[DinoModule, Drawn], Counts]) -> Counts:
    """What a second step counts: the first one may send constants."""
    with fake_step(device, config) as (module, sent):
        use(module, sent)
        return use(module, sent)


def forward(module: DinoModule, sent: Drawn) -> tuple[dict[str, Counted], Tensor]:
    counts = {name: Counted() for name in ("augmentation", "forward", "backward", "end")}
    # Without a GPU, autocast for one turns itself off, with a warning.
    with torch.autocast("cpu", torch.bfloat16, enabled=sent.tile.device.type == "cpu"):
        with counts["augmentation"]:
            made = module.step_input(sent)
        with counts["forward"]:
            loss = module.training_step(made, 0)
    return counts, loss


def end(module: DinoModule) -> None:
    optimizer = module.configure_optimizers()
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    module.update_teacher(0.99)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'", "ignore:CUDA is not available")
@pytest.mark.parametrize(
    ("preset", "more"), [("vits14", []), ("vits14", EVERYTHING), ("midnight-12k", []), ("openmidnight", [])]
)
def test_a_step_sends_nothing_to_the_gpu_and_asks_nothing_of_it(preset: str, more: list[str]) -> None:
    def use(module: DinoModule, sent: Drawn) -> dict[str, Counted]:
        counts, _ = forward(module, sent)
        for parameter in module.student.parameters():
            parameter.grad = torch.empty_like(parameter)
        with counts["end"]:
            end(module)
        return counts

    counts = on_fake("cuda", read_config(preset, [*SMALL, *more]), use)
    assert {name: dict(one.waits) for name, one in counts.items() if one.waits} == {}
    assert sum(counts["forward"].kernels.values()) > 500, "it was looked at"


# Of the kernels that are started one by one, without compilation: what a change may not make worse.
CEILINGS = {"augmentation": 360, "forward": 930, "backward": 980}


def test_a_step_of_depth_12_starts_no_more_kernels_than_now() -> None:
    def use(module: DinoModule, sent: Drawn) -> dict[str, Counted]:
        counts, loss = forward(module, sent)
        module.zero_grad()
        with counts["backward"]:
            loss.backward()
        return counts

    counts = on_fake("cpu", read_config("vits14", SMALL), use)
    assert counts["backward"].waits == {}
    found = {name: sum(counts[name].kernels.values()) for name in CEILINGS}
    for name, most in CEILINGS.items():
        assert found[name] <= most, (found, counts[name].kernels.most_common(25))
        assert found[name] > most * 0.9, f"lower the ceiling: {found}"
