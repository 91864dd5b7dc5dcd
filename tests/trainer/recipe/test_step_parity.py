"""A whole step against the published DINOv2's, by numbers stored once (`tests/data/README.md`)."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from trainer.recipe.augment import Augmentation, Crops
from trainer.recipe.backbone import Backbone, CropBlock
from trainer.recipe.losses import LossConfig, sinkhorn
from trainer.recipe.masks import Masking, located
from trainer.recipe.module import DinoModule
from trainer.recipe.network import ModelConfig, Network
from trainer.recipe.recipe import Recipe
from trainer.recipe.schedule import OptimConfig
from trainer.run.starting_weights import load_published, timm_names

GOLDEN = Path(__file__).parents[2] / "data/dinov2_step.npz"
NAMES = ("shared-0-mlp", "separate-4-mlp", "separate-0-swiglu", "shared-4-swiglu")
NUM_SAMPLES = 4


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        stored = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    return {key: torch.from_numpy(x.astype(np.float32) if x.dtype == np.float16 else x) for key, x in stored.items()}


def part(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def tiny(num_registers: int, ffn: str) -> Backbone:
    options: dict[str, Any] = {"mlp_layer": Mlp, "mlp_ratio": 4.0, "act_layer": nn.GELU}
    if ffn == "swiglu":  # (int(64 · 2 / 3) + 7) // 8 · 8 units
        options = {"mlp_layer": SwiGLUPacked, "mlp_ratio": 2 * 48 / 16, "act_layer": nn.SiLU}
    vit = VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        init_values=0.5,
        reg_tokens=num_registers,
        no_embed_class=num_registers > 0,
        num_classes=0,
        dynamic_img_size=True,
        block_fn=CropBlock,
        **options,
    )
    return Backbone(vit)


def ours(key: str, value: Tensor) -> tuple[str, Tensor]:
    """A head's weight under our name: torch's old weight norm has `weight_g` and `weight_v`."""
    return key.replace("weight_g", "scale").replace("weight_v", "weight"), value


def load(network: Network, weights: dict[str, Tensor]) -> None:
    load_published(network.backbone, part(weights, "backbone."), "golden")
    for name, head in network.named_children():
        if name != "backbone":
            head.load_state_dict(dict(ours(*entry) for entry in part(weights, f"{name}.").items()))


def made(
    name: str, values: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, *, few_kernels: bool = False
) -> DinoModule:
    heads, registers, ffn = name.split("-")
    monkeypatch.setattr("trainer.recipe.recipe.build_backbone", lambda *_, **__: tiny(int(registers), ffn))
    separate: dict[str, Any] = {"separate_heads": True, "ibot_prototypes": 20, "ibot_bottleneck": 8}
    model = ModelConfig(
        num_prototypes=24, head_hidden=24, head_bottleneck=10, **(separate if heads == "separate" else {})
    )
    recipe = Recipe(
        augment=Augmentation(global_size=16, local_size=8, num_local=3, blur_kernel=5),
        mask=Masking(group_size=NUM_SAMPLES),
        model=model,
        loss=LossConfig(),
        optim=OptimConfig(warmup_steps=0),
    )
    module = DinoModule(recipe, 0, steps=1, batch=NUM_SAMPLES, few_kernels=few_kernels)
    load(module.student, part(values, "student/"))
    load(module.teacher, part(values, "teacher/"))
    return module


def views(crops: Tensor) -> Tensor:
    return crops.unflatten(0, (-1, NUM_SAMPLES))


def step(module: DinoModule, values: dict[str, Tensor]) -> Tensor:
    crops = Crops(views(values["crops/global"]), views(values["crops/local"]))
    loss = module.loss(crops, located(views(values["masks"])), 0.05)
    loss.backward()
    return loss


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("few_kernels", [True, False])
def test_a_step_has_the_reference_s_loss_terms_and_gradients(
    name: str, few_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = golden(name)
    module = made(name, values, monkeypatch, few_kernels=few_kernels)
    loss = step(module, values)
    torch.testing.assert_close(loss.detach(), values["loss"], rtol=1e-5, atol=0)
    weights = {"dino_global": 1.0, "dino_local": 1.0, "ibot": 1.0, "koleo": 0.1}
    for term, weight in weights.items():
        found = weight * cast(Tensor, module.step_metrics[term])
        torch.testing.assert_close(found, values[f"term/{term}"], rtol=1e-5, atol=0, msg=term)
    expected = dict(ours(*entry) for entry in part(values, "grad/").items())
    backbone = part(expected, "backbone.")
    # Where registers have no position, the class token has taken its own up; both have the one gradient.
    backbone["cls_token"] = backbone["cls_token"] - (backbone["pos_embed"][:, :1] if "-4-" in name else 0)
    backbone = {k if k == "mask_token" else f"vit.{k}": v for k, v in timm_names(backbone).items()}
    expected = {k: v for k, v in expected.items() if not k.startswith("backbone.")}
    expected |= {f"backbone.{k}": v for k, v in backbone.items()}
    found = {key: weight.grad for key, weight in module.student.named_parameters()}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        got = found[key]
        assert got is not None, key
        assert (got - gradient).norm() <= 1e-4 * gradient.norm(), key


def test_a_step_inside_autocast_keeps_its_targets_and_is_near(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = golden(name)
    module = made(name, values, monkeypatch)
    targets: list[Tensor] = []

    def noted(logits: Tensor, temperature: float) -> Tensor:
        targets.append(sinkhorn(logits, temperature))
        return targets[-1]

    monkeypatch.setattr("trainer.recipe.losses.sinkhorn", noted)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(module, values)
    torch.testing.assert_close(loss.detach(), values["loss"], rtol=0.02, atol=0)
    assert loss.dtype == torch.float32
    assert len(targets) == 2
    for one in targets:
        torch.testing.assert_close(one.sum(dim=1), torch.ones(len(one)), rtol=0, atol=1e-5)
