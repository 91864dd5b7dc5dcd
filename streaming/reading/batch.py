"""A batch of tiles: columns with a row a tile, and the three among them that hold more than a number a row.

Where tiles are read and where they are used, a batch is NumPy columns by name. Between the two Ray carries it as an
Arrow table, and makes NumPy columns of that again:

| column     | a row, in NumPy                                                              | a row, in Arrow |
|------------|------------------------------------------------------------------------------|-----------------|
| `failures` | sequence of {slide, reason}: tiles of its index that could not be read       | list of structs |
| `turned_down` | sequence of the filters that turned tiles of its index down               | list of strings |
| `counters` | {name: number} of the whole batch in the first row, None in the others       | struct or null  |

The counters of a batch are the sum over its rows, however batches were cut on the way.

With views, a sample is a row as well: the columns `tile`, `x`, `y` and `mpp` are of its first view, those of the second
are called `tile_1` and so on (`of_view`). `filtered`, `failures` and `turned_down` are of the sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streaming.counters import Counters

Batch = dict[str, NDArray[Any]]

ARROW_TYPES: Mapping[str, pa.DataType] = {
    "failures": pa.list_(pa.struct([("slide", pa.string()), ("reason", pa.string())])),
    "turned_down": pa.list_(pa.string()),
    "counters": pa.struct([(entry.name, pa.float64()) for entry in fields(Counters)]),
}
"""types of the columns whose rows don't show theirs: a batch without failures has none to tell it by"""


@dataclass(frozen=True)
class Failure:
    """A tile that was replaced: of which sample index, slide, and why."""

    index: int
    slide: str
    reason: str


def of_view(column: str, view: int) -> str:
    """What a column of a view is called, the first of which is 0."""
    return f"{column}_{view}" if view else column


def tile_columns(batch: Mapping[str, Any]) -> list[str]:
    """The columns of a batch that hold tiles, one a view."""
    views = itertools.takewhile(lambda view: of_view("tile", view) in batch, itertools.count())
    return [of_view("tile", view) for view in views]


def pack_failures(failures: Sequence[Sequence[tuple[str, str]]]) -> NDArray[Any]:
    """The column `failures`: for each row, slide and reason of the tiles of its index that could not be read."""
    column = np.empty(len(failures), dtype=object)
    for row, failed in enumerate(failures):
        column[row] = [{"slide": slide, "reason": reason} for slide, reason in failed]
    return column


def pack_replaced(
    failures: Sequence[Sequence[tuple[str, str]]], turned_down: Sequence[Sequence[str]]
) -> dict[str, NDArray[Any]]:
    """The columns `failures` and `turned_down`."""
    rules = np.empty(len(turned_down), dtype=object)
    for row, names in enumerate(turned_down):
        rules[row] = list(names)
    return {"failures": pack_failures(failures), "turned_down": rules}


def failures_of(batch: Mapping[str, Any]) -> list[Failure]:
    """The tiles of a batch that could not be read, from its columns `index` and `failures`."""
    return [
        Failure(int(batch["index"][row]), failed["slide"], failed["reason"])
        for row, of_row in enumerate(batch["failures"])
        for failed in of_row
    ]


def failed_slides(batch: Mapping[str, Any]) -> list[Failure]:
    """The failures that count: a slide once an index, by the last reason, however often it was tried for it."""
    return list({(failure.index, failure.slide): failure for failure in failures_of(batch)}.values())


def pack_counters(counters: Counters, num_rows: int) -> NDArray[Any]:
    """The column `counters` of a batch of at least one row."""
    column = np.full(num_rows, None, dtype=object)
    column[0] = counters.as_dict()
    return column


def counters_of(batch: Mapping[str, Any]) -> Counters:
    """What reading a batch took, from its column `counters`."""
    total = Counters()
    for row in batch["counters"]:
        if row is not None:
            total.add(Counters(**row))
    return total
