"""Which picture, and how: the options of `tilestream picture`.

Apart from the code that obeys them, so that the command line can read them without importing scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from streaming.errors import ConfigError
from trainer.embed.options import SlideOptions

Kind = Literal["heatmap", "tokens", "neighbours", "map", "geojson"]
Method = Literal["tsne", "pca"]


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Which picture, and how."""

    kind: Kind
    """heatmap, tokens, geojson: a file a slide; neighbours, map: one of all slides"""
    dataset: str | None = None
    """labelled tiles, as `tilestream evaluate` takes them, that teach a class (heatmap, geojson)"""
    name: str | None = None
    """that class"""
    queries: int = 6
    """query tiles of a gallery of neighbours, a row each"""
    k: int = 8
    """neighbours of each"""
    across: bool = False
    """whether neighbours come from other slides than the query's alone"""
    method: Method = "tsne"
    """how a map is laid out"""
    most: int = 2000
    """tiles on a map, drawn at random"""
    seed: int = 0
    """of what is drawn at random"""
    slides: SlideOptions = field(default_factory=SlideOptions)
    """where the slides of the dataset lie, and of embeddings of TRIDENT and CLAM, which tell names alone"""

    def __post_init__(self) -> None:
        if (self.dataset is None) != (self.name is None):
            raise ConfigError("--dataset and --class go together: labelled tiles, and the class that is scored")
        if self.kind == "heatmap" and self.dataset is None:
            raise ConfigError("a heatmap shows the score of a class; give --dataset LABELLED-TILES --class NAME")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed {self.seed}; it must be from 0 to {2**32 - 1}")
        if min(self.queries, self.k, self.most) < 1:
            raise ConfigError(f"queries {self.queries}, k {self.k}, most {self.most}: all at least 1")
