"""Where the slides of a training come from: what a model card must name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from streaming.catalog import Catalog
from streaming.plan import TilePlan
from streaming.plan.magnifications import Mpp, mpp_named

_MOST_MPP = 8


@dataclass(frozen=True, kw_only=True)
class SlideSource:
    """Slides of one collection, licence and DOI that a run draws tiles from; None where the catalog tells none."""

    collection: str | None
    license: str | None
    doi: str | None
    slides: int
    patients: int
    """a slide whose patient nobody told counts as one"""
    share: float
    """of the run's tiles, as planned"""
    mpp: list[float] = field(default_factory=list[float])
    """µm/px of the list that the run draws from: all, or of many the least and the most; else none"""


def slide_sources(catalog: Catalog, plan: TilePlan) -> list[SlideSource]:
    """The slides that a plan draws from, by the catalog's columns collection, license and doi; largest share first."""
    known, mpp = catalog.metadata_columns, plan.magnifications.tolist()
    of_list = [] if plan.digest is None else mpp if len(mpp) <= _MOST_MPP else [mpp[0], mpp[-1]]
    columns = [
        catalog.metadata(name) if name in known else [None] * len(catalog) for name in ("collection", "license", "doi")
    ]
    members = defaultdict[tuple[str | None, ...], list[int]](list)
    for row in np.flatnonzero(plan.shares > 0).tolist():
        members[tuple(column[row] for column in columns)].append(row)
    found = [
        SlideSource(
            collection=collection,
            license=license,
            doi=doi,
            slides=len(rows),
            patients=len(np.unique(plan.patients[rows])),
            share=float(plan.shares[rows].sum()),
            mpp=of_list,
        )
        for (collection, license, doi), rows in members.items()
    ]
    return sorted(found, key=lambda source: (-source.share, str(source.collection)))


def trained_mpp(mpp: Mpp, sources: Sequence[SlideSource]) -> list[float]:
    """The µm/px that a run was trained at: those of its configuration, or of the list that it drew from."""
    return sorted({value for source in sources for value in source.mpp}) or mpp_named(mpp)
