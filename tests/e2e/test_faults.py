"""Readers and nodes that are lost, join or can't start, on a Ray of several nodes; an undisturbed run is the oracle."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.data._internal.stats import get_or_create_stats_actor

from streaming.catalog import Catalog
from streaming.delivery.stream import BatchShape, TileStream, step_digest
from streaming.errors import StreamError
from streaming.plan import TilePlan
from streaming.reading.batch import Batch, failures_of
from streaming.reading.reader import ReaderOptions
from tests import odd_slides
from tests.conftest import write_catalog
from tests.odd_slides import OddCatalog
from tests.processes import SMALL, TILESTREAM, kill_tree, wait_for
from trainer.run import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.long]
cloudpickle.register_pickle_by_value(odd_slides)

STEPS, BATCH, RANKS = 24, 8, 2
READERS = {"role": "reader"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ray.shutdown()
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        running.add_node(num_cpus=2, labels=READERS, object_store_memory=100 * 2**20)
    running.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    ray.init(address=running.address, log_to_driver=False, logging_level="warning")
    yield running
    ray.shutdown()
    running.shutdown()


def make_stream(
    catalog: str, *, delay_s: float = 0.05, deadly: Any = frozenset(), sign: int = signal.SIGSEGV, **options: Any
) -> TileStream:
    loaded = OddCatalog.of(Catalog.load(catalog), delay_s=delay_s, deadly=deadly, sign=sign)
    settings = {"readers": (2, 2), "reader_cpus": 2, "reader_labels": READERS, "segment_blocks": 24, "stall_s": None}
    plan = TilePlan(loaded, mpp={0.5: 1}, size=32)
    # Two batches at once: so small ones would else all be given out before anything happens.
    reader = ReaderOptions(requests_in_flight=2)
    return TileStream(loaded, plan, BatchShape(BATCH, RANKS), reader=reader, **{**settings, **options})


@pytest.fixture(scope="module")
def undisturbed(catalog: str) -> list[Batch]:
    batches = make_stream(catalog, delay_s=0.0).local_batches(0, STEPS)
    rows = [{name: np.asarray(column) for name, column in batch.items()} for batch in batches]
    return [
        {name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]


def digests(steps: Generator[list[Batch]], disturb: Callable[[int], None] = lambda step: None) -> list[str]:
    found: list[str] = []
    with contextlib.closing(steps):
        for step, batches in enumerate(steps):
            found.append(step_digest(batches))
            disturb(step)
    return found


def raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def readers_of(node: Any) -> list[psutil.Process]:
    """The reader actors of a node, by their titles."""
    found: list[psutil.Process] = []
    for process in raylet(node).children():
        title = title_of(process)
        if title.startswith("ray::") and "ReaderActor" in title:
            found.append(process)
    return found


def title_of(process: psutil.Process) -> str:
    """A process's title; empty if it has ended meanwhile, waited for by its parent or not (a zombie)."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def labelled(cluster: Cluster) -> list[Any]:
    ids = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Labels"].get("role") == "reader"}
    return [node for node in cluster.worker_nodes if node.unique_id in ids or node.node_id in ids]


def test_a_reader_that_is_killed_costs_no_tile(cluster: Cluster, catalog: str, undisturbed: list[Batch]) -> None:
    wanted = [step_digest([batch]) for batch in undisturbed]
    killed: list[int] = []

    def kill(step: int) -> None:
        if step in (1, 14):
            victim = wait_for(lambda: [p for node in cluster.worker_nodes for p in readers_of(node)])[0]
            killed.append(victim.pid)
            victim.kill()

    assert digests(make_stream(catalog).steps(0, STEPS), kill) == wanted
    assert len(set(killed)) == 2


def test_a_tile_that_crashes_its_reader_is_replaced_as_one_that_can_t_be_read(
    cluster: Cluster, catalog: str, undisturbed: list[Batch]
) -> None:
    step, at = 3, 5
    deadly = frozenset({(int(undisturbed[step]["x"][at]), int(undisturbed[step]["y"][at]))})
    refusing = make_stream(catalog, deadly=deadly, sign=0, delay_s=0.0)
    wanted = list(refusing.local_batches(0, 6))
    (refused,) = [failure for batch in wanted for failure in failures_of(batch)]
    assert refused.index == step * BATCH + at
    assert "refused" in refused.reason
    got = [batch for batches in make_stream(catalog, deadly=deadly, delay_s=0.0).steps(0, 6) for batch in batches]
    for mine, theirs in zip(got, wanted, strict=True):
        for name in ("index", "tile", "slide", "x", "y", "filtered"):
            assert np.array_equal(mine[name], theirs[name].numpy())
    (crashed,) = [failure for batch in got for failure in failures_of(batch)]
    assert crashed.index == refused.index
    assert "crashes its decoder (SIGSEGV)" in crashed.reason


def test_a_lost_node_costs_no_tile_and_a_new_one_is_used(
    cluster: Cluster, catalog: str, undisturbed: list[Batch]
) -> None:
    wanted = [step_digest([batch]) for batch in undisturbed]
    joined: list[Any] = []

    def disturb(step: int) -> None:
        if step == 2:
            lost = wait_for(lambda: [node for node in labelled(cluster) if readers_of(node)])[0]
            cluster.remove_node(lost, allow_graceful=False)
            joined.append(cluster.add_node(num_cpus=2, labels=READERS, object_store_memory=100 * 2**20))
            # The other reader works ahead meanwhile, and must not come to the end before this one has started.
            wait_for(lambda: readers_of(joined[0]))

    # One segment, so slow that there is work left when the lost node is given up.
    stream = make_stream(catalog, delay_s=0.8, segment_blocks=2 * RANKS * STEPS)
    assert digests(stream.steps(0, STEPS), disturb) == wanted
    other = next(node for node in cluster.worker_nodes if node not in labelled(cluster))
    assert not readers_of(other), "a reader runs on a node without its label"


def test_a_slide_that_is_deleted_and_one_that_turns_corrupt_cost_their_own_tiles_alone(
    cluster: Cluster, slides: list[Path], tmp_path: Path
) -> None:
    copies = [Path(shutil.copy2(path, tmp_path / path.name)) for path in slides]
    catalog = write_catalog(tmp_path / "catalog", copies)
    stream = make_stream(catalog, delay_s=0.2)
    undisturbed = list(make_stream(catalog, delay_s=0.0).local_batches(0, STEPS))
    kept, deleted, corrupt = range(3)
    seen = {"deleted": 0, "corrupt": 0}

    def check(step: int, batch: Batch, wanted: dict[str, Any], row: int) -> None:
        assert batch["index"][row] == wanted["index"][row]
        if not len(batch["failures"][row]):
            assert np.array_equal(batch["tile"][row], wanted["tile"][row].numpy())
            return
        failed = {Path(failure["slide"]).name for failure in batch["failures"][row]}
        # A tile of the undisturbed run may come from the kept slide because the rule turned down one of another.
        assert int(wanted["slide"][row]) in (deleted, corrupt) or int(wanted["filtered"][row])
        assert failed <= {copies[deleted].name, copies[corrupt].name}
        seen["deleted"] += copies[deleted].name in failed
        seen["corrupt"] += copies[corrupt].name in failed
        if step > STEPS // 2:
            assert batch["slide"][row] == kept

    def spoil() -> None:
        copies[deleted].unlink()
        stat, size = copies[corrupt].stat(), copies[corrupt].stat().st_size
        with copies[corrupt].open("r+b") as file:
            file.write(b"\0" * size)
        os.utime(copies[corrupt], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as bits rot: nobody wrote it

    # Closed whatever happens: a stream that is left open keeps its readers, and the next test none.
    with contextlib.closing(stream.steps(0, STEPS)) as steps:
        for step, batches in enumerate(steps):
            if step == 1:
                spoil()
            for batch, wanted in zip(batches, undisturbed[step * RANKS :], strict=False):
                for row in range(len(batch["index"])):
                    check(step, batch, wanted, row)
    assert seen["deleted"] > 5
    assert seen["corrupt"] > 5


def test_a_stream_whose_readers_can_t_be_placed_says_which_label_is_missing(cluster: Cluster, catalog: str) -> None:
    stalled = make_stream(catalog, reader_labels={"role": "reeder"}, stall_s=3)
    with pytest.raises(
        StreamError, match=r"waited \d+ s for a batch: no reader can start: none of 4 nodes has the labels role=reeder"
    ):
        next(stalled.steps(0, 2))


def test_a_stream_whose_readers_are_too_large_says_what_a_node_has(cluster: Cluster, catalog: str) -> None:
    with pytest.raises(StreamError, match="no reader can start: it needs 3 CPU slots, a node has 2 at most"):
        next(make_stream(catalog, reader_cpus=3, stall_s=3).steps(0, 2))


def test_segments_that_ended_leave_neither_process_nor_name_behind(
    cluster: Cluster, catalog: str, undisturbed: list[Batch]
) -> None:
    most: list[int] = []

    def count(step: int) -> None:
        processes = [p for node in cluster.list_all_nodes() for p in raylet(node).children()]
        titles = [title_of(process) for process in processes]
        most.append(sum("SplitCoordinator" in title or "ReaderActor" in title for title in titles))

    def known() -> set[str]:
        return set(ray.get(get_or_create_stats_actor().get_datasets.remote()))

    wanted, before = [step_digest([batch]) for batch in undisturbed], known()
    stream = make_stream(catalog, delay_s=0.0, readers=(1, 1), segment_blocks=4)
    assert digests(stream.steps(0, STEPS), count) == wanted
    # Ray shows metrics of each dataset that there ever was.
    assert len(known() - before) == 4
    # Twelve segments; at a time one ends, one runs and one is warm, each with a coordinator and a reader.
    assert max(most) <= 6
    wait_for(lambda: not any(readers_of(node) for node in cluster.list_all_nodes()))


def test_a_rank_whose_node_is_to_be_taken_away_saves_and_goes_on_elsewhere(
    cluster: Cluster, catalog: str, tmp_path: Path
) -> None:
    out, steps = str(tmp_path / "run"), 300
    command = [*TILESTREAM, "train", "debug", "--data.catalog", catalog, "--data.mpp", "{0.5: 1}", "--run.out", out]
    command += [*SMALL, "--train.steps", str(steps), "--train.batch", str(BATCH), "--train.checkpoint_every", "100000"]
    command += ["--train.rank_labels", "{role: trainer}", "--data.reader_labels", "{role: reader}"]
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    trainers = {"num_cpus": 2, "labels": {"role": "trainer"}, "object_store_memory": 100 * 2**20}
    spot = cluster.add_node(**trainers)
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as running:
        assert running.stderr is not None
        try:
            assert any(b"loss" in line for line in running.stderr)
            drain = ["drain-node", "--address", cluster.address, "--node-id", spot.node_id]
            drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "its price rose"]
            ray_command = Path(sys.executable).with_name("ray")
            subprocess.run([ray_command, *drain, "--deadline-remaining-seconds", "60"], check=True)
            (saved,) = wait_for(lambda: checkpoints.steps_of(out))
            cluster.add_node(**trainers)
            cluster.remove_node(spot, allow_graceful=False)
            said = running.stderr.read().decode()
            assert running.wait(timeout=300) == 0, said
        finally:
            kill_tree(running)
    assert saved < steps
    rows = pq.read_table(f"{out}/metrics.parquet").to_pylist()
    assert [(row["first_index"], row["next_index"]) for row in rows] == [
        (BATCH * s, BATCH * s + BATCH) for s in range(steps)
    ]


def test_ranks_that_find_no_node_say_so_and_end_the_run(cluster: Cluster, catalog: str, tmp_path: Path) -> None:
    command = [
        *TILESTREAM,
        "train",
        "vits14",
        "--data.mpp",
        "{0.5: 1}",
        "--data.stall_s",
        "5",
        "--train.rank_cpus",
        "1",
    ]
    command += ["--data.catalog", catalog, "--run.out", tmp_path / "run", "--run.loggers", "[]"]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as running:
        assert running.stderr is not None
        try:
            told = [line.decode() for line in running.stderr if line.startswith((b"train: waiting", b"tilestream:"))]
            assert running.wait(timeout=300) == 2, told
        finally:
            kill_tree(running)
    for line, start in ((told[0], "train: waiting for nodes: "), (told[-1], "tilestream: the ranks found no nodes")):
        assert line.startswith(start)
        assert "1 ranks want 1 CPU, 1 GPU each" in line
        assert "add nodes, or add --train.gpu false" in line
