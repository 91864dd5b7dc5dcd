"""timm's vision transformers as DINOv2 uses them: masked tokens, registers, uniform stochastic depth, any crop size."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class Tokens(NamedTuple):
    """What a backbone makes of B crops of N patches, after the final norm."""

    cls: Tensor
    """Class tokens (B, D)."""
    patches: Tensor
    """Patch tokens (B, N, D), row by row."""


class Backbone(nn.Module):
    """A timm vision transformer, kept under `vit` so that its keys stay timm's, and a learned mask token.

    Args:
        vit: built with `num_classes=0, dynamic_img_size=True`, with a class token; its own drop path stays 0.
        drop_path: rate of stochastic depth while training, the same in all blocks (DINOv2's `drop_path_uniform`).

    Raises:
        ValueError: drop_path out of range, or above 0 with blocks other than timm's plain `Block`.
    """

    def __init__(self, vit: VisionTransformer, drop_path: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path} must be in [0, 1)")
        if drop_path and not all(type(block) is Block for block in vit.blocks):
            raise ValueError(
                f"drop_path={drop_path}: this model's blocks, {type(vit.blocks[0]).__name__}, don't support it"
            )
        self.vit = vit
        self.drop_path = drop_path
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))

    @property
    def embed_dim(self) -> int:
        """Width D of the tokens."""
        return self.vit.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.vit.patch_embed.patch_size[0]

    def grid(self, height: int, width: int) -> tuple[int, int]:
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
        rows, columns = self.grid(*images.shape[-2:])
        x = self.vit.patch_embed(images)  # (B, rows, columns, D)
        if mask is not None:
            if mask.shape != (len(images), rows * columns):
                raise ValueError(f"mask {tuple(mask.shape)}: {len(images)} crops of {rows * columns} patches are given")
            x = torch.where(mask.view(-1, rows, columns, 1), self.mask_token.to(x.dtype), x)
        x = self.vit._pos_embed(x)  # pyright: ignore[reportPrivateUsage] — timm has no public name for it
        return self.vit.norm_pre(self.vit.patch_drop(x))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """Tokens of images (B, 3, H, W), float and normalised; mask bool (B, N), true where a patch is hidden.

        Raises:
            ValueError: the patch size does not divide the crop, or the mask has another shape.
        """
        x = self.embed(images, mask)
        drop = self.drop_path if self.training else 0.0
        for block in self.vit.blocks:
            x = _block_on_subset(cast(Block, block), x, drop) if drop else block(x)
        x = self.vit.norm(x)
        return Tokens(x[:, 0], x[:, self.vit.num_prefix_tokens :])


def _add_on_subset(x: Tensor, branch: Callable[[Tensor], Tensor], drop: float) -> Tensor:
    """Adds a residual branch to a random subset of the batch, scaled so that the expectation stays.

    The dropped samples cost nothing; zeroing them afterwards would. Source: DINOv2's
    `drop_add_residual_stochastic_depth`.
    """
    kept = max(int(len(x) * (1 - drop)), 1)
    chosen = torch.randperm(len(x), device=x.device)[:kept]
    return torch.index_add(x, 0, chosen, branch(x[chosen]).to(x.dtype), alpha=len(x) / kept)


def _block_on_subset(block: Block, x: Tensor, drop: float) -> Tensor:
    """`Block.forward` of timm with each of its two residual branches on its own subset of the batch."""
    x = _add_on_subset(x, lambda s: block.ls1(block.attn(block.norm1(s))), drop)
    return _add_on_subset(x, lambda s: block.ls2(block.mlp(block.norm2(s))), drop)


def create_backbone(
    name: str,
    *,
    img_size: int,
    patch_size: int | None = None,
    num_registers: int | None = None,
    drop_path: float = 0.0,
    layer_scale: float | None = 1e-5,
) -> Backbone:
    """Builds timm's model of that name with random weights, initialised as DINOv2's.

    Args:
        name: a timm model such as `vit_small_patch14_dinov2` or `vit_giant_patch14_reg4_dinov2`.
        img_size: side in pixels of the crop the position embedding is made for; other crops resample it.
        patch_size: side of a patch in pixels; None keeps the model's own.
        num_registers: register tokens without position embedding (arXiv 2309.16588); None keeps the model's own.
        drop_path: rate of stochastic depth; for the student, 0 for the teacher.
        layer_scale: initial scale of each residual branch, None for none (1e-5 in DINOv2).

    Raises:
        ValueError: unknown name (with close matches), a model without class token, or a value out of range.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models("vit_*"), n=3)
        raise ValueError(f"no timm model '{name}'; close: {', '.join(close) or 'none, see timm.list_models()'}")
    options: dict[str, Any] = {}
    if patch_size is not None:
        options["patch_size"] = patch_size
    if num_registers is not None:
        # With registers, timm and the released weights carry no position for class and register tokens.
        options |= {"reg_tokens": num_registers, "no_embed_class": num_registers > 0}
    wrong_family = f"'{name}' is no plain vision transformer with a class token; take one of timm's vit_* with one"
    try:
        vit = timm.create_model(
            name, num_classes=0, dynamic_img_size=True, img_size=img_size, init_values=layer_scale, **options
        )
    except TypeError as error:  # another family, whose constructor lacks one of these options
        raise ValueError(f"{wrong_family} ({error})") from error
    if not isinstance(vit, VisionTransformer) or not vit.has_class_token:
        raise ValueError(wrong_family)
    backbone = Backbone(vit, drop_path)
    backbone.grid(img_size, img_size)
    return backbone
