"""What is embedded, and how: the options of `tilestream embed`.

Apart from the code that obeys them, so that the command line can read them without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from streaming.errors import ConfigError
from streaming.plan.plan import MIN_TISSUE
from streaming.slide.geometry import MAX_UPSAMPLING
from streaming.slide.resolution import check_given_mpp

Token = Literal["cls", "patch", "cls+patch"]
Precision = Literal["32", "bf16"]
Format = Literal["parquet", "h5"]


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
    precision: Precision = "32"
    """bf16: products in bfloat16"""
    model_batch: int = 64
    """tiles that the model sees at once"""
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
        if not self.mpp > 0 or min(self.size, self.model_batch, self.models, self.model_cpus) < 1:
            numbers = f"mpp {self.mpp}, size {self.size}, model_batch {self.model_batch}, models {self.models}"
            raise ConfigError(f"{numbers}, model_cpus {self.model_cpus}: all above 0")
        check_given_mpp("slide_mpp", self.slide_mpp)
        if not 0 < self.min_tissue <= 1:
            raise ConfigError(f"min_tissue is {self.min_tissue}; it is a share above 0 and up to 1")
        _check_upsampling(self.max_upsampling)
        for name, kind in (("token", Token), ("format", Format), ("precision", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} {getattr(self, name)!r}; take one of {', '.join(get_args(kind))}")

    @property
    def tiles(self) -> TissueTiles:
        """Which tiles."""
        return TissueTiles(mpp=self.mpp, size=self.size, min_tissue=self.min_tissue, max_upsampling=self.max_upsampling)
