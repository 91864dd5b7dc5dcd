"""Steps and their batches; Ray's road and the one without Ray give the same."""

import contextlib
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayError

from streaming import cluster
from streaming.catalog import Catalog
from streaming.delivery.stream import BatchShape, TileStream, check_step, step_digest
from streaming.errors import CatalogError, ConfigError, StreamError, root_cause
from streaming.plan import TilePlan
from streaming.reading.reader import TileReader


def stream(catalog: str, shape: BatchShape, **options: object) -> TileStream:
    loaded = Catalog.load(catalog)
    return TileStream(loaded, TilePlan(loaded, mpp={0.5: 1}, size=32), shape, **options)


@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 5))
def test_a_batch_is_divided_whole_or_the_nearest_that_can_be_is_named(batch: int, ranks: int, rounds: int) -> None:
    parts = ranks * rounds
    if batch % parts == 0:
        assert BatchShape(batch, ranks, rounds).micro * parts == batch
        return
    with pytest.raises(ConfigError, match=f"batch {batch} ") as caught:
        BatchShape(batch, ranks, rounds)
    near = [int(word) for word in str(caught.value).rsplit("take ")[1].split(" or ")]
    assert all(BatchShape(n, ranks, rounds) and abs(n - batch) < parts for n in near)


def test_senseless_shapes_steps_and_readers_are_refused(catalog: str) -> None:
    with pytest.raises(ConfigError, match="batch 0"):
        BatchShape(0)
    with pytest.raises(ConfigError, match="steps 3:3"):
        stream(catalog, BatchShape(8)).dataset(3, 3)
    with pytest.raises(ConfigError, match="segment_blocks is 0"):
        stream(catalog, BatchShape(8), segment_blocks=0)
    with pytest.raises(ConfigError, match="segment_minutes is 0"):
        stream(catalog, BatchShape(8), segment_minutes=0)
    with pytest.raises(ConfigError, match="stall_s is 0"):
        stream(catalog, BatchShape(8), stall_s=0)
    with pytest.raises(ConfigError, match="ranks_per_stream is 0"):
        stream(catalog, BatchShape(8), ranks_per_stream=0)
    with pytest.raises(ConfigError, match="readers"):
        stream(catalog, BatchShape(8), readers=(2, 1))


def test_a_step_with_a_missing_a_doubled_or_a_foreign_index_stops_the_run() -> None:
    right = np.arange(16, 24)
    check_step(2, 8, right[::-1])
    for wrong in (right[:-1], np.append(right[:-1], 16), right + 8):
        with pytest.raises(StreamError, match="step 2 got"):
            check_step(2, 8, wrong)


def test_a_digest_is_of_the_tiles_in_the_order_of_their_indices() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3)).astype(np.uint8)
    wanted = hashlib.sha256(tiles.tobytes()).hexdigest()
    for order in (np.arange(8), np.arange(8)[::-1], np.random.default_rng(1).permutation(8)):
        halves = [{"index": part, "tile": tiles[part]} for part in np.split(order, 2)]
        assert step_digest(halves) == wanted
    assert step_digest([{"index": np.arange(8), "tile": tiles[::-1]}]) != wanted


def test_without_ray_the_batches_are_the_reader_s(catalog: str) -> None:
    local = stream(catalog, BatchShape(8, 1, 2))
    batches = list(local.local_batches(1, 3))
    assert [batch["index"].tolist() for batch in batches] == [list(range(i, i + 4)) for i in (8, 12, 16, 20)]
    whole = TileReader(local.plan, local.catalog, local.reader)({"index": np.arange(8, 24)})
    assert np.array_equal(np.concatenate([batch["tile"].numpy() for batch in batches]), whole["tile"])


@pytest.mark.slow
def test_ranks_rounds_readers_and_segments_change_nothing_in_a_step(catalog: str) -> None:
    cluster.connect(8)
    local = stream(catalog, BatchShape(16))
    undisturbed = [{k: np.asarray(v) for k, v in batch.items()} for batch in local.local_batches(0, 3)]
    wanted = [step_digest([batch]) for batch in undisturbed]
    for shape, readers, segment in (
        (BatchShape(16, 2, 2), (4, 4), {"segment_blocks": 1}),
        (BatchShape(16, 4), (1, 2), {"segment_blocks": 4, "segment_minutes": 1e-6}),
        # The last group is smaller, and there are fewer readers than groups.
        (BatchShape(16, 4), (1, 1), {"ranks_per_stream": 3}),
    ):
        steps = list(stream(catalog, shape, readers=readers, **segment).steps(0, 3))
        assert [len(batches) for batches in steps] == [shape.ranks * shape.accumulate] * 3
        assert [step_digest(batches) for batches in steps] == wanted
        micro = [batch["index"].tolist() for batches in steps for batch in batches]
        assert micro == np.arange(48).reshape(-1, shape.micro).tolist(), "a rank's batches do not depend on groups"
        for step, batches in enumerate(steps):
            order = np.argsort(np.concatenate([batch["index"] for batch in batches]))
            for name in ("slide", "x", "y", "mpp", "filtered"):
                column = np.concatenate([batch[name] for batch in batches])[order]
                assert np.array_equal(column, undisturbed[step][name])


@pytest.mark.slow
def test_what_is_wrong_with_a_catalog_is_told_through_all_of_ray(catalog: str, tmp_path: Path) -> None:
    cluster.connect(8)
    broken = shutil.copytree(catalog, tmp_path / "catalog")
    shutil.rmtree(broken / "blocks")
    with pytest.raises(RayError) as raised, contextlib.closing(stream(str(broken), BatchShape(8)).steps(0, 2)) as steps:
        next(steps)
    cause = root_cause(raised.value)
    assert isinstance(cause, CatalogError)
    assert re.match(rf"{broken}/blocks/\S+: can't read this block index .*; build the catalog anew\n", str(cause))
