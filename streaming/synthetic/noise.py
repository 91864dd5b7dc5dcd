"""Noise as a pure function of coordinates: hashes, draws from them, and smooth fields of either."""

from hashlib import blake2b
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def source_key(*parts: object) -> np.uint64:
    """Names a source of noise by 64 bits."""
    return np.uint64(int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()))


def hashes_at(key: np.uint64, x: Ints, y: Ints) -> Hashes:
    """Splitmix64 of the coordinates, broadcast; they must be arrays, numpy warns of overflow in scalars."""
    z = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    for addend in (np.zeros(1, np.uint64), y.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)):
        z = z + addend
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z


def whole_numbers(first: int, last: int) -> Ints:
    """The whole numbers from first to last, both included."""
    return np.arange(first, last + 1, dtype=np.int64)


def unit_draw(hashes: Hashes, number: int) -> Field:
    """The draw of that number, 0 to 3, from each hash, in [0, 1)."""
    return (hashes >> np.uint64(16 * number) & np.uint64(0xFFFF)) / 65536.0


def uniform(key: np.uint64, *shape: int) -> Field:
    """Draws in [0, 1)."""
    return unit_draw(hashes_at(key, whole_numbers(0, prod(shape) - 1), whole_numbers(0, 0)), 0).reshape(shape)


def value_noise(key: np.uint64, xs: Field, ys: Field, cell: float) -> Field:
    """Value noise in [-1, 1] with grains of `cell` on the grid xs × ys; (len(ys), len(xs))."""
    x, y = xs / cell, ys / cell
    ix, iy = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = x - ix, (y - iy)[:, None]
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    columns, rows = (whole_numbers(int(i.min()), int(i.max()) + 1) for i in (ix, iy))
    corners = unit_draw(hashes_at(key, columns[None], rows[:, None]), 0) * 2 - 1
    jx, jy = ix - ix.min(), iy - iy.min()
    lines = corners[:, jx] * (1 - fx) + corners[:, jx + 1] * fx
    return lines[jy] * (1 - fy) + lines[jy + 1] * fy


def nearest_seed(key: np.uint64, x: Field, y: Field, cell: float) -> tuple[Field, Hashes]:
    """Distance to the nearest point of a jittered grid of spacing `cell`, and the hash of that point."""
    ix, iy = np.floor(x / cell).astype(np.int64), np.floor(y / cell).astype(np.int64)
    best, nearest = np.full(x.shape, np.inf), np.zeros(x.shape, np.uint64)
    for dy, dx in np.ndindex(3, 3):
        jx, jy = ix + (dx - 1), iy + (dy - 1)
        seed = hashes_at(key, jx, jy)
        to_x, to_y = (jx + unit_draw(seed, 0)) * cell - x, (jy + unit_draw(seed, 1)) * cell - y
        squared = to_x * to_x + to_y * to_y
        nearest = np.where(squared < best, seed, nearest)
        best = np.minimum(best, squared)
    return np.sqrt(best), nearest
