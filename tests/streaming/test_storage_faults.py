"""Storage that throttles, resets, stalls or answers wrong lengths costs no tile; an undisturbed run is the oracle."""

import os
from pathlib import Path

import boto3
import numpy as np
import pytest

from streaming.catalog import Catalog
from streaming.plan import TilePlan
from streaming.reader import ReaderOptions
from streaming.stats import FailureBudget, TimeUse
from streaming.stream import BatchShape, TileStream, step_digest
from tests.conftest import write_catalog
from tests.faulty_server import FaultyServer, Mood


@pytest.fixture(scope="module")
def s3_catalog(s3_bucket: str, slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    client = boto3.client("s3", region_name="us-east-1")
    for path in slides:
        client.upload_file(str(path), "tiles", f"faults/{path.name}")
    return write_catalog(tmp_path_factory.mktemp("s3"), [f"{s3_bucket}/faults/{path.name}" for path in slides])


def read(catalog: str, endpoint: str, **options: object) -> tuple[list[str], float]:
    """Digests of some steps, and how many requests were sent again for them."""
    loaded = Catalog.load(catalog)
    reader = ReaderOptions(storage_options={"endpoint_url": endpoint, **options})
    stream = TileStream(loaded, TilePlan(loaded, mpp={0.5: 1}, size=32), BatchShape(16), reader=reader)
    budget, use, found = FailureBudget(1.0), TimeUse(), []
    for batch in stream.local_batches(0, 6):
        found.append(step_digest([{name: np.asarray(column) for name, column in batch.items()}]))
        budget.add(batch)
        use.add(batch)
    assert not budget.by_slide, budget.reasons
    return found, use.totals["retries"]


@pytest.fixture(scope="module")
def undisturbed(s3_catalog: str) -> list[str]:
    digests, retries = read(s3_catalog, os.environ["AWS_ENDPOINT_URL"])
    assert retries == 0
    return digests


def burst(mood: str, first: int, last: int) -> Mood:
    return lambda n: mood if first <= n <= last else ""


@pytest.mark.parametrize(
    "mood",
    [burst("503", 10, 60), burst("429", 5, 40), lambda n: "reset" if n % 5 == 0 else ""],
    ids=["503", "429", "resets"],
)
def test_throttling_and_resets_cost_no_tile_and_are_counted(
    s3_catalog: str, undisturbed: list[str], mood: Mood
) -> None:
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], mood) as server:
        assert read(s3_catalog, server.url) == (undisturbed, server.num_faults)
        assert server.num_faults > 5


@pytest.mark.parametrize("mood", ["half", "short", "long"])
def test_answers_of_a_wrong_length_cost_no_tile(s3_catalog: str, undisturbed: list[str], mood: str) -> None:
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], lambda n: mood if n % 7 == 0 else "") as server:
        assert read(s3_catalog, server.url) == (undisturbed, server.num_faults)
        assert server.num_faults > 5


def test_a_request_that_stalls_is_sent_anew_long_before_the_stall_ends(s3_catalog: str, undisturbed: list[str]) -> None:
    # If the reader waited for the stall, the test's time limit would end it.
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], lambda n: "stall" if n in (3, 30) else "", stall_s=600) as server:
        assert read(s3_catalog, server.url, timeout_s=2) == (undisturbed, 2)
        assert server.num_faults == 2


@pytest.mark.slow
@pytest.mark.long
def test_storage_that_stands_still_for_a_minute_costs_no_tile(s3_catalog: str, undisturbed: list[str]) -> None:
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], lambda n: "stall" if n < 200 else "", stall_s=60) as server:
        assert read(s3_catalog, server.url) == (undisturbed, server.num_faults)
        assert server.num_faults > 30
