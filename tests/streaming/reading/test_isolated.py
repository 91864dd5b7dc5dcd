"""Reading in a process apart: a tile that kills the process that reads it costs itself alone."""

import signal

import numpy as np
import pytest

from streaming.catalog import Catalog
from streaming.errors import StreamError
from streaming.plan import TilePlan
from streaming.reading.batch import failures_of
from streaming.reading.reader import ReaderOptions, TileReader
from tests.odd_slides import OddCatalog


def test_a_deadly_tile_is_replaced_and_all_others_are_what_they_were(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    plan = TilePlan(loaded, mpp={0.5: 1}, size=32)
    index = np.arange(40, 48)
    spec = plan[43]
    deadly = frozenset({(spec.x, spec.y)})
    refusing = OddCatalog.of(loaded, deadly=deadly, sign=0)
    wanted = TileReader(plan, refusing, ReaderOptions())({"index": index})
    odd = OddCatalog.of(loaded, deadly=deadly)
    got = TileReader(plan, odd, ReaderOptions())({"index": index}, isolated=True)
    for name in ("tile", "slide", "x", "y", "filtered"):
        assert np.array_equal(got[name], wanted[name])
    (failure,) = failures_of(got)
    assert failure.index == 43
    assert f"{spec.slide}: tile at {spec.x}, {spec.y} of 0.5 µm/px crashes its decoder (SIGSEGV)" in failure.reason


def test_a_process_that_is_killed_from_outside_is_no_fault_of_the_tile(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    plan = TilePlan(loaded, mpp={0.5: 1}, size=32)
    deadly = frozenset({(plan[0].x, plan[0].y)})
    odd = OddCatalog.of(loaded, deadly=deadly, sign=signal.SIGKILL)
    with pytest.raises(StreamError, match="was killed 3 times; is the node short of memory"):
        TileReader(plan, odd, ReaderOptions())({"index": np.arange(2)}, isolated=True)
