"""How fast a GPU trains a configuration, by its floating-point operations: to plan with before that is measured."""

from __future__ import annotations

from trainer.recipe.flops import step_flops
from trainer.run.config import Config

GPU_TFLOPS = 989.0
"""of products in bfloat16, without sparsity: NVIDIA's data sheet of the H100 SXM"""
UTILISATION = 0.4
"""share of it that a training reaches: about that of the 22,016 A100 hours of DINOv2's ViT-g (arXiv 2304.07193)"""


def tiles_per_second_per_gpu(config: Config) -> float:
    """Tiles/s of one GPU, where readers feed it and nothing else holds it up. An estimate: none was at hand."""
    flops = step_flops(config.recipe, config.train.batch).total / config.train.batch
    return UTILISATION * GPU_TFLOPS * 1e12 / flops
