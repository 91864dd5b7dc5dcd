"""Pixels of synthetic H&E slides: pure functions of (slide, coordinates).

Smooth fields (outline, regions, thickness) are evaluated on a coarse lattice and interpolated; fibres, cytoplasm and
fat come from a periodic texture per patient, bent by a smooth shift so that the period does not show; nuclei are
stamped one by one from a jittered hash grid. Densities of haematoxylin and eosin become RGB by Beer-Lambert.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming.synthetic.artefacts import blur_margin, blurred, spoil
from streaming.synthetic.layout import Pixels, SyntheticSlide, TissueClass, outline, regions, tissue_depth
from streaming.synthetic.noise import Field, hashes_at, source_key, uniform, unit_draw, value_noise, whole_numbers
from streaming.vision import cv2

cv: Any = cv2  # its stubs know neither dtypes nor optional maps

CHUNK = 256  # rendered whole, on the grid of level 0: so a pixel does not depend on the region asked for
STEP = 32  # spacing of the lattice of smooth fields, level-0 px
MARGIN = 96  # by which the lattice reaches beyond a region; the radius of a nucleus is at most half of it
PERIOD = 1024  # of the textures, px; a multiple of CHUNK
OD_UNIT = 96.0  # a uint8 density of 96 is optical density 1 of one stain
GLASS = (243, 244, 242)
GLASS_BELOW = 72  # lattice depth from which on not even a fraying fibre shows


@dataclass(frozen=True)
class _NucleusKind:
    """One type of nucleus before the patient's variation."""

    spacing: float  # µm
    radius: float  # µm, mean
    elongation: float  # long over short axis
    turn: float  # spread of the direction around the fibres', radians
    density: float
    wobble: float
    keep: tuple[float, ...]  # share of grid points that carry one, by material


_SPINDLE = _NucleusKind(14, 3.4, 3.0, 0.5, 125, 0.05, (0, 0.42, 0.04, 0.02, 0, 0))
_TUMOUR = _NucleusKind(11, 4.9, 1.35, 3.2, 122, 0.08, (0, 0, 0.95, 0, 0, 0))
_LYMPHOCYTE = _NucleusKind(6.6, 3.0, 1.12, 3.2, 165, 0.03, (0, 0.015, 0.02, 0.95, 0, 0.01))
_EPITHELIAL = _NucleusKind(7.6, 3.7, 1.5, 3.2, 128, 0.05, (0, 0, 0, 0, 0, 0.95))
_DUST = _NucleusKind(230, 3, 1.6, 3.2, 60, 0.2, (0.25,) * 6)


@dataclass(frozen=True)
class _Nuclei:
    """A kind as drawn: a jittered grid and a bank of sprites, uint8 (n, 2r + 1, 2r + 1)."""

    key: np.uint64
    cell_px: int
    keep: Field
    sprites: Pixels


@dataclass(frozen=True)
class _Look:
    """What all chunks of a patient share.

    textures: haematoxylin, eosin and nothing (cv2.remap is slow for two channels) of each material, periodic;
    rgb: packed RGBx at 256 * haematoxylin + eosin; grain: sensor noise to subtract, periodic.
    """

    textures: dict[TissueClass, Pixels]
    nuclei: tuple[_Nuclei, ...]
    dust: _Nuclei
    rgb: NDArray[np.uint32]
    grain: Pixels


def _periodic(key: np.uint64, mpp: float, x_um: float, y_um: float) -> Field:
    """Periodic noise in about [-1, 1] with grains of x_um × y_um; (PERIOD, PERIOD)."""
    columns, rows = (2 ** min(10, max(1, round(log2(PERIOD * mpp / um)))) for um in (x_um, y_um))
    lattice = np.pad((uniform(key, rows, columns) * 2 - 1).astype(np.float32), 2, mode="wrap")
    x_px, y_px = PERIOD // columns, PERIOD // rows
    smooth = cv.resize(lattice, None, fx=x_px, fy=y_px, interpolation=cv.INTER_CUBIC)
    return smooth[2 * y_px : -2 * y_px, 2 * x_px : -2 * x_px]


def _fat_walls(key: np.uint64, mpp: float) -> Field:
    """Thin walls between periodic round cells of some 55 µm, 0 to 1; (PERIOD, PERIOD)."""
    num, size = max(2, round(PERIOD * mpp / 55)), PERIOD // 2
    centres = (uniform(key, num, num, 2) * 0.7 + 0.15 + np.indices((num, num)).transpose(1, 2, 0)) / num
    nearest, soft = np.full((size, size), np.inf, np.float32), np.zeros((size, size), np.float32)
    for centre in centres.reshape(-1, 2).astype(np.float32):
        apart = np.abs((np.arange(size, dtype=np.float32) + 0.5) / size - centre[:, None])
        dy, dx = np.minimum(apart, 1 - apart)
        distance_um = np.sqrt(dx * dx + (dy * dy)[:, None]) * np.float32(PERIOD * mpp)
        nearest, soft = np.minimum(nearest, distance_um), soft + np.exp(-distance_um / 5)
    others = soft * np.exp(nearest / 5) - 1  # 1 where two cells meet, 2 where three do: round corners
    return cv.resize(np.clip((others - 0.55) * 2.5, 0, 1), (PERIOD, PERIOD))


def _slope(patient: int) -> int:
    """Of the fibres; an integer keeps a sheared texture periodic."""
    return int(uniform(source_key(patient, "slope"), 1)[0] * 3) - 1


def _textures(patient: int, mpp: float) -> dict[TissueClass, Pixels]:
    """Each material without its nuclei."""

    def noise(name: str, x_um: float, y_um: float) -> Field:
        return _periodic(source_key(patient, name), mpp, x_um, y_um)

    def stain(haematoxylin: Field, eosin: Field) -> Pixels:
        return np.clip(np.dstack((haematoxylin, eosin, 0 * eosin)), 0, 255).astype(np.uint8)

    wave = (14 + 16 * uniform(source_key(patient, "wave"), 2)) / mpp
    rows, columns = np.indices((PERIOD, PERIOD))
    x_map = columns + wave[0] * noise("wave x", 64, 64)
    y_map = rows + wave[1] * noise("wave y", 64, 64) + _slope(patient) * columns
    at = np.dstack((x_map, y_map)).astype(np.float32)
    straight = 0.55 * noise("fibre", 32, 4) + 0.45 * noise("fibril", 16, 1.5)
    fibre = cv.remap(straight, at, None, cv.INTER_LINEAR, borderMode=cv.BORDER_WRAP)
    cloud, granule, fine = noise("cloud", 12, 12), noise("granule", 3, 3), noise("fine", 0.8, 0.8)
    cleft = np.clip((fibre + 0.3 * cloud + 0.62) * 4, 0.12, 1)
    walls = _fat_walls(source_key(patient, "fat"), mpp)
    return {
        TissueClass.STROMA: stain(7 + 4 * fibre + 2 * fine, cleft * (42 + 18 * fibre + 7 * cloud + 4 * fine)),
        TissueClass.TUMOUR: stain(23 + 6 * cloud + 5 * granule + 3 * fine, 34 + 9 * cloud + 6 * granule + 4 * fine),
        TissueClass.LYMPHOCYTES: stain(16 + 5 * granule + 3 * fine, 22 + 7 * cloud + 6 * granule),
        TissueClass.FAT: stain(26 * walls * np.clip(cloud * 2 - 0.4, 0, 1), 62 * walls * (1 + 0.3 * granule) + 1.5),
        TissueClass.GLAND: stain(15 + 4 * granule + 3 * fine, 36 + 9 * cloud + 6 * granule + 4 * fine),
    }


def _nuclei(patient: int, mpp: float, kind: _NucleusKind) -> _Nuclei:
    """48 wobbly ellipses with soft edges, a darker rim and clumped chromatin, in the patient's size and density."""
    num, key = 48, source_key(patient, kind)
    size, crowd = uniform(source_key(patient, "nuclei"), 2)
    radius_px = kind.radius * (0.86 + 0.3 * size) / mpp
    half = min(MARGIN // 2, int(radius_px * 1.35 * np.sqrt(kind.elongation)) + 2)
    draws = uniform(key, 6, num, 1, 1)
    rows, columns = np.indices((2 * half + 1, 2 * half + 1)) - half
    angle = (draws[0] - 0.5) * kind.turn - np.arctan(_slope(patient))
    stretch, radius_px = np.sqrt(kind.elongation * (0.8 + 0.4 * draws[1])), radius_px * (0.78 + 0.44 * draws[2])
    x = (columns * np.cos(angle) + rows * np.sin(angle)) / stretch
    y = (rows * np.cos(angle) - columns * np.sin(angle)) * stretch
    theta = np.arctan2(y, x)
    wobble = 1 + kind.wobble * (np.cos(2 * theta + 7 * draws[3]) + np.cos(3 * theta + 7 * draws[4]))
    radius = np.hypot(x, y) / (radius_px * wobble)
    clumps = uniform(source_key(key, "chromatin"), num, 2 * half + 1, 2 * half + 1) - 0.5
    clumps = np.stack([cv.GaussianBlur(clump, (0, 0), max(0.6, 0.5 / mpp)) for clump in clumps])
    inner = 0.82 + 0.22 * np.clip(radius, 0, 1) ** 4 + 0.16 * clumps / clumps.std()
    soft = np.clip((1 - radius) * radius_px / max(1, 0.6 / mpp) + 0.5, 0, 1)
    sprites = np.clip(kind.density * (0.8 + 0.4 * draws[5]) * inner * soft, 0, 255).astype(np.uint8)
    return _Nuclei(key, max(3, round(kind.spacing * (0.92 + 0.2 * crowd) / mpp)), np.array(kind.keep), sprites)


def _rgb_table(patient: int) -> NDArray[np.uint32]:
    """Beer-Lambert of all pairs of densities with the patient's stain vectors; packed RGBx at 256 * h + e."""
    draws = uniform(source_key(patient, "stain"), 2, 4) * 2 - 1
    vectors = np.array(((0.60, 0.74, 0.30), (0.17, 0.87, 0.47)))
    vectors += draws[:, :3] * ((0.08, 0.03, 0.07), (0.07, 0.04, 0.09))
    vectors *= 1 + draws[:, 3:] * ((0.2,), (0.28,))
    density = np.stack(np.divmod(np.arange(65536), 256), 1) @ vectors / OD_UNIT
    packed = np.zeros((65536, 4), np.uint8)
    packed[:, :3] = np.round(np.array(GLASS) * np.exp(-density))
    return packed.view(np.uint32)[:, 0]


@lru_cache(maxsize=4)
def _look(patient: int, mpp: float) -> _Look:
    """What all chunks of a patient share, some 20 MB."""
    nuclei = tuple(_nuclei(patient, mpp, kind) for kind in (_SPINDLE, _TUMOUR, _LYMPHOCYTE, _EPITHELIAL))
    grain = (uniform(source_key(patient, "grain"), PERIOD, PERIOD, 1) * 4).astype(np.uint8).repeat(3, 2)
    return _Look(_textures(patient, mpp), nuclei, _nuclei(patient, mpp, _DUST), _rgb_table(patient), grain)


@dataclass(frozen=True)
class _Lattice:
    """Smooth fields around a region, every STEP px from MARGIN before its corner to MARGIN after its end."""

    depth: Pixels  # 128 at the tissue's edge, about two a px
    materials: Pixels
    thickness: Pixels  # 128 is mean
    shift: NDArray[np.float32]  # of the texture, px, (…, 2)

    def around(self, x: int, y: int) -> "_Lattice":
        """The part around the chunk that lies x, y px into the region."""
        rows, columns = (slice(at // STEP, (at + CHUNK + 2 * MARGIN) // STEP) for at in (y, x))
        window = rows, columns
        return _Lattice(self.depth[window], self.materials[window], self.thickness[window], self.shift[window])


def _lattice(slide: SyntheticSlide, x: int, y: int, width: int, height: int) -> _Lattice:
    """The fields around a region of whole chunks."""
    xs, ys = (np.arange(a - MARGIN, a + n + MARGIN, STEP) + STEP / 2 for a, n in ((x, width), (y, height)))

    def noise(name: str, cell: float) -> Field:
        return value_noise(source_key(slide.patient, name), xs, ys, cell)

    depth_px = (outline(slide, xs, ys) - tissue_depth(slide)) * 0.3 * min(slide.width, slide.height)
    thickness = 128 + 20 * noise("thick", 400 / slide.mpp) + 12 * noise("thin", 70 / slide.mpp)
    shift = [600 * noise("far" + axis, 4096) + 110 * noise("near" + axis, 1024) for axis in "xy"]
    return _Lattice(
        depth=np.clip(128 + 2 * depth_px, 0, 255).astype(np.uint8),
        materials=regions(slide, xs, ys)[1],
        thickness=thickness.astype(np.uint8),
        shift=np.dstack(shift).astype(np.float32),
    )


def _smooth(field: NDArray[Any]) -> NDArray[Any]:
    """The pixels of a chunk, interpolated from the lattice around it."""
    pad = MARGIN // STEP - 1  # one point beyond each side will do
    near = cv.resize(field[pad:-pad, pad:-pad], None, fx=STEP, fy=STEP, interpolation=cv.INTER_LINEAR)
    return near[STEP:-STEP, STEP:-STEP]


def _stamped(kinds: Iterable[_Nuclei], materials: Pixels, x: int, y: int) -> Pixels:
    """Density of all nuclei that touch the chunk at (x, y)."""
    canvas = np.zeros((CHUNK + 2 * MARGIN, CHUNK + 2 * MARGIN), np.uint8)
    for kind in kinds:
        half, cell = kind.sprites.shape[1] // 2, kind.cell_px
        columns, rows = (whole_numbers((at - half) // cell, (at + CHUNK + half) // cell) for at in (x, y))
        seeds = hashes_at(kind.key, columns, rows[:, None])
        left, top = (
            np.floor((cells + unit_draw(seeds, number)) * cell).astype(np.int64) - at + MARGIN - half
            for number, (cells, at) in enumerate(((columns, x), (rows[:, None], y)))
        )
        first, last = MARGIN - 2 * half, MARGIN + CHUNK
        near = (np.minimum(left, top) >= first) & (np.maximum(left, top) < last)
        left, top, seeds = left[near], top[near], seeds[near]
        keep = unit_draw(seeds, 2) < kind.keep[materials[(top + half) // STEP, (left + half) // STEP]]
        which, size = (unit_draw(seeds, 3)[keep] * len(kind.sprites)).astype(np.int64), 2 * half + 1
        for i, j, sprite in zip(top[keep].tolist(), left[keep].tolist(), which.tolist(), strict=True):
            window = canvas[i : i + size, j : j + size]
            np.maximum(window, kind.sprites[sprite], out=window)
    return canvas[MARGIN:-MARGIN, MARGIN:-MARGIN]


_RAMP = np.dstack(np.meshgrid(np.arange(CHUNK), np.arange(CHUNK))).astype(np.float32)
_EDGE = np.clip((np.arange(256) - 128) * 8 + 128, 0, 255).astype(np.uint8)  # lattice depth to cover


def _matrix(look: _Look, lattice: _Lattice, x: int, y: int) -> tuple[Pixels, Pixels]:
    """Haematoxylin and eosin of the chunk at (x, y) without nuclei, as if all were tissue."""
    at = cv.add(_smooth(lattice.shift), _RAMP)
    start = at[0, 0] + (x % PERIOD, y % PERIOD)
    at = cv.add(at, (*(start % PERIOD - at[0, 0]), 0, 0))  # cv2.remap is slow where it has to wrap
    total = np.zeros((CHUNK, CHUNK, 3), np.uint8)
    for material, texture in look.textures.items():
        share = np.where(lattice.materials == material, np.uint8(255), np.uint8(0))
        if share.any():
            layer = cv.remap(texture, at, None, cv.INTER_LINEAR, borderMode=cv.BORDER_WRAP)
            if not share.all():
                sharp = cv.LUT(_smooth(cv.GaussianBlur(share, (3, 3), 0)), _EDGE)
                layer = cv.multiply(layer, cv.merge([sharp] * 3), scale=1 / 255)
            total = cv.add(total, layer)
    return total[..., 0].copy(), total[..., 1].copy()


def _stained(look: _Look, lattice: _Lattice, x: int, y: int) -> Pixels:
    """The chunk at (x, y) as tissue on glass, uint8 (CHUNK, CHUNK, 3)."""
    nuclear = _stamped(look.nuclei, lattice.materials, x, y)
    haematoxylin, eosin = _matrix(look, lattice, x, y)
    depth = cv.addWeighted(_smooth(lattice.depth), 1, eosin, 0.7, -30)  # fibres fray the edge
    cover = cv.multiply(cv.LUT(depth, _EDGE), _smooth(lattice.thickness), scale=1 / 255)
    eosin = cv.subtract(eosin, cv.multiply(eosin, nuclear, scale=1 / 220))
    haematoxylin = cv.multiply(cv.max(haematoxylin, nuclear), cover, scale=1 / 128)
    eosin = cv.multiply(eosin, cover, scale=1 / 128)
    packed: NDArray[np.uint32] = look.rgb[haematoxylin.astype(np.uint16) * np.uint16(256) + eosin]
    return cv.cvtColor(packed.view(np.uint8).reshape(CHUNK, CHUNK, 4), cv.COLOR_RGBA2RGB)


def _chunk(look: _Look, lattice: _Lattice, x: int, y: int) -> Pixels:
    """The chunk of level 0 at (x, y), uint8 (CHUNK, CHUNK, 3)."""
    glass = lattice.depth.max() < GLASS_BELOW
    tissue = np.full((CHUNK, CHUNK, 3), GLASS, np.uint8) if glass else _stained(look, lattice, x, y)
    row, column = y % PERIOD, x % PERIOD
    noisy = cv.subtract(tissue, look.grain[row : row + CHUNK, column : column + CHUNK])
    dust = _stamped((look.dust,), lattice.materials, x, y)
    return cv.subtract(noisy, cv.merge([dust] * 3)) if dust.any() else noisy


def pixels(slide: SyntheticSlide, x: int, y: int, width: int, height: int) -> Pixels:
    """A region of level 0 as rendered, before JPEG, in level-0 px; uint8 (height, width, 3)."""
    image = _unspoilt(slide, x, y, width, height)
    for artefact in slide.artefacts:
        soft, margin = image, blur_margin(slide.mpp)
        if artefact == "out of focus":
            around = _unspoilt(slide, x - margin, y - margin, width + 2 * margin, height + 2 * margin)
            soft = blurred(around, slide.mpp)[margin:-margin, margin:-margin]
        spoil(image, soft, artefact, slide.patient, (slide.width, slide.height), (x, y))
    return image


def _unspoilt(slide: SyntheticSlide, x: int, y: int, width: int, height: int) -> Pixels:
    left, top = x // CHUNK * CHUNK, y // CHUNK * CHUNK
    right, bottom = -(-(x + width) // CHUNK) * CHUNK, -(-(y + height) // CHUNK) * CHUNK
    look, lattice = _look(slide.patient, slide.mpp), _lattice(slide, left, top, right - left, bottom - top)
    out = np.empty((bottom - top, right - left, 3), np.uint8)
    for i, j in np.ndindex(out.shape[0] // CHUNK, out.shape[1] // CHUNK):
        dx, dy = j * CHUNK, i * CHUNK
        out[dy : dy + CHUNK, dx : dx + CHUNK] = _chunk(look, lattice.around(dx, dy), left + dx, top + dy)
    return out[y - top : y - top + height, x - left : x - left + width]
