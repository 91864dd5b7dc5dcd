"""What is embedded, and how: the options of `tilestream embed`.

Apart from the code that obeys them, so that the command line can read them without importing torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from streaming.errors import ConfigError
from streaming.plan.plan import MIN_TISSUE
from streaming.slide.geometry import MAX_UPSAMPLING
from streaming.slide.resolution import check_given_mpp

Token = Literal["cls", "patch", "cls+patch"]
Precision = Literal["32", "bf16"]
Format = Literal["parquet", "h5"]


def own_precision(given: Precision | None, *, gpu: bool) -> Precision:
    """A precision that may be left out: products in bfloat16 are what a GPU is made for."""
    return given or ("bf16" if gpu else "32")


def own_batch(given: int | None, *, gpu: bool) -> int:
    """Tiles of a batch, where their number may be left out: a GPU wants more of them to be busy."""
    return (256 if gpu else 64) if given is None else given


@dataclass(frozen=True, kw_only=True)
class TissueTiles:
    """Which tiles of a slide are embedded."""

    mpp: float
    """µm/px of the tiles"""
    size: int
    """side of a tile in px"""
    min_tissue: float
    """share of a tile's area that must be tissue"""
    max_upsampling: float
    """times that a slide's pixels may be enlarged"""


@dataclass(frozen=True, kw_only=True)
class SlideOptions:
    """Of the slides that tables and files name: where they lie, and what is to be known of them."""

    slides_in: tuple[str, ...] = ()
    """catalogs, folders or files of the slides that are named; of a catalog's slides its mpp and versions count"""
    slide_mpp: float | None = None
    """µm/px at level 0 of slides whose metadata has none"""
    max_upsampling: float = MAX_UPSAMPLING
    """times that a slide's pixels may be enlarged for a tile; what takes more is refused"""

    def __post_init__(self) -> None:
        check_given_mpp("slide_mpp", self.slide_mpp)
        _check_upsampling(self.max_upsampling)


def _check_upsampling(value: float) -> None:
    if not value >= 1:
        raise ConfigError(f"max_upsampling is {value}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Which tiles are embedded, and how."""

    mpp: float = 0.5
    """µm/px of the tiles"""
    size: int = 256
    """side of a tile in px; resized to what the backbone's patches divide"""
    min_tissue: float = MIN_TISSUE
    """share of a tile's area that must be tissue"""
    token: Token = "cls"
    """class token, mean patch token, or one after the other"""
    tokens: bool = False
    """whether all patch tokens are kept too (float16), for segmentation"""
    format: Format = "parquet"
    """h5: HDF5 as CLAM and TRIDENT lay it out"""
    precision: Precision | None = None
    """bf16: products in bfloat16; none: so on a GPU, 32 on a CPU"""
    model_batch: int | None = None
    """tiles that the model sees at once; none: 64, on a GPU 256; what its memory does not hold goes through in parts"""
    readers: tuple[int, int] = (1, 2)
    """least and most reader actors"""
    models: int = 1
    """actors that hold the model"""
    model_cpus: int = 1
    """CPU slots and threads of each"""
    gpu: bool = False
    """whether each takes a GPU"""
    slide_mpp: float | None = None
    """µm/px at level 0 of slides whose metadata has none"""
    max_upsampling: float = MAX_UPSAMPLING
    """times that a slide's pixels may be enlarged for a tile; slides that need more are rejected"""

    def __post_init__(self) -> None:
        if not 0 < self.mpp < math.inf or min(self.size, self.batch, self.models, self.model_cpus) < 1:
            numbers = f"mpp {self.mpp}, size {self.size}, model_batch {self.batch}, models {self.models}"
            raise ConfigError(f"{numbers}, model_cpus {self.model_cpus}: all above 0")
        check_given_mpp("slide_mpp", self.slide_mpp)
        if not 1 <= self.readers[0] <= self.readers[1]:
            raise ConfigError(f"readers {self.readers}: give the least and the most, the least at least 1")
        if not 0 < self.min_tissue <= 1:
            raise ConfigError(f"min_tissue is {self.min_tissue}; it is a share above 0 and up to 1")
        _check_upsampling(self.max_upsampling)
        for name, kind in (("token", Token), ("format", Format), ("precision", Precision)):
            if getattr(self, name) not in (*get_args(kind), *([None] if name == "precision" else [])):
                raise ConfigError(f"{name} {getattr(self, name)!r}; take one of {', '.join(get_args(kind))}")

    @property
    def products(self) -> Precision:
        """The precision that is taken."""
        return own_precision(self.precision, gpu=self.gpu)

    @property
    def batch(self) -> int:
        """The tiles that the model sees at once, where memory holds them."""
        return own_batch(self.model_batch, gpu=self.gpu)

    @property
    def tiles(self) -> TissueTiles:
        """Which tiles."""
        return TissueTiles(mpp=self.mpp, size=self.size, min_tissue=self.min_tissue, max_upsampling=self.max_upsampling)
