"""What readers tell of a batch, besides its tiles, on Ray's road and on the one without."""

from pathlib import Path

import numpy as np
import pytest
from ray.data import Dataset

from streaming import cluster
from streaming.catalog import Catalog
from streaming.counters import Counters
from streaming.delivery.reader_actor import block_of
from streaming.delivery.stream import BatchShape, TileStream, torch_batches
from streaming.plan import TilePlan
from streaming.reading.batch import (
    ARROW_TYPES,
    Failure,
    counters_of,
    failed_slides,
    failures_of,
    pack_counters,
    pack_replaced,
)
from tests.conftest import write_catalog

MICRO = 2


@pytest.mark.parametrize("failures", [[[], []], [[("a.svs", "cut")], []], [[], [("a.svs", "cut"), ("b.svs", "gone")]]])
def test_columns_have_one_type_whether_tiles_failed_or_not(failures: list[list[tuple[str, str]]]) -> None:
    tiles = np.zeros((2, 4, 4, 3), np.uint8)
    taken = Counters(requests=3, fetch_s=0.1)
    columns = {**pack_replaced(failures, [[], ["blur"]]), "counters": pack_counters(taken, 2)}
    block = block_of({"tile": tiles, "index": np.arange(2), **columns})
    for name, kind in ARROW_TYPES.items():
        assert block.schema.field(name).type == kind
    batch = {"index": np.arange(2), **{name: block[name].to_numpy() for name in ARROW_TYPES}}
    wanted = [Failure(row, *failed) for row, of_row in enumerate(failures) for failed in of_row]
    assert failures_of(batch) == wanted
    assert counters_of(batch) == taken
    assert [list(names) for names in batch["turned_down"]] == [[], ["blur"]]


def test_counters_are_the_sum_over_batches_that_were_joined_or_cut() -> None:
    joined = np.concatenate([pack_counters(Counters(requests=n, fetch_s=n / 2), 3) for n in (1, 2)])
    assert counters_of({"counters": joined}) == Counters(requests=3, fetch_s=1.5)
    assert counters_of({"counters": joined[1:4]}) == Counters(requests=2, fetch_s=1.0)
    assert counters_of({"counters": joined[1:3]}) == Counters()


@pytest.fixture(scope="module")
def spoilt(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> TileStream:
    """A stream, one of whose slides went bad after it was catalogued."""
    folder = tmp_path_factory.mktemp("spoilt")
    copies = [folder / path.name for path in slides]
    for path, copy in zip(slides, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    catalog = Catalog.load(write_catalog(folder / "catalog", copies))
    copies[1].write_bytes(b"gone bad")
    return TileStream(catalog, TilePlan(catalog, mpp={0.5: 1}, size=32), BatchShape(2 * MICRO, accumulate=2))


@pytest.mark.slow
def test_ray_gives_a_view_of_the_tiles_and_what_the_reader_told(spoilt: TileStream) -> None:
    cluster.connect(4)
    wanted = list(spoilt.local_batches(0, 4))
    dataset: Dataset = spoilt.dataset(0, 4).materialize()
    in_numpy = list(dataset.iter_batches(batch_size=MICRO, batch_format="numpy"))
    in_torch = list(torch_batches(dataset.iterator(), MICRO))
    assert len(in_numpy) == len(in_torch) == len(wanted)
    assert any(failures_of(batch) for batch in wanted)
    assert any(not failures_of(batch) for batch in wanted)
    for numpy_batch, torch_batch, local in zip(in_numpy, in_torch, wanted, strict=True):
        # A copy could be written to; memory of Ray's object store can't.
        assert not numpy_batch["tile"].flags.writeable
        assert not numpy_batch["tile"].flags.owndata
        for batch in (numpy_batch, torch_batch):
            assert np.array_equal(batch["tile"], local["tile"])
            assert failures_of(batch) == failures_of(local)
            assert len(failed_slides(batch)) == len(failed_slides(local))
            assert counters_of(batch).tiles == MICRO
            assert counters_of(batch).total_s > 0
            assert float(batch["ended_at"].min()) > 1.7e9
