"""Which level serves a wanted resolution, and how its pixels become a tile.

Level-0 pixels are `x, y`; pixels of another level say so. mpp is µm per pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from streaming.errors import SlideError

Floats = NDArray[np.float64]

# x, y, width and height, in level-0 pixels
Rectangle = tuple[int, int, int, int]

# Downsamples are ratios of rounded dimensions (4443/2221 = 2.0005): where pixels are resampled, a level this little
# coarser than asked still counts as fine enough.
LEVEL_TOLERANCE = 0.01

# Scanners write 0.2527, 0.2485 or 0.5022 µm/px where 0.25 and 0.5 are meant. Pixels this near to what is wanted are
# taken as they are, which costs a quarter of resampling them.
MPP_TOLERANCE = 0.05

# 0.2625 is 5 % above 0.25, but not in binary numbers.
_ROUNDING = 1e-9

# By how much a slide's pixels may be enlarged to be of the wanted mpp; past it, tiles are a blur of what is not there.
MAX_UPSAMPLING = 2.0

# A slide whose levels lie a factor 4 apart gives a tile's pixel of 1 to 16 of its own. So many tell that levels are
# missing.
MANY_PIXELS = 32.0

# By how much a level may be reduced and still be the slide's own pixels: what JPEG is decoded at.
_REDUCTIONS = (1, 2, 4, 8)

_MIN_REMAINING_RATIO = 2.5
# More than this is a mistake, not a region: 3 GiB of pixels.
_MAX_REGION_PX = 2**30


@dataclass(frozen=True)
class LevelBox:
    """A rectangle of one level, in that level's pixels."""

    level: int
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class TileSource:
    """What the tiles of a slide at a wanted resolution are made of."""

    level: int
    downsample: float
    """level-0 pixels per pixel of the level"""
    reduction: int | None
    """by how much the level's pixels are reduced, and nothing else; None: they are resampled to the wanted mpp"""
    mpp: float
    """µm/px of the tile"""
    level_mpp: float
    """µm/px of the level"""

    @property
    def pixels_read(self) -> float:
        """How many of the level's pixels one pixel of the tile is made of."""
        return (self.mpp / self.level_mpp) ** 2


def tile_levels(
    mpp: Floats, level_downsamples: Floats, wanted_mpp: float, tolerance: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which level of each slide gives its tiles, and at which reduction, int64 (n,) each; 0: it is resampled.

    mpp (n,) is the slides' at level 0, level_downsamples (n, levels) has 0 where a slide has no such level. A level, or
    its reduction by 2, 4 or 8, that lies within `tolerance` (a share) of the wanted mpp is taken as it is: the least
    reduction first, for it reads least, then the coarsest level. Else the coarsest level that is fine enough, or level
    0. One by one or many at once, the same numbers come out.
    """
    level_mpp = mpp[:, None] * level_downsamples
    exists = level_downsamples > 0
    fine_enough = exists & (level_mpp <= wanted_mpp * (1 + LEVEL_TOLERANCE))
    level = np.where(fine_enough, level_downsamples, 0.0).argmax(axis=1)
    reduction = np.zeros(len(mpp), dtype=np.int64)
    for k in reversed(_REDUCTIONS if tolerance > 0 else ()):
        near = exists & (np.abs(level_mpp * k / wanted_mpp - 1) <= tolerance + _ROUNDING)
        found = near.any(axis=1)
        level = np.where(found, np.where(near, level_downsamples, 0.0).argmax(axis=1), level)
        reduction[found] = k
    return level.astype(np.int64), reduction


def is_fine_enough(mpp: Floats, wanted_mpp: Floats, max_upsampling: float, tolerance: float = 0.0) -> NDArray[np.bool_]:
    """Whether slides of so many µm/px at level 0 give tiles of wanted µm/px by enlarging them at most that many times.

    Both are broadcast. Downsamples are rounded, and pixels within `tolerance` (a share) are taken as they are: by that
    much a slide may be coarser still.
    """
    return mpp <= max_upsampling * wanted_mpp * (1 + max(LEVEL_TOLERANCE, tolerance))


def too_coarse(mpp: float, wanted_mpp: float, max_upsampling: float) -> str:
    """Why a slide of so many µm/px at level 0 is too coarse for tiles of wanted µm/px, with both; empty: it is not."""
    if is_fine_enough(np.array(mpp), np.array(wanted_mpp), max_upsampling):
        return ""
    return (
        f"has {mpp:g} µm/px at best: for tiles of {wanted_mpp:g} it would be enlarged {mpp / wanted_mpp:.1f} "
        f"times, over {max_upsampling:g}; take tiles of a coarser mpp, or raise the bound (--max-upsampling, "
        "data.max_upsampling of a training)"
    )


@lru_cache(maxsize=4096)
def tile_source(mpp: float, level_downsamples: tuple[float, ...], wanted_mpp: float, tolerance: float) -> TileSource:
    """What the tiles of one slide are made of, by `tile_levels`."""
    levels, reductions = tile_levels(np.array([mpp]), np.array([level_downsamples]), wanted_mpp, tolerance)
    level, reduction = int(levels[0]), int(reductions[0])
    level_mpp = mpp * level_downsamples[level]
    own = level_mpp * reduction if reduction else wanted_mpp
    return TileSource(level, level_downsamples[level], reduction or None, own, level_mpp)


def tile_box(source: TileSource, x: int, y: int, size: int) -> LevelBox:
    """The part of a level that a tile shows; x, y are the level-0 pixel of its top-left corner.

    The corner is rounded to whole pixels of the tile where these are the slide's own, else, with the extent, to whole
    pixels of the level: at most half a pixel.
    """
    unit = source.reduction or 1
    left, top = (unit * round(at / (source.downsample * unit)) for at in (x, y))
    extent = size * unit if source.reduction else max(1, round(size * source.mpp / source.level_mpp))
    return LevelBox(source.level, left, top, extent, extent)


def decode_scale(box: LevelBox, size: int, scales: Sequence[int]) -> int:
    """The largest of some whole reductions that a box can be decoded at on its way to size × size px.

    The box must be whole pixels of the reduced level, or the tile would be shifted by a part of one. What remains to
    be averaged must be a whole number of them, or many: pixels cut by 1.1 to 2 lose the fine detail (28 to 37 dB
    against the full decode on CMU-1, from 2.5 on 39 dB and more; whole numbers 49 dB and more).
    """

    def fits(scale: int) -> bool:
        if box.x % scale or box.y % scale or box.width % scale or box.height % scale:
            return False
        return box.width % (size * scale) == 0 or box.width >= _MIN_REMAINING_RATIO * size * scale

    return max(filter(fits, scales), default=1) if box.width >= 2 * size else 1


def safe_reduction(ratio: float) -> int:
    """The largest reduction that leaves so much to be averaged that no detail is lost, as `decode_scale` tells."""
    return max(k for k in _REDUCTIONS if k == 1 or ratio >= _MIN_REMAINING_RATIO * k)


def downsamples(level_dimensions: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """Level-0 px per px of each level: the mean of both axes, as OpenSlide has it."""
    (width, height), *_ = level_dimensions
    return tuple((width / w + height / h) / 2 for w, h in level_dimensions)


def check_region(uri: str, num_levels: int, level: int, size: tuple[int, int]) -> None:
    """Refuses what is no region.

    Raises:
        SlideError: no such level, a negative size, or more than 2^30 px.
    """
    if not 0 <= level < num_levels:
        raise SlideError(f"{uri}: no level {level}; it has levels 0 to {num_levels - 1}")
    if min(size) < 0 or size[0] * size[1] > _MAX_REGION_PX:
        raise SlideError(f"{uri}: no region of {size[0]} × {size[1]} px; ask for up to {_MAX_REGION_PX:,} px at once")


def checked_tile_box(
    mpp: float,
    level_downsamples: tuple[float, ...],
    x: int,
    y: int,
    wanted_mpp: float,
    size: int,
    tolerance: float,
) -> LevelBox:
    """`tile_box` of what may be no tile.

    Raises:
        SlideError: what is asked is no tile.
    """
    if size < 1 or not wanted_mpp > 0:
        raise SlideError(f"no tile of {size} px at {wanted_mpp} µm/px; both must be above 0")
    box = tile_box(tile_source(mpp, level_downsamples, wanted_mpp, tolerance), x, y, size)
    if box.width * box.height > _MAX_REGION_PX:
        raise SlideError(
            f"a tile of {size} px at {wanted_mpp} µm/px is {box.width:,} px wide; take a coarser slide level"
        )
    return box
