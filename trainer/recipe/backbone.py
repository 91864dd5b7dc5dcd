"""timm's vision transformers as DINOv2 uses them: masked tokens, registers, stochastic depth, any crop size.

Crops of several sizes go through in one pass: norms, projections and MLP see the tokens of all sizes at once, attention
runs once per size. Each size alone (timm's own form) gives the same tokens and gradients.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp, Mlp, SwiGLUPacked
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Ffn = Literal["mlp", "swiglu"]
Interpolation = Literal["reference", "timm"]


class Tokens(NamedTuple):
    """What a backbone makes of B crops of N patches, after the final norm."""

    cls: Tensor
    """class tokens (B, D)"""
    patches: Tensor
    """patch tokens (B, N, D), row by row"""


class CropBlock(vision_transformer.Block):
    """timm's block, with its weights and names, that also takes tokens of several crop sizes at once.

    Told so, each residual branch sees a subset of each size's crops alone, scaled so that the expectation stays:
    dropped crops cost nothing, zeroing them afterwards would (DINOv2's `drop_add_residual_stochastic_depth`).
    """

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Maps a list of (B_i, N_i, D) to its like, or one tensor as timm's block does.

        With a list may come another of which crops its two branches see, int64 (2, kept_i) for each size.
        """
        if isinstance(x, Tensor):
            return super().forward(x, *args, **kwargs)
        attending, mapped = ([part[row] for part in args[0]] if args else None for row in range(2))
        x = self._add(cast(list[Tensor], x), attending, self._attend)
        return self._add(x, mapped, lambda flat, _: self.ls2(self.mlp(self.norm2(flat))), is_own=True)

    @staticmethod
    def _add(
        xs: list[Tensor],
        chosen: list[Tensor] | None,
        branch: Callable[[Tensor, list[torch.Size]], Tensor],
        *,
        is_own: bool = False,
    ) -> list[Tensor]:
        """Adds a branch; xs that are this block's own, and needed by nothing but this, are changed where they lie."""
        if chosen is None:
            added = _split(branch(*_join(xs)), [x.shape for x in xs])
            return [x + a for x, a in zip(xs, added, strict=True)]
        parts = [x.index_select(0, c) for x, c in zip(xs, chosen, strict=True)]
        added = _split(branch(*_join(parts)), [part.shape for part in parts])
        add = Tensor.index_add_ if is_own else Tensor.index_add
        return [add(x, 0, c, a.to(x.dtype), alpha=len(x) / len(c)) for x, c, a in zip(xs, chosen, added, strict=True)]

    def _attend(self, flat: Tensor, shapes: list[torch.Size]) -> Tensor:
        """The attention branch of tokens (T, D), which are those of the shapes one after the other."""
        attn = self.attn
        assert isinstance(attn, Attention), "checked by create_backbone"
        outputs: list[Tensor] = []
        for qkv in _split(attn.qkv(self.norm1(flat)), shapes):
            q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            attended = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return self.ls1(attn.proj(attn.norm(joined)))


def _join(xs: Sequence[Tensor]) -> tuple[Tensor, list[torch.Size]]:
    flat = [x.flatten(0, 1) for x in xs]
    return torch.cat(flat) if len(flat) > 1 else flat[0], [x.shape for x in xs]


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = flat.split([shape[0] * shape[1] for shape in shapes])
    return [part.unflatten(0, tuple(shape[:2])) for part, shape in zip(parts, shapes, strict=True)]


class Backbone(nn.Module):
    """A timm vision transformer, kept under `vit` so that its keys stay timm's, and a learned mask token.

    Args:
        vit: built with `num_classes=0, dynamic_img_size=True`, with a class token; its own drop path stays 0.
        interpolation: how positions are resampled for crops of another size than they are made for: as
            `resample_positions` does, or as timm does, antialiased.
    """

    def __init__(self, vit: VisionTransformer, interpolation: Interpolation = "reference") -> None:
        super().__init__()
        self.vit = vit
        self._interpolation: Interpolation = interpolation
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))

    @property
    def num_branches(self) -> int:
        """Residual branches: two for each block."""
        return 2 * len(self.vit.blocks)

    @property
    def embed_dim(self) -> int:
        """Width D of the tokens."""
        return self.vit.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.vit.patch_embed.patch_size[0]

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a crop.

        Raises:
            ValueError: the patch size does not divide the crop; names both and the nearest sizes.
        """
        patch = self.patch_size
        if wrong := [side for side in (height, width) if side < patch or side % patch]:
            below = max(wrong[0] // patch, 1) * patch
            nearest = f"{below}" if below > wrong[0] else f"{below} and {below + patch}"
            raise ValueError(f"crop of {height}×{width} px: patch size {patch} does not divide it; nearest: {nearest}")
        return height // patch, width // patch

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens before the first block: class, registers, patches; (B, 1 + R + N, D).

        Masked patches become the mask token before the position embedding is added, so that the student knows where
        a hole is (DINOv2's `prepare_tokens_with_masks`).
        """
        rows, columns = self.patch_grid(*images.shape[-2:])
        x = self.vit.patch_embed(images)  # (B, rows, columns, D)
        if mask is not None:
            if mask.shape != (len(images), rows * columns):
                raise ValueError(f"mask {tuple(mask.shape)}: {len(images)} crops of {rows * columns} patches are given")
            x = torch.where(mask.view(-1, rows, columns, 1), self.mask_token.to(x.dtype), x)
        return self.vit.norm_pre(self.vit.patch_drop(with_positions(self.vit, x, self._interpolation)))

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor | None] | None = None,
        kept: Sequence[Tensor] = (),
    ) -> Tokens | list[Tokens]:
        """Tokens of images (B, 3, H, W), float and normalised; mask bool (B, N), true where a patch is hidden.

        A sequence of images of several sizes, with a sequence of masks or none, goes through in one pass and gives a
        list of tokens. kept says for each size which crops each branch sees, as `kept_crops` draws them; without it
        all see all.

        Raises:
            ValueError: the patch size does not divide a crop, or a mask has another shape.
        """
        if isinstance(images, Tensor):
            assert mask is None or isinstance(mask, Tensor)
            return self._several([images], [mask], kept)[0]
        return self._several(images, [None] * len(images) if mask is None else list(mask), kept)

    def _several(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None], kept: Sequence[Tensor]
    ) -> list[Tokens]:
        xs = [self.embed(image, mask) for image, mask in zip(images, masks, strict=True)]
        for i, block in enumerate(self.vit.blocks):
            xs = block(xs, [part[2 * i : 2 * i + 2] for part in kept]) if kept else block(xs)
        flat, shapes = _join(xs)
        xs = _split(self.vit.norm(flat), shapes)
        return [Tokens(x[:, 0], x[:, self.vit.num_prefix_tokens :]) for x in xs]


def with_positions(vit: VisionTransformer, x: Tensor, interpolation: Interpolation) -> Tensor:
    """Class, registers and patches (B, 1 + R + N, D) of embedded patches (B, rows, columns, D), all with positions."""
    patch_grid = (x.shape[1], x.shape[2])
    if interpolation == "timm" or vit.num_reg_tokens or patch_grid == vit.patch_embed.grid_size:
        return vit._pos_embed(x)  # pyright: ignore[reportPrivateUsage] — timm has no public name for it
    assert vit.cls_token is not None, "checked by create_backbone"
    assert vit.pos_embed is not None, "checked by create_backbone"
    positions = resample_positions(vit.pos_embed, vit.patch_embed.grid_size, patch_grid, vit)
    class_token = vit.cls_token.expand(len(x), -1, -1)
    if vit.no_embed_class:
        return vit.pos_drop(torch.cat([class_token, x.flatten(1, 2) + positions], dim=1))
    return vit.pos_drop(torch.cat([class_token, x.flatten(1, 2)], dim=1) + positions)


def positions_for(vit: VisionTransformer, patch_grid: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """A network's position embedding (1, P + N, D) as it is used for images of that grid of patches."""
    assert vit.pos_embed is not None, "checked by create_backbone"
    old = vit.patch_embed.grid_size
    if patch_grid == old:
        return vit.pos_embed
    if interpolation == "timm":
        num_prefix_tokens = 0 if vit.no_embed_class else vit.num_prefix_tokens
        return resample_abs_pos_embed(vit.pos_embed, list(patch_grid), list(old), num_prefix_tokens=num_prefix_tokens)
    return resample_positions(vit.pos_embed, old, patch_grid, vit)


def resample_positions(
    positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], vit: VisionTransformer
) -> Tensor:
    """A position embedding (1, P + N, D) for another grid of patches (rows, columns), bicubic, as DINOv2 does it.

    With registers antialiased; without them not, and the scale computed for a grid that is 0.1 larger: so the released
    weights were trained and used (`interpolate_antialias` and `interpolate_offset` of their configurations). P is the
    number of class and register tokens that have positions in the network.
    """
    num_prefix_tokens = 0 if vit.no_embed_class else vit.num_prefix_tokens
    if vit.num_reg_tokens:
        return resample_abs_pos_embed(positions, list(new_grid), list(old_grid), num_prefix_tokens=num_prefix_tokens)
    kept, patches = positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:]
    scale = tuple((new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True))
    plane = patches.float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    resized = F.interpolate(plane, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([kept, resized.to(positions.dtype)], dim=1)


def create_backbone(
    name: str,
    *,
    img_size: int,
    patch_size: int | None = None,
    num_registers: int | None = None,
    ffn: Ffn | None = None,
    layer_scale: float | None = 1e-5,
    interpolation: Interpolation = "reference",
) -> Backbone:
    """Builds timm's model of that name with random weights, initialised as DINOv2's.

    Args:
        name: a timm model such as `vit_small_patch14_dinov2` or `vit_giant_patch14_reg4_dinov2`.
        img_size: side in pixels of the crop the position embedding is made for; other crops resample it.
        patch_size: side of a patch in pixels; None keeps the model's own.
        num_registers: register tokens without position embedding (arXiv 2309.16588); None keeps the model's own.
        ffn: `mlp` with GELU or `swiglu` (DINOv2's, whose hidden width is 8/3 of the tokens', rounded up to a multiple
            of 8); None keeps the model's own.
        layer_scale: initial scale of each residual branch, None for none (1e-5 in DINOv2).
        interpolation: as `Backbone` takes it.

    Raises:
        ValueError: unknown name (with close matches), a model of another kind, or a value out of range.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models("vit_*"), n=3)
        raise ValueError(f"no timm model '{name}'; close: {', '.join(close) or 'none, see timm.list_models()'}")
    options = timm_options(img_size, patch_size, num_registers, layer_scale)
    embed_dim = _check_family(name, options)
    if ffn is not None:
        options |= _ffn_options(ffn, embed_dim)
    vit = cast(VisionTransformer, timm.create_model(name, **options, block_fn=CropBlock))
    _init_swiglu(vit)
    backbone = Backbone(vit, interpolation)
    backbone.patch_grid(img_size, img_size)
    return backbone


def timm_options(
    img_size: int, patch_size: int | None, num_registers: int | None, layer_scale: float | None
) -> dict[str, Any]:
    """What `timm.create_model` needs beside the name for a network of `create_backbone`'s shape."""
    options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True, "img_size": img_size}
    options["init_values"] = layer_scale
    if patch_size is not None:
        options["patch_size"] = patch_size
    if num_registers is not None:
        # With registers, timm and the released weights carry no position for class and register tokens.
        options |= {"reg_tokens": num_registers, "no_embed_class": num_registers > 0}
    return options


def _check_family(name: str, options: dict[str, Any]) -> int:
    """Builds timm's own form without memory: CropBlock stands for its plain block and no other. Returns the width.

    Raises:
        ValueError: a model that is no plain vision transformer with a class token.
    """
    wrong = f"'{name}' is no plain vision transformer with a class token; take one of timm's vit_* with one"
    try:
        vit = timm.create_model(name, **options, device="meta")
    except TypeError as error:  # another family, whose constructor lacks one of these options
        raise ValueError(f"{wrong} ({error})") from error
    if not isinstance(vit, VisionTransformer) or not vit.has_class_token or vit.pos_embed is None:
        raise ValueError(wrong)
    blocks = [cast(vision_transformer.Block, block) for block in vit.blocks]
    if not all(
        type(b) is vision_transformer.Block and type(b.attn) is Attention and b.attn.gate is None for b in blocks
    ):
        raise ValueError(wrong)
    return vit.embed_dim


def _ffn_options(ffn: Ffn, embed_dim: int) -> dict[str, Any]:
    if ffn == "mlp":
        return {"mlp_layer": Mlp, "mlp_ratio": 4.0, "act_layer": nn.GELU}
    hidden = (int(8 * embed_dim / 3) + 7) // 8 * 8
    # Both halves of the gate lie in one matrix; the small excess outlives timm's rounding down.
    return {"mlp_layer": SwiGLUPacked, "mlp_ratio": (2 * hidden + 0.5) / embed_dim, "act_layer": nn.SiLU}


def _init_swiglu(vit: VisionTransformer) -> None:
    """Starts a packed SwiGLU like every other matrix, as DINOv2 does: timm starts half of it near zero."""
    for module in vit.modules():
        if isinstance(module, GluMlp):
            nn.init.trunc_normal_(module.fc1.weight, std=0.02)
            if module.fc1.bias is not None:
                nn.init.zeros_(module.fc1.bias)
