"""Storage that throttles, resets, stalls or answers wrong lengths costs no tile; an undisturbed run is the oracle."""

import os
from pathlib import Path

import boto3
import numpy as np
import pytest

from streaming import storage
from streaming.catalog import Catalog
from streaming.delivery.failures import FailureBudget
from streaming.delivery.stream import BatchShape, TileStream, step_digest
from streaming.delivery.time_use import TimeUse
from streaming.errors import StreamError
from streaming.plan import TilePlan
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.storage.staging import Staging
from tests.conftest import write_catalog
from tests.faulty_server import FaultyServer, Mood, down
from tests.tiff_files import STAGED, write_tiff


@pytest.fixture(scope="module")
def s3_catalog(s3_bucket: str, slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    client = boto3.client("s3", region_name="us-east-1")
    for path in slides:
        client.upload_file(str(path), "tiles", f"faults/{path.name}")
    return write_catalog(tmp_path_factory.mktemp("s3"), [f"{s3_bucket}/faults/{path.name}" for path in slides])


def make_stream(catalog: str, staging: Path | None = None, **options: object) -> TileStream:
    kept = Staging(folder=str(staging)) if staging else Staging()
    loaded = Catalog.load(catalog, options, kept)
    reader = ReaderOptions(storage_options=options, staging=kept)
    return TileStream(loaded, TilePlan(loaded, mpp={0.5: 1}, size=32), BatchShape(16), reader=reader)


def read(stream: TileStream) -> tuple[list[str], float]:
    """Digests of some steps, none of whose tiles failed, and how many requests were sent again for them."""
    budget, use, found = FailureBudget(1.0), TimeUse(), []
    for batch in stream.local_batches(0, 6):
        found.append(step_digest([{name: np.asarray(column) for name, column in batch.items()}]))
        budget.add(batch)
        use.add(batch)
    assert not budget.by_slide, budget.reasons
    return found, use.totals["retries"]


@pytest.fixture(scope="module")
def undisturbed(s3_catalog: str) -> list[str]:
    digests, retries = read(make_stream(s3_catalog))
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
        assert read(make_stream(s3_catalog, endpoint_url=server.url)) == (undisturbed, server.num_faults)
        assert server.num_faults > 5


@pytest.mark.parametrize("mood", ["half", "short", "long"])
def test_answers_of_a_wrong_length_cost_no_tile(s3_catalog: str, undisturbed: list[str], mood: str) -> None:
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], lambda n: mood if n % 7 == 0 else "") as server:
        assert read(make_stream(s3_catalog, endpoint_url=server.url)) == (undisturbed, server.num_faults)
        assert server.num_faults > 5


def test_a_request_that_stalls_is_sent_anew_long_before_the_stall_ends(s3_catalog: str, undisturbed: list[str]) -> None:
    # If the reader waited for the stall, the test's time limit would end it.
    with FaultyServer(
        os.environ["AWS_ENDPOINT_URL"], lambda n: "stall" if n in (3, 30) else "", stall_s=3600
    ) as server:
        digests, retries = read(make_stream(s3_catalog, endpoint_url=server.url, timeout_s=2))
        assert digests == undisturbed
        assert server.num_faults == 2 <= retries, "on a busy machine, others take two seconds too"


@pytest.fixture(scope="module")
def all_on_s3(s3_bucket: str, s3_catalog: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A catalog on S3, with the slides of the other one and two that only OpenSlide reads, from staged copies."""
    folder, catalog = tmp_path_factory.mktemp("all_on_s3"), f"{s3_bucket}/faults/catalog"
    uris = Catalog.load(s3_catalog).slides()
    for i in range(2):
        uris.append(f"{s3_bucket}/faults/staged{i}.svs")
        storage.write_bytes(uris[-1], write_tiff(STAGED, folder / "staged.svs").read_bytes())
    write_catalog(catalog, uris, 0.5, Staging(folder=str(folder)))
    assert Catalog.load(catalog).table["backend"].to_pylist().count("openslide") == 2
    return catalog


@pytest.mark.parametrize("mood", ["503", "429", "reset"])
def test_storage_that_is_down_while_slides_are_opened_costs_no_tile(all_on_s3: str, tmp_path: Path, mood: str) -> None:
    undisturbed, _ = read(make_stream(all_on_s3, tmp_path / "undisturbed"))
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], befalls_all=True) as server:
        stream = make_stream(all_on_s3, tmp_path / "copies", endpoint_url=server.url)
        assert stream.plan[0].size == 32, "the tissue is here"
        server.mood = down(mood, 4)
        assert read(stream)[0] == undisturbed
        assert server.num_faults > 2


def test_a_file_is_written_once_storage_is_back(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/faults/file"
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], down("503", 2), befalls_all=True) as server:
        with storage.written_file(lambda: uri, {"endpoint_url": server.url}) as path:
            Path(path).write_bytes(b"pixels")
        assert server.num_faults > 1
    assert storage.read_bytes(uri) == b"pixels"


@pytest.mark.slow
@pytest.mark.long
def test_storage_that_stands_still_for_a_minute_costs_no_tile(s3_catalog: str, undisturbed: list[str]) -> None:
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], down("stall", 60), stall_s=60) as server:
        assert read(make_stream(s3_catalog, endpoint_url=server.url)) == (undisturbed, server.num_faults)
        # What was asked for first is asked for again each 20 s.
        assert server.num_faults > 30


@pytest.mark.parametrize(("status", "said"), [("403", "access denied"), ("404", "not found")])
@pytest.mark.parametrize("num_slides", [3, 12])
def test_a_bucket_that_refuses_all_is_asked_little(
    s3_bucket: str, slides: list[Path], tmp_path: Path, num_slides: int, status: str, said: str
) -> None:
    uris = [f"{s3_bucket}/refused/{i}.svs" for i in range(num_slides)]
    for i, uri in enumerate(uris):
        storage.write_bytes(uri, slides[i % len(slides)].read_bytes())
    catalog = Catalog.load(write_catalog(tmp_path, uris))
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], lambda n: status, befalls_all=True) as server:
        options = ReaderOptions(storage_options={"endpoint_url": server.url})
        reader = TileReader(TilePlan(catalog, mpp={0.5: 1}, size=32), catalog, options)
        with pytest.raises(StreamError, match=f"{said}; check the") as caught:
            reader({"index": np.arange(16)})
        if num_slides == 12:
            assert "slides that this reader asked for can't be read" in str(caught.value)
        assert server.count <= 100, "16 tiles of four requests or so, and hardly any replacement"
