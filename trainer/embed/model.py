"""The model that embeds: a checkpoint's teacher, an exported folder, or a published model of timm's hub."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.data.config import resolve_model_data_config
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from streaming import storage
from streaming.errors import CheckpointError, StorageError
from trainer.embed.options import Precision, Token
from trainer.recipe.augment import Augmentation
from trainer.recipe.backbone import Backbone, Interpolation, Tokens, with_positions
from trainer.recipe.image_ops import constant
from trainer.recipe.network import build_backbone
from trainer.run import checkpoints, starting_weights
from trainer.run.config import Config
from trainer.run.starting_weights import EXPORTED, FILES
from trainer.run.weight_layouts import Weights, timm_names

_NORMALISATION = "preprocessor_config.json"
_HEAD_WIDTH = 64  # of DINOv2's networks, which their weights do not tell


class TimmTokens(nn.Module):
    """A timm vision transformer as it is published, which answers as a backbone does.

    interpolation says how its positions are resampled for images of another size than they are made for.
    """

    def __init__(self, vit: VisionTransformer, interpolation: Interpolation = "timm") -> None:
        super().__init__()
        self.vit = vit
        self._interpolation = interpolation
        self.embed_dim = vit.embed_dim
        self.patch_size = vit.patch_embed.patch_size[0]

    def forward(self, images: Tensor) -> Tokens:
        """Tokens of images (B, 3, H, W), float and normalised."""
        vit = self.vit
        if self._interpolation == "timm":
            tokens = vit.forward_features(images)
        else:
            tokens = vit.norm(vit.blocks(vit.norm_pre(with_positions(vit, vit.patch_embed(images), "reference"))))
        return Tokens(tokens[:, 0], tokens[:, vit.num_prefix_tokens :])


@dataclass(frozen=True, kw_only=True)
class Model:
    """A frozen network, and how it wants its images."""

    name: str
    backbone: Backbone | TimmTokens
    mean: tuple[float, ...]
    std: tuple[float, ...]
    token: Token = "cls"
    """what an embedding is: class token, mean patch token, or one after the other"""
    precision: Precision = "32"
    """bf16 makes products in bfloat16, and keeps norms and softmax in float32"""
    digest: str = ""
    """tells the weights from others"""

    def on(self, device: torch.device) -> Model:
        """The model on that device."""
        return replace(self, backbone=self.backbone.to(device))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.backbone.parameters()).device

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self.backbone.embed_dim * (2 if self.token == "cls+patch" else 1)

    def side(self, size: int) -> int:
        """Side in px of what the network sees of a tile of `size` px."""
        return side_px(size, self.backbone.patch_size)

    def images(self, tiles: Tensor) -> Tensor:
        """Tiles uint8 (n, H, W, 3) on its device as the network takes them, float32 (n, 3, H, W)."""
        images = tiles.permute(0, 3, 1, 2).float() / 255
        height, width = (self.side(side) for side in images.shape[-2:])
        if (height, width) != images.shape[-2:]:
            images = torch.nn.functional.interpolate(
                images, size=(height, width), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        mean, std = (constant(values, tiles.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    @torch.inference_mode()
    def tokens(self, tiles: Tensor) -> Tokens:
        """Class tokens (n, D) and patch tokens (n, N, D), row by row, float32, of tiles uint8 (n, H, W, 3) there."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            tokens = self.backbone(self.images(tiles))
        return Tokens(tokens.cls.float(), tokens.patches.float())

    def embedding(self, tokens: Tokens) -> Tensor:
        """Embeddings (n, D), or (n, 2D) of class and patch token."""
        mean_patch = tokens.patches.mean(dim=1)
        chosen = {"cls": [tokens.cls], "patch": [mean_patch], "cls+patch": [tokens.cls, mean_patch]}[self.token]
        return torch.cat(chosen, dim=1)

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings (n, `width`) of tiles uint8 (n, H, W, 3)."""
        return self.embedding(self.tokens(torch.from_numpy(tiles.copy()).to(self.device))).cpu().numpy()


def side_px(size: int, patch: int) -> int:
    """Side in px to which a tile of `size` px is resized for a network: the next lower multiple of its patch."""
    return max(patch, size // patch * patch)


def load_backbone(uri: str, options: storage.StorageOptions | None = None) -> tuple[Config, Backbone]:
    """The teacher's backbone of a checkpoint (a run's folder, or one of its step folders), and its configuration.

    Raises:
        CheckpointError: there is none, it is damaged, or its weights don't fit its configuration.
    """
    found = checkpoints.find(uri, options)
    config = checkpoints.read_config(found, options)
    prefix = "teacher.backbone."
    state = checkpoints.load(found, options, f"{checkpoints.WEIGHTS}['{prefix}")
    backbone = build_backbone(config.model, config.augment.global_size)
    weights = {key.removeprefix(prefix): w for key, w in state["state_dict"].items() if key.startswith(prefix)}
    if not weights:
        raise CheckpointError(f"{found}: holds no teacher; name a checkpoint that `tilestream train` wrote")
    checkpoints.load_weights(backbone, weights, found)
    return config, backbone.eval()


def resolve(source: str, options: storage.StorageOptions | None = None) -> str:
    """A model's name or address as any process may use it: of a run's folder, its newest checkpoint.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if _of_hub(source):
        return source
    source = storage.canonical(source)
    is_whole = PurePosixPath(source).suffix in FILES or _is_exported(source, options)
    return source if is_whole else checkpoints.find(source, options)


def model_of(name: str, augment: Augmentation, backbone: Backbone) -> Model:
    """A backbone as its training showed it images."""
    return Model(name=name, backbone=backbone.eval(), mean=tuple(augment.mean), std=tuple(augment.std))


def load_model(source: str, token: Token | None = None, options: storage.StorageOptions | None = None) -> Model:
    """The model of a run or checkpoint, of a folder that `tilestream export` or timm wrote, or of timm's hub.

    A name of the hub is timm's (`vit_small_patch14_dinov2.lvd142m`) or Hugging Face's (`hf-hub:OWNER/NAME`). A folder
    may also be in transformers' layout, and a file hold a backbone as `starting_weights` takes them; how these want
    their images is read from `preprocessor_config.json` beside them. Without a token, an embedding is what the export
    says, else the class token.

    Raises:
        CheckpointError: there is none, it is damaged, or no vision transformer with a class token.
        StorageError: it can't be read.
    """
    if _of_hub(source):
        model = _of_timm(source, source, hashlib.sha256(source.encode()).hexdigest())
    elif PurePosixPath(source).suffix in FILES:
        model = _of_weights(source, source, options)
    elif _is_exported(source, options):
        model = _of_export(source, options)
    else:
        model = _of_checkpoint(source, options)
    return replace(model, token=token or model.token)


def _of_checkpoint(source: str, options: storage.StorageOptions | None) -> Model:
    try:
        found = checkpoints.find(source, options)
    except CheckpointError as error:
        close = difflib.get_close_matches(source, timm.list_models("vit_*"), n=1)
        hint = f", such as {close[0]}" if close else ""
        raise CheckpointError(
            f"{error}; it is neither a run, nor an exported model, nor a model of timm's{hint}"
        ) from error
    config, backbone = load_backbone(found, options)
    model = model_of(source, config.augment, backbone)
    return replace(model, digest=checkpoints.read_meta(found, options).sha256)


def _of_hub(source: str) -> bool:
    return source.startswith("hf-hub:") or ("/" not in source and timm.is_model(source))


def _is_exported(source: str, options: storage.StorageOptions | None) -> bool:
    return EXPORTED[0] in storage.list_names(source, options)


def _of_export(source: str, options: storage.StorageOptions | None) -> Model:
    about: dict[str, Any] = json.loads(storage.read_bytes(storage.join(source, EXPORTED[0]), options))
    if "architecture" not in about:
        heads = about.get("num_attention_heads")
        model = _of_weights(storage.join(source, EXPORTED[1]), source, options, num_heads=heads)
        return replace(model, token=cast(Token, (about.get("tilestream") or {}).get("embedding", "cls")))
    contents = [storage.read_bytes(storage.join(source, name), options) for name in EXPORTED]
    with tempfile.TemporaryDirectory(prefix="tilestream-model-") as folder:
        for name, content in zip(EXPORTED, contents, strict=True):
            Path(folder, name).write_bytes(content)
        model = _of_timm(f"local-dir:{folder}", source, hashlib.sha256(contents[1]).hexdigest())
    trained = about.get("tilestream") or {}
    backbone = TimmTokens(cast(TimmTokens, model.backbone).vit, trained.get("interpolation", "timm")).eval()
    return replace(model, backbone=backbone, token=cast(Token, trained.get("embedding", "cls")))


def _of_weights(file: str, source: str, options: storage.StorageOptions | None, num_heads: int | None = None) -> Model:
    """A backbone whose shape its weights tell."""
    weights = timm_names(starting_weights.read_weights(file, options))
    beside = storage.beside(file, _NORMALISATION)
    try:
        wanted = json.loads(storage.read_bytes(beside, options))
        mean, std = (tuple(map(float, wanted[key])) for key in ("image_mean", "image_std"))
    except (StorageError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source}: {beside} does not say how it wants its images; write their mean and deviation there, such as "
            '{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
        ) from error
    weights.pop("mask_token", None)
    vit = _vit_of(weights, num_heads, source)
    checkpoints.load_weights(vit, weights, source)
    digest = hashlib.sha256()
    for key, weight in sorted(weights.items()):
        digest.update(key.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
    backbone = TimmTokens(vit, "reference").eval()
    return Model(name=source, backbone=backbone, mean=mean, std=std, digest=digest.hexdigest())


def _vit_of(weights: Weights, num_heads: int | None, source: str) -> VisionTransformer:
    """A network of the shape of weights in timm's names, initialised at random."""
    try:
        width, patch = weights["patch_embed.proj.weight"].shape[0], weights["patch_embed.proj.weight"].shape[-1]
        registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
        hidden, out = weights["blocks.0.mlp.fc1.weight"].shape[0], weights["blocks.0.mlp.fc2.weight"].shape[1]
        side = math.isqrt(weights["pos_embed"].shape[1] - (not registers))
    except KeyError as error:
        raise CheckpointError(f"{source}: no plain vision transformer: {error} is missing") from error
    is_gated = hidden == 2 * out
    return VisionTransformer(
        img_size=side * patch,
        patch_size=patch,
        embed_dim=width,
        depth=len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
        num_heads=num_heads or width // _HEAD_WIDTH,
        # The small excess outlives timm's rounding down.
        mlp_ratio=(hidden + 0.5) / width,
        mlp_layer=cast(Any, SwiGLUPacked if is_gated else Mlp),
        act_layer=nn.SiLU if is_gated else nn.GELU,
        init_values=1.0 if "blocks.0.ls1.gamma" in weights else None,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        reg_tokens=registers,
        no_embed_class=registers > 0,
        num_classes=0,
        dynamic_img_size=True,
    )


def _of_timm(name: str, source: str, digest: str) -> Model:
    other = f"{source}: no plain vision transformer with a class token; name one of timm's vit_* with one"
    try:
        vit = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True)
    except TypeError as error:  # another family, whose constructor lacks an option
        raise CheckpointError(other) from error
    except Exception as error:  # whatever its loader raises: no network, no such file, other weights
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: timm can't load it ({reason}); name a checkpoint or an export") from error
    if not isinstance(vit, VisionTransformer) or not vit.has_class_token:
        raise CheckpointError(other)
    data = resolve_model_data_config(vit)
    mean, std = tuple(data["mean"]), tuple(data["std"])
    return Model(name=source, backbone=TimmTokens(vit).eval(), mean=mean, std=std, digest=digest)
