"""What an export says of a model: the options of `tilestream export`.

Apart from the code that obeys them, so that the command line can read them without importing torch.
"""

from __future__ import annotations

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

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ConfigError(f"layout {self.layout!r}; take one of {', '.join(get_args(Layout))}")
        if self.token not in get_args(Token):
            raise ConfigError(f"token {self.token!r}; take one of {', '.join(get_args(Token))}")
        if self.eva and self.layout != "timm":
            raise ConfigError("eva loads timm's layout; take --layout timm for --eva")
