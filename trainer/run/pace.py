"""How fast GPUs are by their data sheets, and what of that a training reaches."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from trainer.recipe.flops import step_flops
from trainer.run.config import Config


class Peak(NamedTuple):
    """Floating-point operations of a card, in TFLOP/s, without sparsity."""

    bfloat16: float
    float32: float
    """without TF32, which is not used here"""


PEAKS: dict[str, Peak] = {
    "B200": Peak(2250, 75),
    "GH200": Peak(989, 67),
    "H200 NVL": Peak(835, 60),
    "H200": Peak(989, 67),
    "H100 PCIe": Peak(756, 51),
    "H100 NVL": Peak(835, 60),
    "H100": Peak(989, 67),
    "A100": Peak(312, 19.5),
    "A40": Peak(149.7, 37.4),
    "A10": Peak(125, 31.2),
    "L40S": Peak(362, 91.6),
    "L4": Peak(121, 30.3),
}
"""by the words of the card's name; where several fit, the first. Source: NVIDIA's data sheets"""
GPU_TFLOPS = PEAKS["H100"].bfloat16
"""of the card that is planned with, an H100 SXM"""
UTILISATION = 0.4
"""share of it that a training reaches, an estimate"""


def peak_flops(card: str, precision: str) -> float | None:
    """FLOP/s at most of a card, by the name that its driver gives it; none where that is not known.

    precision is `train.precision`. A slice of a card (MIG) has a share that its name does not tell.
    """
    words = set(re.split(r"[\s-]+", card))
    if "MIG" in words:
        return None
    peak = next((peak for name, peak in PEAKS.items() if words.issuperset(name.split())), None)
    return peak and 1e12 * (peak.bfloat16 if precision.startswith("bf16") else peak.float32)


def card_of(device: torch.device) -> str:
    """The name of a GPU, as its driver gives it; of another device, its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tile_flops(config: Config) -> float:
    """Floating-point operations of a tile's training, as `step_flops` counts them."""
    return step_flops(config.recipe, config.train.batch).total / config.train.batch


def tiles_per_second_per_gpu(config: Config) -> float:
    """Tiles/s of one GPU, where readers feed it and nothing else holds it up. An estimate: none was at hand."""
    return UTILISATION * GPU_TFLOPS * 1e12 / tile_flops(config)
