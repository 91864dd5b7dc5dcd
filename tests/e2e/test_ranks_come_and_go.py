"""Nodes of ranks that go and come while a run lasts, on a Ray of several nodes; an undisturbed run is the oracle."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from streaming import storage
from tests.faulty_server import FaultyServer
from tests.processes import SMALL, TILESTREAM, free_ports, kill_tree, wait_for
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


class SlowStore(FaultyServer):
    """A store that takes its time with each write of a checkpoint."""

    write_s = 10.0
    held_s = 0.0
    """how long writes have been held up, one after the other"""

    def answer(
        self, command: str, path: str, headers: Mapping[str, str], content: bytes
    ) -> tuple[int, Mapping[str, str], bytes]:
        if command in ("PUT", "POST") and "/checkpoints/" in path:
            time.sleep(self.write_s)
            self.held_s += self.write_s
        return super().answer(command, path, headers, content)


@contextlib.contextmanager
def pod(address: str, environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A node with room for one rank, as a pod is one: what gets its SIGTERM is `ray start --block`."""
    agent, agent_grpc, env_agent = free_ports(3)
    command = [Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats"]
    command += ["--address", address, "--node-ip-address", "127.0.0.1", "--num-cpus", "1"]
    command += ["--resources", '{"accelerator": 1}', "--object-store-memory", "100000000"]
    command += ["--dashboard-agent-listen-port", str(agent), "--dashboard-agent-grpc-port", str(agent_grpc)]
    command += ["--runtime-env-agent-port", str(env_agent)]
    with log.open("w") as said:
        node = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), node)
        yield node
    finally:
        kill_tree(node)


def test_a_node_that_gets_sigterm_ends_when_a_slow_store_has_the_checkpoint_from_which_the_run_goes_on(
    s3_bucket: str, nodes: Cluster, catalog: str, tmp_path: Path
) -> None:
    out, said = f"{s3_bucket}/come-and-go/run", tmp_path / "said"
    command = [*TILESTREAM, "train", "debug", "--data.catalog", catalog, "--data.mpp", "{0.5: 1}", *SMALL]
    command += ["--run.out", out, "--train.steps", "100000", "--train.batch", str(BATCH), "--train.log_every", "1"]
    command += ["--mask.group_size", "2", "--augment.num_local", "1", "--train.checkpoint_every", "100000"]
    command += ["--train.ranks", "2", "--train.rank_resources.accelerator", "1", "--data.reader_labels.role", "reader"]

    def shown() -> int:
        """The last step that was shown."""
        return max(map(int, re.findall(r"^train: (\d+)/100,000 steps", said.read_text(), re.MULTILINE)), default=0)

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(SlowStore(os.environ["AWS_ENDPOINT_URL"]))
        # As in deploy/, but the driver and its head reach the store at its own speed: ranks alone write checkpoints.
        environment = os.environ | {"AWS_ENDPOINT_URL": store.url, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "540"}
        going, _ = (stack.enter_context(pod(nodes.address, environment, tmp_path / f"pod{n}")) for n in range(2))
        with said.open("w") as stderr:
            running = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": nodes.address}, stderr=stderr)
        stack.callback(kill_tree, running)
        wait_for(shown, running)
        going.send_signal(signal.SIGTERM)
        wait_for(lambda: going.poll() is not None, running)
        (saved,) = checkpoints.steps_of(out)
        checkpoints.verify(checkpoints.checkpoint_uri(out, saved))
        assert store.held_s > 30, "longer than Ray itself would have left it"
        assert shown() <= saved, "steps that were lost with the node"

        gone, store.write_s = time.time(), 0.0
        stack.enter_context(pod(nodes.address, environment, tmp_path / "another"))
        wait_for(lambda: shown() > saved, running)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=240) == 128 + signal.SIGTERM, said.read_text()
    rows = storage.read_table(f"{out}/metrics.parquet").to_pylist()
    steps = max(checkpoints.steps_of(out))
    assert [(row["first_index"], row["next_index"]) for row in rows] == [
        (BATCH * step, BATCH * step + BATCH) for step in range(steps)
    ]
    assert [row["time"] < gone for row in rows] == [True] * saved + [False] * (steps - saved)
