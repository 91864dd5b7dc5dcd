"""What spoils slides: marks of pens, black borders, the edge of a coverslip, bands out of focus.

Pure functions of (slide, coordinates), as tissue is.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from streaming.synthetic.noise import source_key, uniform
from streaming.vision import cv2

Pixels = NDArray[np.uint8]
Artefact = Literal["green pen", "blue pen", "red pen", "black pen", "black border", "coverslip edge", "out of focus"]
ARTEFACTS: tuple[Artefact, ...] = get_args(Artefact)

# What a mark lets through of red, green and blue.
INKS = {
    "green pen": (0.12, 0.55, 0.25),
    "blue pen": (0.12, 0.25, 0.75),
    "red pen": (0.85, 0.08, 0.12),
    "black pen": (0.1, 0.1, 0.12),
}
_PEN_SHARE = 0.07  # of the shorter side: how wide a mark is
_BORDER_SHARE = 0.06
_EDGE_SHARE = 0.004
BLUR_UM = 25.0  # standard deviation, out of focus


def _across(patient: int, artefact: str, width: int, height: int, xs: Any, ys: Any) -> Any:
    """Distance from the middle of a wavy line across the slide, level-0 px, (len(ys), len(xs))."""
    place, wave, phase = uniform(source_key(patient, artefact), 3)
    line = height * (0.3 + 0.4 * place + 0.12 * np.sin(xs / width * (4 + 4 * wave) + 7 * phase))
    return np.abs(ys[:, None] - line)


def covers(artefact: Artefact, patient: int, width: int, height: int, xs: Any, ys: Any) -> NDArray[np.bool_]:
    """Where an artefact lies on a slide of so many level-0 px, bool (len(ys), len(xs)), at level-0 xs and ys."""
    side = min(width, height)
    if artefact == "black border":
        inset = _BORDER_SHARE * side
        rows, columns = (ys < inset) | (ys >= height - inset), (xs < inset) | (xs >= width - inset)
        return rows[:, None] | columns
    if artefact == "out of focus":
        at = 0.25 + 0.35 * uniform(source_key(patient, artefact), 1)[0]
        inside = (xs >= at * width) & (xs < (at + 0.2) * width)
        return np.broadcast_to(inside, (len(ys), len(xs)))
    share = _EDGE_SHARE if artefact == "coverslip edge" else _PEN_SHARE
    return _across(patient, artefact, width, height, xs, ys) < share * side / 2


def spoil(
    image: Pixels, soft: Pixels, artefact: Artefact, patient: int, slide_px: tuple[int, int], corner: tuple[int, int]
) -> None:
    """Draws an artefact into a region of level 0 at a corner, uint8 (h, w, 3); soft is that region out of focus."""
    (width, height), (x, y) = slide_px, corner
    xs, ys = np.arange(x, x + image.shape[1]) + 0.5, np.arange(y, y + image.shape[0]) + 0.5
    where = covers(artefact, patient, width, height, xs, ys)
    if artefact in INKS:
        image[where] = np.rint(image[where] * np.array(INKS[artefact]) + 6).astype(np.uint8)
    elif artefact == "black border":
        # A camera's noise, whose saturation may be anything.
        at = (np.floor(xs) * 73 + np.floor(ys)[:, None] * 151).astype(np.uint32)[..., None] * 3 + np.arange(
            3, dtype=np.uint32
        )
        image[where] = (at.astype(np.uint32) * np.uint32(2654435761) >> np.uint32(28)).astype(np.uint8)[where]
    elif artefact == "coverslip edge":
        image[where] = np.rint(image[where] * np.array((0.55, 0.58, 0.5))).astype(np.uint8)
    else:
        image[where] = soft[where]


def blurred(image: Pixels, mpp: float) -> Pixels:
    """A region as it is out of focus, uint8 (h, w, 3)."""
    return cast(Pixels, cv2.GaussianBlur(image, (0, 0), BLUR_UM / mpp))


def blur_margin(mpp: float) -> int:
    """By how many pixels a region must be larger for its blurred pixels to be right."""
    return int(np.ceil(4 * BLUR_UM / mpp)) + 1
