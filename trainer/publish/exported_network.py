"""An exported folder as a network, without this project: the head of each file that a benchmark is given.

Needs torch, torchvision, safetensors and timm from 0.9.16 on. `tilestream export --trident`, `--patho-bench` and
`--thunder` write it beside the model, with what the benchmark asks for behind it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import transforms


class ExportedNetwork(nn.Module):
    """Normalised images (B, 3, H, W) → embeddings (B, width), as the model's card says."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        about: dict[str, Any] = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        wanted, told = about["pretrained_cfg"], about["tilestream"]
        self.token, self.width = told["embedding"], told["embedding_dim"]
        options: dict[str, Any] = {**about["model_args"], "num_classes": 0, "dynamic_img_size": True}
        self.vit: Any = timm.create_model(about["architecture"], **options)
        self.vit.load_state_dict(load_file(Path(folder, "model.safetensors")))
        side = wanted["input_size"][-1]
        self.transform = transforms.Compose(
            [
                transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(wanted["mean"], wanted["std"]),
            ]
        )

    @property
    def patch_width(self) -> int:
        """Numbers of a patch token."""
        return self.vit.embed_dim

    def patches(self, images: Tensor) -> Tensor:
        """Patch tokens (B, N, D), row by row."""
        return self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, width)."""
        tokens = self.vit.forward_features(images)
        class_token, mean_patch = tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)
        chosen = {"cls": [class_token], "patch": [mean_patch], "cls+patch": [class_token, mean_patch]}[self.token]
        return torch.cat(chosen, dim=1)
