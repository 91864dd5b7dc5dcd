"""Nodes of ranks that go and come while a run lasts, on a Ray of several nodes; an undisturbed run is the oracle."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.processes import SMALL, TILESTREAM, kill_tree, wait_for
from trainer.run import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.long]

BATCH = 4
TRAINERS = {"num_cpus": 1, "resources": {"accelerator": 1}, "object_store_memory": 100 * 2**20}


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    ray.shutdown()
    # Readers run on the head, which is not taken away.
    head = {"num_cpus": 2, "labels": {"role": "reader"}, "object_store_memory": 100 * 2**20}
    running = Cluster(initialize_head=True, head_node_args=head)
    yield running
    running.shutdown()


def test_a_run_goes_on_with_fewer_ranks_where_a_node_is_lost_and_with_more_where_one_joins(
    nodes: Cluster, catalog: str, tmp_path: Path
) -> None:
    def command(name: str, steps: int, *options: str) -> list[str]:
        run = ["--run.out", str(tmp_path / name), "--train.steps", str(steps), "--train.batch", str(BATCH), *SMALL]
        # So small steps that what rounding changes stays small.
        run += ["--optim.schedule_steps", "100000", "--optim.base_lr", "1e-6", "--model.drop_path", "0"]
        run += ["--mask.group_size", "2", "--augment.num_local", "1", "--train.log_every", "1"]
        return [*TILESTREAM, "train", "debug", "--data.catalog", catalog, "--data.mpp", "{0.5: 1}", *run, *options]

    def rows(name: str) -> dict[str, list[Any]]:
        return pq.read_table(tmp_path / name / "metrics.parquet").to_pydict()

    def trained_on(ranks: int, since: int) -> bool:
        found = rows("run")
        return any(step > since and at == ranks for step, at in zip(found["step"], found["ranks"], strict=True))

    def newest() -> int:
        return max(checkpoints.steps_of(str(tmp_path / "run")), default=0)

    options = ["--train.ranks", "[1,2]", "--train.rank_resources.accelerator", "1", "--train.max_micro_batch", "4"]
    options += ["--data.reader_labels", "{role: reader}", "--train.checkpoint_every", "10", "--train.max_restarts", "1"]
    lost, _ = nodes.add_node(**TRAINERS), nodes.add_node(**TRAINERS)
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    with subprocess.Popen(command("run", 100_000, *options), env=environment, stderr=subprocess.DEVNULL) as running:
        try:
            wait_for(newest, running)
            nodes.remove_node(lost, allow_graceful=False)
            wait_for(lambda: trained_on(1, 0), running)
            since = newest()
            nodes.add_node(**TRAINERS)
            wait_for(lambda: trained_on(2, since), running)
            running.send_signal(signal.SIGTERM)
            assert running.wait(timeout=240) == 128 + signal.SIGTERM
        finally:
            kill_tree(running)
    disturbed, reached = rows("run"), newest()
    changes = [
        (step, after)
        for step, before, after in zip(
            disturbed["step"][1:], disturbed["ranks"][:-1], disturbed["ranks"][1:], strict=True
        )
        if before != after
    ]
    assert [disturbed["ranks"][0], *(ranks for _, ranks in changes)] == [2, 1, 2]
    # Each goes on from a checkpoint, and the one for more ranks was not written for them.
    assert [step % 10 for step, _ in changes] == [1, 1]
    subprocess.run(command("undisturbed", reached, "--debug"), check=True, capture_output=True)
    wanted = rows("undisturbed")
    assert disturbed["next_index"] == wanted["next_index"] == [BATCH * step for step in range(1, reached + 1)]
    assert disturbed["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
