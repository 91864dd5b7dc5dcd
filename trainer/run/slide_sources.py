"""Where the slides of a training come from: what a model card must name."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from streaming.catalog import Catalog
from streaming.plan import TilePlan


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


def slide_sources(catalog: Catalog, plan: TilePlan) -> list[SlideSource]:
    """The slides that a plan draws from, by the catalog's columns collection, license and doi; largest share first."""
    known = catalog.metadata_columns
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
        )
        for (collection, license, doi), rows in members.items()
    ]
    return sorted(found, key=lambda source: (-source.share, str(source.collection)))
