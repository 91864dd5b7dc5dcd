"""Which level serves a wanted resolution, and how its pixels become a tile.

Level-0 pixels are `x, y`; pixels of another level say so. mpp is µm per pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from streaming.errors import SlideError

# Downsamples are ratios of rounded dimensions (4443/2221 = 2.0005) and scanners' mpp vary in the third digit: a level
# this little coarser than asked still counts as fine enough.
LEVEL_TOLERANCE = 0.01

# µm/px outside this is a default or a unit mix-up in the metadata (72 dpi reads as 352 µm/px), not a microscope.
_PLAUSIBLE_MPP = (0.02, 20.0)
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


@lru_cache(maxsize=4096)
def level_for_mpp(mpp: float, level_downsamples: tuple[float, ...], wanted_mpp: float) -> int:
    """The level whose mpp is the nearest not above the wanted one; level 0 where all are coarser."""
    fine_enough = [
        level
        for level, downsample in enumerate(level_downsamples)
        if mpp * downsample <= wanted_mpp * (1 + LEVEL_TOLERANCE)
    ]
    return max(fine_enough, key=lambda level: level_downsamples[level], default=0)


def tile_box(
    mpp: float, level_downsamples: tuple[float, ...], x: int, y: int, wanted_mpp: float, size: int
) -> LevelBox:
    """The part of a level that a tile shows; x, y are the level-0 pixel of its top-left corner.

    Corner and extent are rounded to whole pixels of the level: at most half a pixel of what is read.
    """
    level = level_for_mpp(mpp, level_downsamples, wanted_mpp)
    downsample = level_downsamples[level]
    extent = max(1, round(size * wanted_mpp / (mpp * downsample)))
    return LevelBox(level, round(x / downsample), round(y / downsample), extent, extent)


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
    mpp: float | None, level_downsamples: tuple[float, ...], x: int, y: int, wanted_mpp: float, size: int
) -> LevelBox:
    """`tile_box` of a slide whose mpp may not be known.

    Raises:
        SlideError: the slide has no mpp, or what is asked is no tile.
    """
    if mpp is None:
        raise SlideError("the slide has no mpp in its metadata; pass it: open_slide(uri, mpp=...)")
    if size < 1 or not wanted_mpp > 0:
        raise SlideError(f"no tile of {size} px at {wanted_mpp} µm/px; both must be above 0")
    box = tile_box(mpp, level_downsamples, x, y, wanted_mpp, size)
    if box.width * box.height > _MAX_REGION_PX:
        raise SlideError(
            f"a tile of {size} px at {wanted_mpp} µm/px is {box.width:,} px wide; take a coarser slide level"
        )
    return box


def plausible_mpp(uri: str, values: Sequence[float]) -> float | None:
    """The µm/px that metadata give for the axes, as one number; None where they can't be a microscope's.

    Raises:
        SlideError: the pixels are not square.
    """
    if not values or not all(_PLAUSIBLE_MPP[0] <= value <= _PLAUSIBLE_MPP[1] for value in values):
        return None
    if max(values) > 1.05 * min(values):
        raise SlideError(f"{uri}: pixels of {values[0]} × {values[1]} µm are not square; resample the slide")
    return sum(values) / len(values)
