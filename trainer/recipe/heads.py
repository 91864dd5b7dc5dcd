"""The projection head of DINO and iBOT: features to their likeness with learned prototypes."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Linear):
    """A weight-normed linear layer without bias: cosines with the prototypes, times a learned norm of each.

    `weight` (K, D) has the directions, `scale` (K, 1) the norms, which start at 1; with `has_unit_norms` there is no
    `scale`, and they stay 1. Source: DINOv2's last layer, whose `weight_g` is trained and decayed; DINO v1 froze it.

    Normalising in `forward` instead of by `torch.nn.utils.parametrizations.weight_norm` keeps plain parameters, which
    sharding, the teacher's moving average and layer-wise groups treat like any other.
    """

    def __init__(self, in_features: int, num_prototypes: int, *, has_unit_norms: bool = False) -> None:
        super().__init__(in_features, num_prototypes, bias=False)
        # Two dimensions, as in the reference: by that it is decayed, where vectors are not.
        self.scale = None if has_unit_norms else nn.Parameter(torch.ones(num_prototypes, 1))

    def forward(self, input: Tensor) -> Tensor:
        """Maps (…, in_features) to (…, num_prototypes)."""
        # Shards come in bfloat16, whose norms would be off by up to 0.4 %.
        weight = F.normalize(self.weight.float(), dim=-1)
        if self.scale is not None:
            weight = weight * self.scale
        return F.linear(input, weight.to(self.weight.dtype))


def _mlp(in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> nn.Sequential:
    widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
    mlp = nn.Sequential()
    for i, (width_in, width_out) in enumerate(pairwise(widths)):
        if i:
            mlp.append(nn.GELU())
        linear = nn.Linear(width_in, width_out)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        mlp.append(linear)
    return mlp


class PatchPredictor(nn.Module):
    """Foretells the teacher's patch tokens from the student's tokens of masked patches: an MLP of three layers.

    The predictor is ours: I-JEPA's has attention (arXiv 2301.08243), data2vec's is linear (arXiv 2202.03555). Here the
    masked patches go through the student's own blocks, so attention they have had.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.mlp = _mlp(dim, hidden_dim, dim, num_layers=3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (…, dim) to the like."""
        return self.mlp(tokens)


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation, likeness with the prototypes (DINOv2's `DINOHead`).

    Args:
        in_dim: width of the backbone's tokens.
        num_prototypes: width K of the output.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width before the prototypes.
        num_layers: linear layers of the MLP, at least 1, with GELU between them.
        norm_last_layer: whether the prototypes stay at norm 1.

    Raises:
        ValueError: an argument below 1, named in the message.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        *,
        norm_last_layer: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "in_dim": in_dim,
            "num_prototypes": num_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "num_layers": num_layers,
        }
        if wrong := [f"{name}={value}" for name, value in sizes.items() if value < 1]:
            raise ValueError(f"DINOHead: {', '.join(wrong)} must be at least 1")
        self.mlp = _mlp(in_dim, hidden_dim, bottleneck_dim, num_layers)
        # Keeps nn.Linear's own initial scale, as the reference does: it sets how far one AdamW step turns a prototype.
        self.last_layer = Prototypes(bottleneck_dim, num_prototypes, has_unit_norms=norm_last_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (…, in_dim) to logits (…, K) before any temperature: cosines, times the prototypes' norms."""
        return self.last_layer(F.normalize(self.mlp(tokens), dim=-1))
