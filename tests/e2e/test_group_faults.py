"""Groups of ranks with datasets of their own: what one of them loses, or how slow it is, changes no batch."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from streaming import cluster
from streaming.catalog import Catalog
from streaming.delivery.chain import start_chain
from streaming.delivery.rank_batches import rank_batches
from streaming.delivery.stream import BatchShape, TileStream, step_digest
from streaming.plan import TilePlan
from streaming.reading.reader import ReaderOptions
from tests import odd_slides
from tests.odd_slides import OddCatalog
from tests.processes import SMALL, TILESTREAM, kill_tree

pytestmark = [pytest.mark.slow, pytest.mark.long]
cloudpickle.register_pickle_by_value(odd_slides)

STEPS, BATCH, RANKS = 24, 8, 4


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.shutdown()  # another file's may have nodes that are gone
    cluster.connect(8)
    yield
    ray.shutdown()


def make_stream(catalog: str, delay_s: float, **options: Any) -> TileStream:
    loaded = OddCatalog.of(Catalog.load(catalog), delay_s=delay_s)
    settings = {"readers": (2, 2), "ranks_per_stream": 2, "segment_blocks": 24, **options}
    # Two batches at once: so small ones would else all be given out before anything happens.
    reader = ReaderOptions(requests_in_flight=2)
    return TileStream(
        loaded, TilePlan(loaded, mpp={0.5: 1}, size=32), BatchShape(BATCH, RANKS), reader=reader, **settings
    )


@pytest.fixture(scope="module")
def undisturbed(catalog: str) -> list[str]:
    loaded = Catalog.load(catalog)
    local = TileStream(loaded, TilePlan(loaded, mpp={0.5: 1}, size=32), BatchShape(BATCH))
    return [
        step_digest([{name: column.numpy() for name, column in batch.items() if name in ("index", "tile")}])
        for batch in local.local_batches(0, STEPS)
    ]


def alive(title: str, above: psutil.Process | None = None) -> list[psutil.Process]:
    """Processes of Ray's below one, by their titles."""
    found = list[psutil.Process]()
    for process in (above or psutil.Process()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            shown = " ".join(process.cmdline())
            if shown.startswith("ray::") and title in shown:
                found.append(process)
    return found


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("lost", ["SplitCoordinator", "ray::Chain"])
def test_a_group_whose_coordinator_or_chain_is_killed_goes_on_after_its_last_batch(
    catalog: str, undisturbed: list[str], lost: str
) -> None:
    found, killed = list[str](), list[int]()
    with contextlib.closing(make_stream(catalog, 0.1).steps(0, STEPS)) as steps:
        for step, batches in enumerate(steps):
            found.append(step_digest(batches))
            # In the first segment, and in one that lies a few behind it.
            if step in (1, 15):
                victim = alive(lost)[0]
                killed.append(victim.pid)
                victim.kill()
    assert found == undisturbed
    assert len(set(killed)) == 2


@pytest.mark.usefixtures("local_ray")
def test_a_group_that_is_ten_times_as_slow_gets_the_same_batches(catalog: str, undisturbed: list[str]) -> None:
    stream = make_stream(catalog, 0.02)
    slow = ray.put(OddCatalog.of(Catalog.load(catalog), delay_s=0.2))
    parts = [stream.source.part(range(2)), replace(stream.source.part(range(2, 4)), catalog=slow)]
    chains = [start_chain() for _ in parts]

    def read(share: Any) -> Iterator[Any]:
        return iter(share.iter_batches(batch_size=BATCH // RANKS, batch_format="numpy"))

    ranks = [
        rank_batches(chain, part, rank, (0, STEPS), read)
        for chain, part in zip(chains, parts, strict=True)
        for rank in part.group
    ]
    try:
        with ThreadPoolExecutor(RANKS) as pool:
            found = [step_digest(list(pool.map(next, ranks))) for _ in range(STEPS)]
    finally:
        # Left to the garbage collector, they would tell actors of this Ray of their end when there is another one.
        for rank in ranks:
            rank.close()
        for chain in chains:
            ray.kill(chain)
    assert found == undisturbed


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    ray.shutdown()
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        running.add_node(num_cpus=4, object_store_memory=100 * 2**20)
    yield running
    running.shutdown()


def test_two_runs_on_one_cluster_get_each_its_batches(nodes: Cluster, catalog: str, undisturbed: list[str]) -> None:
    command = [*TILESTREAM, "stream", catalog, "--steps", f"0:{STEPS}", "--batch", str(BATCH), "--mpp", "0.5"]
    command += ["--size", "32", "--ranks", str(RANKS), "--ranks-per-stream", "2", "--readers", "2:2", "--digest"]
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    with contextlib.ExitStack() as running:
        both = [
            running.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
            for _ in range(2)
        ]
        try:
            said = [each.communicate(timeout=400)[0] for each in both]
        finally:
            for each in both:
                kill_tree(each)
    for each in said:
        assert re.findall(r"^step \d+ (\w+)$", each, re.MULTILINE) == undisturbed


def test_a_training_whose_chains_and_messages_are_killed_goes_on_without_new_ranks(
    catalog: str, tmp_path: Path
) -> None:
    def command(name: str, *options: str) -> list[str]:
        run = ["--run.out", str(tmp_path / name), "--train.steps", "16", "--train.batch", "4", "--mask.group_size", "2"]
        run += ["--augment.num_local", "1", "--train.log_every", "1", "--model.drop_path", "0", *SMALL]
        return [*TILESTREAM, "train", "debug", "--data.catalog", catalog, "--data.mpp", "{0.5: 1}", *run, *options]

    def rows(name: str) -> dict[str, list[float]]:
        return pq.read_table(tmp_path / name / "metrics.parquet").to_pydict()

    # Without Ray.
    subprocess.run(command("undisturbed", "--debug"), check=True, capture_output=True)
    options = ["--train.ranks", "2", "--train.ranks_per_stream", "1", "--data.segment_blocks", "8"]
    options += ["--data.readers", "[2,2]", "--train.max_restarts", "0"]
    with subprocess.Popen(command("disturbed", *options), stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        try:
            assert any(b"loss" in line for line in running.stderr)
            chains, queues = (alive(name, psutil.Process(running.pid)) for name in ("ray::Chain", "_QueueActor"))
            for victim in (*chains, *queues):
                victim.kill()
            said = running.stderr.read().decode()
            assert running.wait(timeout=480) == 0, said
        finally:
            kill_tree(running)
    assert (len(chains), len(queues)) == (2, 1)
    assert "Traceback" not in said
    wanted, found = rows("undisturbed"), rows("disturbed")
    assert found["next_index"] == wanted["next_index"] == [4 * step + 4 for step in range(16)]
    # Sums are rounded in another order on two ranks.
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
