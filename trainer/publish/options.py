"""What an export says of a model: the options of `tilestream export`.

Apart from the code that obeys them, so that the command line can read them without importing torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from streaming.errors import ConfigError
from trainer.embed.options import Token

Layout = Literal["timm", "transformers"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What an export says of the model."""

    layout: Layout = "timm"
    """timm's keys (fused qkv), or transformers' Dinov2 (separate query, key, value)"""
    token: Token = "cls"
    """how an embedding is made: class token, mean patch token, or one after the other"""
    license: str = "other"
    """licence of the weights, an SPDX name"""
    name: str = "tilestream-model"
    """name of the model in its card"""
    eva: tuple[str, ...] = ()
    """configurations of kaiko's eva, written beside the model with it as backbone"""
    trident: bool = False
    """whether to write trident_encoder.py, by which TRIDENT embeds slides with the model"""
    patho_bench: bool = False
    """whether to write patho_bench_encoder.py, by which Patho-Bench pools its embeddings"""
    thunder: bool = False
    """whether to write thunder_model.py, which THUNDER runs"""

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ConfigError(f"layout {self.layout!r}; take one of {', '.join(get_args(Layout))}")
        if self.token not in get_args(Token):
            raise ConfigError(f"token {self.token!r}; take one of {', '.join(get_args(Token))}")
        if not self.license:
            raise ConfigError("license is empty; give an SPDX name, such as cc-by-4.0, or leave it out")
        asked = [flag for flag in ("eva", "trident", "patho_bench", "thunder") if getattr(self, flag)]
        if asked and self.layout != "timm":
            flag = asked[0].replace("_", "-")
            raise ConfigError(f"--{flag} wants timm's layout; take --layout timm")
        if asked and not re.fullmatch(r"[\w.-]+", self.name, re.ASCII):
            raise ConfigError(f"name {self.name!r}: other programs take letters, digits, '.', '_' and '-'")
