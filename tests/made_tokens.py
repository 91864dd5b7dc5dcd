"""Patch tokens made by hand, for what is learnt from them."""

from typing import Any

import numpy as np

from trainer.evaluate.datasets import Samples, Tile
from trainer.evaluate.features import Features
from trainer.evaluate.splits import Fold

NUM, SIDE, PX = 24, 4, 64
"""tiles, patches along a tile's side, and its px"""
FOLD = [Fold(train=np.arange(16), test=np.arange(16, NUM))]


def of_tokens(tokens: np.ndarray) -> Features:
    """Features of tokens (NUM, SIDE, SIDE, d)."""
    wide = np.tile(tokens, 32).astype(np.float16)  # as wide as a small model's
    return Features(embeddings=np.zeros((NUM, 1), np.float32), patches=wide, side=(PX, PX))


def samples(**targets: Any) -> Samples:
    """So many tiles, two a patient, with what is known of them."""
    patients = np.array([f"p{i // 2}" for i in range(NUM)])
    return Samples(source="d", tiles=tuple(Tile(uri=str(i)) for i in range(NUM)), patients=patients, **targets)
