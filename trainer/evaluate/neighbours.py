"""Nearest neighbours by cosine similarity: products of blocks of vectors, of which only the best so far are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
_CPU = torch.device("cpu")
_BLOCK = 4096  # vectors a side of a block: 64 MB of similarities
_GROUP = 32  # of a row's similarities only one in so many is sorted at first


@dataclass(frozen=True, kw_only=True)
class Near:
    """The nearest of some vectors, the nearest first."""

    similarity: NDArray[np.float32]
    """cosine similarity (M, k); -inf where there were fewer than k"""
    index: Ints
    """which they are (M, k)"""


def nearest(
    among: Floats,
    queries: Floats,
    k: int,
    *,
    codes: tuple[Ints, Ints] | None = None,
    device: torch.device = _CPU,
) -> Near:
    """The k (at most all) of `among` (N, D) that are nearest to each of queries (M, D).

    codes, (N,) and (M,), leave out those that have the query's own.
    """
    vectors, asked = _unit(among, device), _unit(queries, device)
    own = None if codes is None else [torch.from_numpy(part).to(device) for part in codes]
    best = _Best(len(asked), min(k, len(vectors)), device)
    for rows in _blocks(len(asked)):
        for columns in _blocks(len(vectors)):
            found = asked[rows] @ vectors[columns].T
            if own is not None:
                found.masked_fill_(own[1][rows, None] == own[0][None, columns], -torch.inf)
            best.see(rows, found, columns.start)
    return best.found()


def nearest_others(
    vectors: Floats, wanted: Sequence[tuple[Ints | None, int]], device: torch.device = _CPU
) -> list[Near]:
    """Of each of vectors (N, D) the nearest others, for each of some (codes, k).

    codes (N,) leave out others that have its own; None: nothing but itself is left out. All are found in one pass over
    half of the products: the similarity of two vectors serves both.
    """
    unit = _unit(vectors, device)
    of = [None if codes is None else torch.from_numpy(codes).to(device) for codes, _ in wanted]
    best = [_Best(len(unit), min(k, len(unit) - 1), device) for _, k in wanted]
    for rows in _blocks(len(unit)):
        for columns in _blocks(len(unit)):
            if columns.start < rows.start:
                continue
            found = unit[rows] @ unit[columns].T
            if rows == columns:
                found.fill_diagonal_(-torch.inf)
            for codes, kept in zip(of, best, strict=True):
                part = found
                if codes is not None:
                    part = found.masked_fill(codes[rows, None] == codes[None, columns], -torch.inf)
                kept.see(rows, part, columns.start)
                if rows != columns:
                    kept.see(columns, part, rows.start, dim=0)
    return [kept.found() for kept in best]


def _unit(vectors: Floats, device: torch.device) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(vectors).to(device).float(), dim=1)


def _blocks(num: int) -> list[slice]:
    return [slice(at, min(at + _BLOCK, num)) for at in range(0, num, _BLOCK)]


def _top(similarity: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """The k largest along a dimension of (rows, n) or (n, rows) and where they are, both (rows, k).

    The k largest lie in the k groups whose largest are largest, and a maximum is found many times faster than an order.
    """
    num = similarity.shape[dim]
    groups, rest = divmod(num, _GROUP)
    if rest or k > groups // 2:
        top = similarity.topk(k, dim)
        return (top.values, top.indices) if dim else (top.values.T, top.indices.T)
    # Group g is places g, g + groups, …: its maximum is then taken over whole rows of memory.
    grouped = similarity.unflatten(dim, (_GROUP, groups))
    chosen = grouped.amax(dim).topk(k, dim).indices
    each = [-1, -1, -1]
    each[dim] = _GROUP
    members = grouped.gather(dim + 1, chosen.unsqueeze(dim).expand(each)).flatten(dim, dim + 1)
    if not dim:
        members, chosen = members.T.contiguous(), chosen.T
    top, at = members.topk(k)
    return top, at // k * groups + chosen.gather(1, at % k)


class _Best:
    """The k best of each row so far."""

    def __init__(self, num: int, k: int, device: torch.device) -> None:
        self._k = k
        self._similarity = torch.full((num, k), -torch.inf, device=device)
        self._index = torch.zeros((num, k), dtype=torch.int64, device=device)

    def see(self, rows: slice, similarity: Tensor, first: int, dim: int = 1) -> None:
        """Takes notice of similarities (rows, n), or (n, rows) where dim is 0; n begins with vector `first`."""
        top, at = _top(similarity, min(self._k, similarity.shape[dim]), dim)
        every = torch.cat([self._similarity[rows], top], dim=1)
        index = torch.cat([self._index[rows], at + first], dim=1)
        self._similarity[rows], chosen = every.topk(self._k)
        self._index[rows] = index.gather(1, chosen)

    def found(self) -> Near:
        """What is left."""
        return Near(similarity=self._similarity.cpu().numpy(), index=self._index.cpu().numpy())
