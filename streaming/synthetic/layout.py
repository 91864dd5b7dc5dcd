"""What a synthetic slide is, and which tissue lies where on it: pure functions of (slide, coordinates)."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np

from streaming.synthetic.artefacts import Artefact, Pixels
from streaming.synthetic.noise import Field, nearest_seed, source_key, uniform, unit_draw, value_noise

Codec = Literal["jpeg", "jp2k-rgb", "jp2k-ycbcr"]


class TissueClass(IntEnum):
    """What a point of a slide is made of."""

    BACKGROUND = 0
    STROMA = 1
    TUMOUR = 2
    LYMPHOCYTES = 3
    FAT = 4
    GLAND = 5


@dataclass(frozen=True, kw_only=True)
class SyntheticSlide:
    """One made-up slide; equal values give equal pixels and equal files."""

    width: int = 8192
    """Level-0 px."""
    height: int = 6144
    """Level-0 px."""
    mpp: float = 0.25
    """µm per px at level 0."""
    patient: int = 0
    """Seed of stain, outline and texture."""
    block_px: int = 256
    """Side of a compressed block, px."""
    codec: Codec = "jpeg"
    """How blocks are compressed; JPEG 2000 as RGB (33005) or as subsampled YCbCr (33003)."""
    quality: int = 80
    """JPEG quality, 1 to 100, or PSNR in dB of JPEG 2000."""
    subsampling: tuple[int, int] = (2, 2)
    """Chroma subsampling (horizontal, vertical) of JPEG and YCbCr."""
    downsamples: tuple[int, ...] = (1, 4, 16)
    """Level-0 px per px of each level."""
    write_mpp: bool = True
    """Whether the file tells its mpp."""
    artefacts: tuple[Artefact, ...] = ()
    """What spoils it."""

    def __post_init__(self) -> None:
        if self.downsamples[:1] != (1,) or any(b <= a or b % a for a, b in pairwise(self.downsamples)):
            raise ValueError(f"downsamples {self.downsamples}: must start at 1, each a multiple of the one before")
        if min(self.width, self.height) < self.downsamples[-1]:
            raise ValueError(f"{self.width} × {self.height} px: too small for downsample {self.downsamples[-1]}")
        if self.block_px < 16 or self.block_px % 16:
            raise ValueError(f"block_px {self.block_px}: TIFF wants a multiple of 16")
        if not 0.2 <= self.mpp <= 2:
            raise ValueError(f"mpp {self.mpp}: nuclei can be drawn at 0.2 to 2 µm per px")


def outline(slide: SyntheticSlide, xs: Field, ys: Field) -> Field:
    """Depth in tissue, up to a constant: some ellipses side by side, roughened; (len(ys), len(xs))."""
    draws = uniform(source_key(slide.patient, "pieces"), 4, 4)
    u, v, side = xs / slide.width, (ys / slide.height)[:, None], min(slide.width, slide.height)
    num, wide, depth = 1 + int(draws[3, 0] * 2.4), slide.width >= slide.height, np.full((len(ys), len(xs)), -9.0)
    for k, (a, b, c, d) in enumerate(draws[:num]):
        along, across = (u, v) if wide else (v, u)
        along = (along * num - k - 0.5 - 0.16 * (a - 0.5)) / (0.40 + 0.1 * b)
        across = (across - 0.5 - 0.12 * (c - 0.5)) / (0.34 + 0.12 * d)
        depth = np.maximum(depth, 1 - np.sqrt(along * along + across * across))
    for grain, weight in ((0.34, 0.5), (0.15, 0.3), (0.06, 0.12), (0.02, 0.05), (0.007, 0.02)):
        depth += weight * value_noise(source_key(slide.patient, "outline", grain), xs, ys, grain * side)
    edge = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
    return depth - (np.maximum(0.12 - edge, 0) * 12) ** 2  # the section ends before the scanned rectangle does


@lru_cache(maxsize=64)
def tissue_depth(slide: SyntheticSlide) -> float:
    """The depth at which tissue begins, for it to cover 42 to 58 % of the slide."""
    points = (np.arange(128) + 0.5) / 128
    depths = np.sort(outline(slide, points * slide.width, points * slide.height), axis=None)
    share = 0.42 + 0.16 * uniform(source_key(slide.patient, "share"), 1)[0]
    return float(depths[int((1 - share) * depths.size)])


def _bent(slide: SyntheticSlide, xs: Field, ys: Field, cell: float) -> Iterator[tuple[Field, Field]]:
    """Coordinates of the grid xs × ys, displaced by ever finer noise."""
    x, y = np.broadcast_arrays(xs[None], ys[:, None])
    for grain, bend in ((0.6, 0.3), (0.15, 0.08), (0.04, 0.02)):
        x = x + cell * bend * value_noise(source_key(slide.patient, "x", grain), xs, ys, grain * cell)
        y = y + cell * bend * value_noise(source_key(slide.patient, "y", grain), xs, ys, grain * cell)
        yield x, y


def regions(slide: SyntheticSlide, xs: Field, ys: Field) -> tuple[Pixels, Pixels]:
    """Class and material on the grid xs × ys, as if all were tissue.

    They differ in glands: of material GLAND is their epithelium, BACKGROUND the lumen, STROMA what lies between.
    """
    cell = min(450 / slide.mpp, slide.width / 4, slide.height / 4)
    (gland_x, gland_y), *_, (x, y) = _bent(slide, xs, ys, cell)
    _, seeds = nearest_seed(source_key(slide.patient, "regions"), x, y, cell)
    shares = np.array((0.30, 0.29, 0.13, 0.12, 0.16)) * (0.7 + 0.6 * uniform(source_key(slide.patient, "shares"), 5))
    edges = np.cumsum(shares / shares.sum())[:-1]
    classes = (1 + np.searchsorted(edges, unit_draw(seeds, 2), side="right")).astype(np.uint8)
    materials, glands = classes.copy(), np.nonzero(classes == TissueClass.GLAND)
    distance, gland = nearest_seed(
        source_key(slide.patient, "glands"), gland_x[glands], gland_y[glands], 110 / slide.mpp
    )
    outward = distance * slide.mpp - (10 + 24 * unit_draw(gland, 3))  # µm from the lumen
    of_gland = (TissueClass.BACKGROUND, TissueClass.GLAND)
    materials[glands] = np.select((outward < 0, outward < 20), of_gland, TissueClass.STROMA)
    return classes, materials


def tissue_classes(slide: SyntheticSlide, x: int, y: int, width: int, height: int, step: int) -> Pixels:
    """`TissueClass` at the centre of each step × step square of a region, all in level-0 px.

    Returns uint8 (ceil(height / step), ceil(width / step)).
    """
    xs, ys = np.arange(x, x + width, step) + step / 2, np.arange(y, y + height, step) + step / 2
    classes, _ = regions(slide, xs, ys)
    return np.where(outline(slide, xs, ys) > tissue_depth(slide), classes, np.uint8(TissueClass.BACKGROUND))
