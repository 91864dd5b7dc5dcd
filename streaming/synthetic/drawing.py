"""Synthetic H&E slides with known tissue classes: pure functions of (slide, coordinates).

Smooth fields (outline, regions, thickness) are evaluated on a coarse lattice and interpolated; fibres, cytoplasm and
fat come from a periodic texture per patient, bent by a smooth shift so that the period does not show; nuclei are
stamped one by one from a jittered hash grid. Densities of haematoxylin and eosin become RGB by Beer-Lambert.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from math import log2, prod
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

cv: Any = cv2  # its stubs know neither dtypes nor optional maps

Pixels = NDArray[np.uint8]
Field = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

CHUNK = 256  # rendered whole, on the grid of level 0: so a pixel does not depend on the region asked for
STEP = 32  # spacing of the lattice of smooth fields, level-0 px
MARGIN = 96  # by which the lattice reaches beyond a region; the radius of a nucleus is at most half of it
PERIOD = 1024  # of the textures, px; a multiple of CHUNK
OD_UNIT = 96.0  # a uint8 density of 96 is optical density 1 of one stain
GLASS = (243, 244, 242)
GLASS_BELOW = 72  # lattice depth from which on not even a fraying fibre shows


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
    quality: int = 80
    """JPEG quality, 1 to 100."""
    subsampling: tuple[int, int] = (2, 2)
    """JPEG chroma subsampling (horizontal, vertical)."""
    downsamples: tuple[int, ...] = (1, 4, 16)
    """Level-0 px per px of each level."""
    write_mpp: bool = True
    """Whether the file tells its mpp."""

    def __post_init__(self) -> None:
        if self.downsamples[:1] != (1,) or any(b <= a or b % a for a, b in pairwise(self.downsamples)):
            raise ValueError(f"downsamples {self.downsamples}: must start at 1, each a multiple of the one before")
        if min(self.width, self.height) < self.downsamples[-1]:
            raise ValueError(f"{self.width} × {self.height} px: too small for downsample {self.downsamples[-1]}")
        if self.block_px < 16 or self.block_px % 16:
            raise ValueError(f"block_px {self.block_px}: TIFF wants a multiple of 16")
        if not 0.2 <= self.mpp <= 2:
            raise ValueError(f"mpp {self.mpp}: nuclei can be drawn at 0.2 to 2 µm per px")


def _key(*parts: object) -> np.uint64:
    """Names a source of noise by 64 bits."""
    return np.uint64(int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()))


def _hash(key: np.uint64, x: Ints, y: Ints) -> Hashes:
    """Splitmix64 of the coordinates, broadcast; they must be arrays, numpy warns of overflow in scalars."""
    z = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    for addend in (np.zeros(1, np.uint64), y.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)):
        z = z + addend
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z


def _span(first: int, last: int) -> Ints:
    """The whole numbers from first to last, both included."""
    return np.arange(first, last + 1, dtype=np.int64)


def _unit(hashes: Hashes, draw: int) -> Field:
    """Draw 0, 1, 2 or 3 of each hash, in [0, 1)."""
    return (hashes >> np.uint64(16 * draw) & np.uint64(0xFFFF)) / 65536.0


def _uniform(key: np.uint64, *shape: int) -> Field:
    """Draws in [0, 1)."""
    return _unit(_hash(key, _span(0, prod(shape) - 1), _span(0, 0)), 0).reshape(shape)


def _noise(key: np.uint64, xs: Field, ys: Field, cell: float) -> Field:
    """Value noise in [-1, 1] with grains of `cell` on the grid xs × ys; (len(ys), len(xs))."""
    x, y = xs / cell, ys / cell
    ix, iy = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = x - ix, (y - iy)[:, None]
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    columns, rows = (_span(int(i.min()), int(i.max()) + 1) for i in (ix, iy))
    corners = _unit(_hash(key, columns[None], rows[:, None]), 0) * 2 - 1
    jx, jy = ix - ix.min(), iy - iy.min()
    lines = corners[:, jx] * (1 - fx) + corners[:, jx + 1] * fx
    return lines[jy] * (1 - fy) + lines[jy + 1] * fy


def _nearest_seed(key: np.uint64, x: Field, y: Field, cell: float) -> tuple[Field, Hashes]:
    """Distance to the nearest point of a jittered grid of spacing `cell`, and the hash of that point."""
    ix, iy = np.floor(x / cell).astype(np.int64), np.floor(y / cell).astype(np.int64)
    best, nearest = np.full(x.shape, np.inf), np.zeros(x.shape, np.uint64)
    for dy, dx in np.ndindex(3, 3):
        jx, jy = ix + (dx - 1), iy + (dy - 1)
        seed = _hash(key, jx, jy)
        to_x, to_y = (jx + _unit(seed, 0)) * cell - x, (jy + _unit(seed, 1)) * cell - y
        squared = to_x * to_x + to_y * to_y
        nearest = np.where(squared < best, seed, nearest)
        best = np.minimum(best, squared)
    return np.sqrt(best), nearest


def _outline(slide: SyntheticSlide, xs: Field, ys: Field) -> Field:
    """Depth in tissue, up to a constant: some ellipses side by side, roughened; (len(ys), len(xs))."""
    draws = _uniform(_key(slide.patient, "pieces"), 4, 4)
    u, v, side = xs / slide.width, (ys / slide.height)[:, None], min(slide.width, slide.height)
    num, wide, depth = 1 + int(draws[3, 0] * 2.4), slide.width >= slide.height, np.full((len(ys), len(xs)), -9.0)
    for k, (a, b, c, d) in enumerate(draws[:num]):
        along, across = (u, v) if wide else (v, u)
        along = (along * num - k - 0.5 - 0.16 * (a - 0.5)) / (0.40 + 0.1 * b)
        across = (across - 0.5 - 0.12 * (c - 0.5)) / (0.34 + 0.12 * d)
        depth = np.maximum(depth, 1 - np.sqrt(along * along + across * across))
    for grain, weight in ((0.34, 0.5), (0.15, 0.3), (0.06, 0.12), (0.02, 0.05), (0.007, 0.02)):
        depth += weight * _noise(_key(slide.patient, "outline", grain), xs, ys, grain * side)
    edge = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
    return depth - (np.maximum(0.12 - edge, 0) * 12) ** 2  # the section ends before the scanned rectangle does


@lru_cache(maxsize=64)
def _threshold(slide: SyntheticSlide) -> float:
    """The depth at which tissue begins, for it to cover 42 to 58 % of the slide."""
    points = (np.arange(128) + 0.5) / 128
    depths = np.sort(_outline(slide, points * slide.width, points * slide.height), axis=None)
    share = 0.42 + 0.16 * _uniform(_key(slide.patient, "share"), 1)[0]
    return float(depths[int((1 - share) * depths.size)])


def _bent(slide: SyntheticSlide, xs: Field, ys: Field, cell: float) -> Iterator[tuple[Field, Field]]:
    """Coordinates of the grid xs × ys, displaced by ever finer noise."""
    x, y = np.broadcast_arrays(xs[None], ys[:, None])
    for grain, bend in ((0.6, 0.3), (0.15, 0.08), (0.04, 0.02)):
        x = x + cell * bend * _noise(_key(slide.patient, "x", grain), xs, ys, grain * cell)
        y = y + cell * bend * _noise(_key(slide.patient, "y", grain), xs, ys, grain * cell)
        yield x, y


def _regions(slide: SyntheticSlide, xs: Field, ys: Field) -> tuple[Pixels, Pixels]:
    """Class and material on the grid xs × ys, as if all were tissue.

    They differ in glands: of material GLAND is their epithelium, BACKGROUND the lumen, STROMA what lies between.
    """
    cell = min(450 / slide.mpp, slide.width / 4, slide.height / 4)
    (gland_x, gland_y), *_, (x, y) = _bent(slide, xs, ys, cell)
    _, seeds = _nearest_seed(_key(slide.patient, "regions"), x, y, cell)
    shares = np.array((0.30, 0.29, 0.13, 0.12, 0.16)) * (0.7 + 0.6 * _uniform(_key(slide.patient, "shares"), 5))
    edges = np.cumsum(shares / shares.sum())[:-1]
    classes = (1 + np.searchsorted(edges, _unit(seeds, 2), side="right")).astype(np.uint8)
    materials, glands = classes.copy(), np.nonzero(classes == TissueClass.GLAND)
    distance, gland = _nearest_seed(_key(slide.patient, "glands"), gland_x[glands], gland_y[glands], 110 / slide.mpp)
    outward = distance * slide.mpp - (10 + 24 * _unit(gland, 3))  # µm from the lumen
    of_gland = (TissueClass.BACKGROUND, TissueClass.GLAND)
    materials[glands] = np.select((outward < 0, outward < 20), of_gland, TissueClass.STROMA)
    return classes, materials


def tissue_classes(slide: SyntheticSlide, x: int, y: int, width: int, height: int, step: int) -> Pixels:
    """`TissueClass` at the centre of each step × step square of a region, all in level-0 px.

    Returns uint8 (ceil(height / step), ceil(width / step)).
    """
    xs, ys = np.arange(x, x + width, step) + step / 2, np.arange(y, y + height, step) + step / 2
    classes, _ = _regions(slide, xs, ys)
    return np.where(_outline(slide, xs, ys) > _threshold(slide), classes, np.uint8(TissueClass.BACKGROUND))


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
    lattice = np.pad((_uniform(key, rows, columns) * 2 - 1).astype(np.float32), 2, mode="wrap")
    x_px, y_px = PERIOD // columns, PERIOD // rows
    smooth = cv.resize(lattice, None, fx=x_px, fy=y_px, interpolation=cv.INTER_CUBIC)
    return smooth[2 * y_px : -2 * y_px, 2 * x_px : -2 * x_px]


def _fat_walls(key: np.uint64, mpp: float) -> Field:
    """Thin walls between periodic round cells of some 55 µm, 0 to 1; (PERIOD, PERIOD)."""
    num, size = max(2, round(PERIOD * mpp / 55)), PERIOD // 2
    centres = (_uniform(key, num, num, 2) * 0.7 + 0.15 + np.indices((num, num)).transpose(1, 2, 0)) / num
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
    return int(_uniform(_key(patient, "slope"), 1)[0] * 3) - 1


def _textures(patient: int, mpp: float) -> dict[TissueClass, Pixels]:
    """Each material without its nuclei."""

    def noise(name: str, x_um: float, y_um: float) -> Field:
        return _periodic(_key(patient, name), mpp, x_um, y_um)

    def stain(haematoxylin: Field, eosin: Field) -> Pixels:
        return np.clip(np.dstack((haematoxylin, eosin, 0 * eosin)), 0, 255).astype(np.uint8)

    wave = (14 + 16 * _uniform(_key(patient, "wave"), 2)) / mpp
    rows, columns = np.indices((PERIOD, PERIOD))
    x_map = columns + wave[0] * noise("wave x", 64, 64)
    y_map = rows + wave[1] * noise("wave y", 64, 64) + _slope(patient) * columns
    at = np.dstack((x_map, y_map)).astype(np.float32)
    straight = 0.55 * noise("fibre", 32, 4) + 0.45 * noise("fibril", 16, 1.5)
    fibre = cv.remap(straight, at, None, cv.INTER_LINEAR, borderMode=cv.BORDER_WRAP)
    cloud, granule, fine = noise("cloud", 12, 12), noise("granule", 3, 3), noise("fine", 0.8, 0.8)
    cleft = np.clip((fibre + 0.3 * cloud + 0.62) * 4, 0.12, 1)
    walls = _fat_walls(_key(patient, "fat"), mpp)
    return {
        TissueClass.STROMA: stain(7 + 4 * fibre + 2 * fine, cleft * (42 + 18 * fibre + 7 * cloud + 4 * fine)),
        TissueClass.TUMOUR: stain(23 + 6 * cloud + 5 * granule + 3 * fine, 34 + 9 * cloud + 6 * granule + 4 * fine),
        TissueClass.LYMPHOCYTES: stain(16 + 5 * granule + 3 * fine, 22 + 7 * cloud + 6 * granule),
        TissueClass.FAT: stain(26 * walls * np.clip(cloud * 2 - 0.4, 0, 1), 62 * walls * (1 + 0.3 * granule) + 1.5),
        TissueClass.GLAND: stain(15 + 4 * granule + 3 * fine, 36 + 9 * cloud + 6 * granule + 4 * fine),
    }


def _nuclei(patient: int, mpp: float, kind: _NucleusKind) -> _Nuclei:
    """48 wobbly ellipses with soft edges, a darker rim and clumped chromatin, in the patient's size and density."""
    num, key = 48, _key(patient, kind)
    size, crowd = _uniform(_key(patient, "nuclei"), 2)
    radius_px = kind.radius * (0.86 + 0.3 * size) / mpp
    half = min(MARGIN // 2, int(radius_px * 1.35 * np.sqrt(kind.elongation)) + 2)
    draws = _uniform(key, 6, num, 1, 1)
    rows, columns = np.indices((2 * half + 1, 2 * half + 1)) - half
    angle = (draws[0] - 0.5) * kind.turn - np.arctan(_slope(patient))
    stretch, radius_px = np.sqrt(kind.elongation * (0.8 + 0.4 * draws[1])), radius_px * (0.78 + 0.44 * draws[2])
    x = (columns * np.cos(angle) + rows * np.sin(angle)) / stretch
    y = (rows * np.cos(angle) - columns * np.sin(angle)) * stretch
    theta = np.arctan2(y, x)
    wobble = 1 + kind.wobble * (np.cos(2 * theta + 7 * draws[3]) + np.cos(3 * theta + 7 * draws[4]))
    radius = np.hypot(x, y) / (radius_px * wobble)
    clumps = _uniform(_key(key, "chromatin"), num, 2 * half + 1, 2 * half + 1) - 0.5
    clumps = np.stack([cv.GaussianBlur(clump, (0, 0), max(0.6, 0.5 / mpp)) for clump in clumps])
    inner = 0.82 + 0.22 * np.clip(radius, 0, 1) ** 4 + 0.16 * clumps / clumps.std()
    soft = np.clip((1 - radius) * radius_px / max(1, 0.6 / mpp) + 0.5, 0, 1)
    sprites = np.clip(kind.density * (0.8 + 0.4 * draws[5]) * inner * soft, 0, 255).astype(np.uint8)
    return _Nuclei(key, max(3, round(kind.spacing * (0.92 + 0.2 * crowd) / mpp)), np.array(kind.keep), sprites)


def _rgb_table(patient: int) -> NDArray[np.uint32]:
    """Beer-Lambert of all pairs of densities with the patient's stain vectors; packed RGBx at 256 * h + e."""
    draws = _uniform(_key(patient, "stain"), 2, 4) * 2 - 1
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
    grain = (_uniform(_key(patient, "grain"), PERIOD, PERIOD, 1) * 4).astype(np.uint8).repeat(3, 2)
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
        return _noise(_key(slide.patient, name), xs, ys, cell)

    depth_px = (_outline(slide, xs, ys) - _threshold(slide)) * 0.3 * min(slide.width, slide.height)
    thickness = 128 + 20 * noise("thick", 400 / slide.mpp) + 12 * noise("thin", 70 / slide.mpp)
    shift = [600 * noise("far" + axis, 4096) + 110 * noise("near" + axis, 1024) for axis in "xy"]
    return _Lattice(
        depth=np.clip(128 + 2 * depth_px, 0, 255).astype(np.uint8),
        materials=_regions(slide, xs, ys)[1],
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
        columns, rows = (_span((at - half) // cell, (at + CHUNK + half) // cell) for at in (x, y))
        seeds = _hash(kind.key, columns, rows[:, None])
        left, top = (
            np.floor((cells + _unit(seeds, draw)) * cell).astype(np.int64) - at + MARGIN - half
            for draw, (cells, at) in enumerate(((columns, x), (rows[:, None], y)))
        )
        first, last = MARGIN - 2 * half, MARGIN + CHUNK
        near = (np.minimum(left, top) >= first) & (np.maximum(left, top) < last)
        left, top, seeds = left[near], top[near], seeds[near]
        keep = _unit(seeds, 2) < kind.keep[materials[(top + half) // STEP, (left + half) // STEP]]
        which, size = (_unit(seeds, 3)[keep] * len(kind.sprites)).astype(np.int64), 2 * half + 1
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
    left, top = x // CHUNK * CHUNK, y // CHUNK * CHUNK
    right, bottom = -(-(x + width) // CHUNK) * CHUNK, -(-(y + height) // CHUNK) * CHUNK
    look, lattice = _look(slide.patient, slide.mpp), _lattice(slide, left, top, right - left, bottom - top)
    out = np.empty((bottom - top, right - left, 3), np.uint8)
    for i, j in np.ndindex(out.shape[0] // CHUNK, out.shape[1] // CHUNK):
        dx, dy = j * CHUNK, i * CHUNK
        out[dy : dy + CHUNK, dx : dx + CHUNK] = _chunk(look, lattice.around(dx, dy), left + dx, top + dy)
    return out[y - top : y - top + height, x - left : x - left + width]
