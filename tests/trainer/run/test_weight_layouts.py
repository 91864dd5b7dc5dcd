"""Others' layouts, each made of one network of timm's or transformers', start a run and embed as that network does."""

import json
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from streaming.errors import CheckpointError
from trainer.embed.model import load_model, resolve
from trainer.recipe.backbone import create_backbone
from trainer.run.starting_weights import load_published, read_shapes, read_weights
from trainer.run.weight_layouts import Weights, backbone_weights

NAME = {0: "vit_small_patch14_dinov2", 4: "vit_small_patch14_reg4_dinov2"}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def network(num_registers: int, **options: Any) -> VisionTransformer:
    """timm's own, of two blocks for crops of 56 px, its weights drawn so that none is another's."""
    torch.manual_seed(0)
    vit = timm.create_model(NAME[num_registers], img_size=56, depth=2, num_classes=0, dynamic_img_size=True, **options)
    with torch.no_grad():
        for weight in vit.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    assert isinstance(vit, VisionTransformer)
    return vit.eval()


def reference_names(vit: VisionTransformer) -> Weights:
    """What timm's converter would turn into this network: the inverse of `_convert_dinov2`."""
    own = dict(vit.state_dict())
    if "reg_token" in own:
        own["register_tokens"] = own.pop("reg_token")
        position = torch.randn(own["cls_token"].shape)
        own["cls_token"] = own["cls_token"] - position
        own["pos_embed"] = torch.cat([position, own["pos_embed"]], dim=1)
    renamed = {"fc1": "w12", "fc2": "w3"} if hasattr(vit.blocks[0].mlp, "gate") else {}
    for old, new in renamed.items():
        own = {key.replace(f".mlp.{old}.", f".mlp.{new}."): weight for key, weight in own.items()}
    return own | {"mask_token": torch.full((1, vit.embed_dim), 0.25)}


def chunked(weights: Weights) -> Weights:
    """Blocks in chunks of one, as DINOv2 trains them for sharding."""
    return {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", key): weight for key, weight in weights.items()}


def below(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: weight for key, weight in weights.items()}


def others() -> Weights:
    return {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight_g": torch.ones(2, 1)}


LAYOUTS: dict[str, Callable[[Weights], Any]] = {
    "released": lambda w: w,
    "openmidnight's teacher_checkpoint": lambda w: {"teacher": below("backbone.", chunked(w)) | others()},
    "dinov2's training": lambda w: {
        "model": below("student.backbone.", {k: torch.zeros_like(x) for k, x in chunked(w).items()})
        | below("teacher.backbone.", chunked(w))
        | below("teacher.", others())
        | {"dino_loss.center": torch.zeros(1, 4)},
        "optimizer": {"state": {0: {"step": 3}}},
        "iteration": 4,
    },
    "dino's, by ddp": lambda w: {
        "student": below("module.backbone.", {k: torch.zeros_like(x) for k, x in w.items()}),
        "teacher": below("module.backbone.", w),
        "args": Namespace(arch="vit_small", out_dim=65536),
        "epoch": 99,
    },
    "compiled": lambda w: {"state_dict": below("_orig_mod.", w)},
    "lightning's": lambda w: {
        "state_dict": below("model.teacher.", w) | below("model.head.", others()),
        "pytorch-lightning_version": "2.6",
        "callbacks": {},
    },
}


@pytest.mark.parametrize("num_registers", [0, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backbone_of_each_layout_is_timms_again(layout: str, num_registers: int, tmp_path: Path) -> None:
    vit = network(num_registers)
    path = str(tmp_path / "weights.ckpt")
    torch.save(LAYOUTS[layout](reference_names(vit)), path)
    backbone = create_backbone(NAME[num_registers], img_size=56)
    backbone.vit.blocks = backbone.vit.blocks[:2]
    load_published(backbone, read_weights(path), path)
    for key, weight in vit.state_dict().items():
        torch.testing.assert_close(backbone.vit.state_dict()[key], weight, rtol=1e-6, atol=1e-6, msg=key)
    assert (backbone.mask_token == 0.25).all()
    shapes = {key: weight.shape for key, weight in read_weights(path).items()}
    assert {key: weight.shape for key, weight in read_shapes(path).items()} == shapes


@pytest.mark.parametrize("layout", ["released", "openmidnight's teacher_checkpoint"])
@pytest.mark.parametrize("kind", ["mlp", "swiglu", "no layer scale"])
def test_a_file_of_weights_embeds_as_timm_does(layout: str, kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "mlp": {},
        "swiglu": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2 * 1024 / 384 + 1e-3},
        "no layer scale": {"init_values": None},
    }[kind]
    vit = network(4, **options)
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](reference_names(vit)), path)
    with pytest.raises(CheckpointError, match=r"weights\.pth: .*preprocessor_config\.json does not say .*image_mean"):
        load_model(str(path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(IMAGENET))
    tiles = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    mean, std = (torch.tensor(IMAGENET[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = vit((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std)
    np.testing.assert_allclose(load_model(resolve(str(path))).embed(tiles), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_transformers_folders_start_a_run_and_embed_as_transformers_does(
    num_registers: int, gated: bool, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if num_registers else "Dinov2"
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
    registers = {"num_register_tokens": num_registers} if num_registers else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **registers, use_swiglu_ffn=gated)
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    tiles = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    with torch.no_grad():
        images = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
        expected = theirs((images - 0.5) / 0.5).last_hidden_state
    model = load_model(str(tmp_path))
    tokens = model.tokens(torch.from_numpy(tiles))
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.patches, expected[:, 1 + num_registers :], rtol=1e-4, atol=1e-4)
    named: dict[str, Tensor] = read_weights(str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(named["mask_token"], theirs.embeddings.mask_token.detach())


def test_a_file_of_several_networks_or_of_other_objects_says_what_to_do(tmp_path: Path) -> None:
    weights = reference_names(network(0))
    two = below("first.", weights) | below("second.", {key: weight.clone() for key, weight in weights.items()})
    with pytest.raises(ValueError, match=r"one class token .*not 2 \(first\., second\.\)"):
        backbone_weights(two)
    save_file(two, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors: .*not 2"):
        read_weights(str(tmp_path / "two.safetensors"))
    torch.save({"model": weights, "config": Path("of-omegaconf")}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth: holds a pathlib\.\w+, .*weights_only=False and torch\.save"):
        read_weights(str(tmp_path / "odd.pth"))
