"""Lists of tiles for other trainers, and for `data.tiles`: of a grid on the tissue, or of what a plan draws."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.inspection import Inspected
from streaming.catalog.tiling import tissue_tiles
from streaming.errors import ConfigError
from streaming.plan.plan import TilePlan

_AT_ONCE = 100_000
# A grid at each step of a range would be the same places hundreds of times.
_MOST_GRIDS = 16


def drawn_tiles(plan: TilePlan, num: int) -> Iterator[pa.Table]:
    """The first tiles of a plan, in the order of their indices: slide, x, y (level-0 pixels), mpp, size, index.

    They are what the plan draws: a reader's filters may replace some.
    """
    slides: Any = pa.array(plan.slides)
    for first in range(0, num, _AT_ONCE):
        specs = plan.specs(np.arange(first, min(first + _AT_ONCE, num)))
        size = np.full(len(specs), specs.size)
        place = {"slide": slides.take(pa.array(specs.slide)), "x": specs.x, "y": specs.y}
        yield _table({**place, "mpp": specs.mpp, "size": size, "index": specs.index})


def grid_tiles(plan: TilePlan, catalog: Catalog, min_tissue: float) -> Iterator[pa.Table]:
    """Tiles edge to edge on enough tissue of all slides, at each magnification that a plan draws of them.

    slide, x, y (level-0 pixels), mpp, size; slide by slide.

    Raises:
        ConfigError: the plan draws of a range of magnifications.
    """
    if len(plan.magnifications) > _MOST_GRIDS:
        raise ConfigError(
            f"a grid at {len(plan.magnifications)} magnifications; name up to {_MOST_GRIDS} (--mpp), or list what the "
            "plan draws (--draws)"
        )
    return _grids(plan, catalog, min_tissue)


def _grids(plan: TilePlan, catalog: Catalog, min_tissue: float) -> Iterator[pa.Table]:
    pairs = plan.pairs
    order = np.lexsort((pairs.mpp, pairs.slide))
    for slide, mpp in zip(pairs.slide[order].tolist(), pairs.mpp[order].tolist(), strict=True):
        found = Inspected(catalog[slide], catalog.tissue_grid(slide))
        corners = tissue_tiles(found, mpp, plan.size, min_tissue)
        num = len(corners)
        place = {"slide": pa.repeat(found.row.slide, num), "x": corners[:, 0], "y": corners[:, 1]}
        yield _table({**place, "mpp": np.full(num, mpp), "size": np.full(num, plan.size)})


def _table(columns: dict[str, Any]) -> pa.Table:
    return pa.table(cast(Any, columns))


def write_list(uri: str, tables: Iterable[pa.Table], options: storage.StorageOptions | None) -> tuple[int, int]:
    """Writes tables one after another as one Parquet file, whole or not at all; tells its rows and slides.

    Raises:
        ConfigError: there are no rows.
        StorageError: it can't be written.
    """
    num, slides = 0, set[str]()
    with storage.written_file(lambda: uri, options) as path, contextlib.ExitStack() as opened:
        writer: pq.ParquetWriter | None = None
        for table in tables:
            slides.update(map(str, table["slide"].unique().to_pylist()))
            writer = writer or opened.enter_context(pq.ParquetWriter(path, table.schema, compression="zstd"))
            writer.write_table(table)
            num += len(table)
        if not num:
            raise ConfigError(f"{uri}: no tile lies on enough tissue; lower --min-tissue, or take a finer --mpp")
        opened.close()
    return num, len(slides)
