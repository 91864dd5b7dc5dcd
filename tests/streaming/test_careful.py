"""Reading with care: a tile that kills the process that reads it costs itself alone."""

import signal

import numpy as np
import pytest

from streaming.catalog import Catalog
from streaming.errors import StreamError
from streaming.plan import TilePlan
from streaming.reader import ReaderOptions, TileReader
from tests.odd_slides import OddCatalog


def test_a_deadly_tile_is_replaced_and_all_others_are_what_they_were(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    plan = TilePlan(loaded, mpp={0.5: 1}, size=32)
    index = np.arange(40, 48)
    wanted = TileReader(plan, loaded, ReaderOptions())({"index": index})
    spec = plan[43]
    odd = OddCatalog(catalog, loaded.table, 0.0, frozenset({(spec.x, spec.y)}))
    got = TileReader(plan, odd, ReaderOptions())({"index": index}, careful=True)
    others = index != 43
    for name in ("tile", "slide", "x", "y", "filtered", "failures"):
        assert np.array_equal(got[name][others], wanted[name][others])
    instead = plan.specs(index, np.ones(len(index), np.int32))
    assert (got["x"][3], got["y"][3]) == (instead.x[3], instead.y[3])
    assert f"{spec.slide}: tile at {spec.x}, {spec.y} of 0.5 µm/px crashes its decoder (SIGSEGV)" in str(
        got["failures"][3]
    ).encode().decode("unicode_escape")


def test_a_process_that_is_killed_from_outside_is_no_fault_of_the_tile(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    plan = TilePlan(loaded, mpp={0.5: 1}, size=32)
    deadly = frozenset({(plan[0].x, plan[0].y)})
    odd = OddCatalog(catalog, loaded.table, 0.0, deadly, signal.SIGKILL)
    with pytest.raises(StreamError, match="was killed 3 times; is the node short of memory"):
        TileReader(plan, odd, ReaderOptions())({"index": np.arange(2)}, careful=True)
