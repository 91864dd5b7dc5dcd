"""The network that is trained, twice: a backbone with its heads, as student and as teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.recipe.backbone import Backbone, Interpolation, create_backbone
from trainer.recipe.free_field import FREE
from trainer.recipe.heads import DINOHead, PatchPredictor


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Backbone and heads."""

    backbone: str = "vit_small_patch14_dinov2"
    """name of a timm vision transformer"""
    patch_size: int | None = None
    """side of a patch in px; none: the backbone's own"""
    num_registers: int | None = None
    """register tokens; none: the backbone's own"""
    ffn: Literal["mlp", "swiglu"] | None = None
    """feed-forward part of the blocks; none: the backbone's own"""
    layer_scale: float | None = 1e-5
    """initial scale of residual branches"""
    interpolation: Interpolation = "reference"
    """how positions are resampled for crops of another size than the global ones, and for tiles that are embedded:
    reference: as DINOv2 (without registers not antialiased); timm: antialiased"""
    drop_path: float = 0.1
    """stochastic depth of the student: share of the crops that a branch does not see, the same in all blocks"""
    num_prototypes: int = 65536
    """width of the heads' output"""
    head_hidden: int = 2048
    """width of the heads' hidden layers"""
    head_bottleneck: int = 256
    """width before the prototypes"""
    norm_last_layer: bool = False
    """whether the prototypes stay at norm 1, as in DINO's first version; DINOv2 learns their norms"""
    separate_heads: bool = False
    """whether iBOT has a head of its own"""
    ibot_prototypes: int | None = None
    """width of that head's output; none: num_prototypes"""
    ibot_bottleneck: int | None = None
    """width before its prototypes; none: head_bottleneck"""
    init: str | None = field(default=None, metadata=FREE)
    """weights to start from: a run or checkpoint of ours (student, teacher and heads); a file (.safetensors, .pth, .pt,
    .bin, .ckpt) with a backbone of timm's, the reference's or transformers' names; a folder in timm's or transformers'
    layout; a name of timm's hub such as vit_small_patch14_dinov2.lvd142m; none: random"""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} must be in [0, 1)")
        if not self.separate_heads and (self.ibot_prototypes or self.ibot_bottleneck):
            raise ValueError("ibot_prototypes and ibot_bottleneck are of iBOT's own head; set separate_heads true")


def build_backbone(config: ModelConfig, crop_px: int) -> Backbone:
    """The backbone of a configuration, its position embedding made for crops of that size."""
    return create_backbone(
        config.backbone,
        img_size=crop_px,
        patch_size=config.patch_size,
        num_registers=config.num_registers,
        ffn=config.ffn,
        layer_scale=config.layer_scale,
        interpolation=config.interpolation,
    )


class Network(nn.Module):
    """A backbone with its heads; the student and the teacher are one each."""

    def __init__(self, backbone: Backbone, config: ModelConfig, patch: Literal["ibot", "regression"] = "ibot") -> None:
        super().__init__()
        self.backbone = backbone

        def head(num_prototypes: int, bottleneck: int) -> DINOHead:
            return DINOHead(
                backbone.embed_dim,
                num_prototypes,
                hidden_dim=config.head_hidden,
                bottleneck_dim=bottleneck,
                norm_last_layer=config.norm_last_layer,
            )

        self.dino_head = head(config.num_prototypes, config.head_bottleneck)
        self._regresses = patch == "regression"
        self.predictor = PatchPredictor(backbone.embed_dim, config.head_hidden) if self._regresses else None
        self.ibot_head = None
        if config.separate_heads and not self._regresses:
            self.ibot_head = head(
                config.ibot_prototypes or config.num_prototypes, config.ibot_bottleneck or config.head_bottleneck
            )

    def forward(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        chosen: Tensor,
        kept: Sequence[Tensor] = (),
        *,
        in_one_pass: bool = False,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Crops of several sizes: class tokens and their logits by size, and logits of patch tokens.

        images, masks and kept as the backbone takes them; chosen int64 (M,) numbers the patches of the first size that
        have logits, crop after crop. A shared head sees all of these tokens at once. With regression there are no
        logits of patches, but what is foretold of them; without a predictor, which the teacher has not, their tokens.

        in_one_pass says whether crops of all sizes go through the backbone together. That halves the kernels to start.
        A CPU starts none, and its allocator reuses the memory of smaller tensors only: there, one size after the other
        took 0.88 of the time and 0.94 of the memory (`tilestream bench trainer`).
        """
        if in_one_pass:
            tokens = self.backbone(images, masks, kept)
        else:
            of_size = [[part] for part in kept] or [[]] * len(images)
            sizes = zip(images, masks, of_size, strict=True)
            tokens = [self.backbone(image, mask, branches) for image, mask, branches in sizes]
        cls, patches = [one.cls for one in tokens], tokens[0].patches.flatten(0, 1).index_select(0, chosen)
        is_shared = self.ibot_head is None and not self._regresses
        seen = [*cls, patches] if is_shared else cls
        together = torch.cat(seen)
        own_cls, logits = _parts(together, seen)[: len(cls)], _parts(self.dino_head(together), seen)
        if is_shared:
            return own_cls, logits[:-1], logits[-1]
        if self.ibot_head is not None:
            return own_cls, logits, self.ibot_head(patches)
        return own_cls, logits, patches if self.predictor is None else self.predictor(patches)


def _parts(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """As many rows as each of the others has, in turn, in the same memory; nobody may change them in place.

    To autograd they are no views: those that a sharded module returns would be lost if they were changed, and FSDP
    warns of them.
    """
    return list(torch.unsafe_split_with_sizes(whole, [len(part) for part in like]))
