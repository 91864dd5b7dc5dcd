"""A node whose object store is full and whose disk has no room to spill to; an undisturbed run is the oracle."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import OutOfDiskError

from streaming.catalog import Catalog
from streaming.delivery.stream import BatchShape, TileStream, step_digest
from streaming.errors import NodeError
from streaming.plan import TilePlan

STEPS, BATCH = 16, 128


@pytest.fixture
def full_node(make_disk: Callable[[int], Path]) -> Iterator[None]:
    ray.shutdown()
    spilling = str(make_disk(2 * 2**20))
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=100 * 2**20,
        object_spilling_directory=spilling,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


def stream_of(catalog: str) -> TileStream:
    loaded = Catalog.load(catalog)
    return TileStream(loaded, TilePlan(loaded, mpp={0.5: 1}, size=128), BatchShape(BATCH), stall_s=None)


@pytest.mark.slow
@pytest.mark.long
def test_a_full_disk_where_blocks_are_spilt_stops_the_stream_with_the_remedy_and_it_goes_on_where_it_was(
    full_node: None, catalog: str
) -> None:
    local = stream_of(catalog).local_batches(0, STEPS)
    wanted = [step_digest([{name: np.asarray(column) for name, column in batch.items()}]) for batch in local]
    found: list[str] = []
    others: list[ray.ObjectRef] = []

    def take_all() -> None:
        with contextlib.closing(stream_of(catalog).steps(0, STEPS)) as steps:
            for batches in steps:
                found.append(step_digest(batches))
                with contextlib.suppress(OutOfDiskError):
                    while True:  # somebody else's objects
                        others.append(ray.put(np.ones(3 * 2**20, np.uint8)))

    with pytest.raises(NodeError, match=r"object store is full, and so is the disk"):
        take_all()
    assert len(found) < STEPS
    others.clear()
    with contextlib.closing(stream_of(catalog).steps(len(found), STEPS)) as steps:
        found += [step_digest(batches) for batches in steps]
    assert found == wanted
