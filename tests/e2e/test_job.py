"""A cluster of several Ray nodes with a job server and token authentication, as `ray job submit` meets one."""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from streaming import storage
from streaming.catalog import Catalog
from streaming.delivery.exported_metrics import METRICS
from tests.conftest import write_catalog
from tests.processes import SMALL, free_ports, kill_tree
from tests.tiff_files import STAGED, write_tiff
from trainer.run import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.long]
# All but the sum and count that a histogram has beside its buckets; Ray puts `ray_` before. A counter of what did not
# happen shows nothing: of slides on a disk, no read is sent again.
EXPORTED = {f"ray_{name}_bucket" if metric.bounds else f"ray_{name}" for name, metric in METRICS.items()}
EXPORTED -= {"ray_tilestream_fetch_retries_total", "ray_tilestream_validation_loss"}
EXPORTED -= {"ray_tilestream_fetch_throttled_total", "ray_tilestream_fetch_held_seconds_total"}
ROOT = Path(__file__).parents[2]
# As deploy/README.md has it.
LOOP = """
for name in {}; do
    ray job submit --submission-id $name {} -- "$@"
    until said=$(ray job status $name | grep -Eom1 'succeeded|stopped|failed'); do sleep 5; done
    [ "$said" = failed ] || break
done
"""
RAY = Path(sys.executable).parent / "ray"


@dataclass(frozen=True)
class Nodes:
    """The cluster: its job server, its nodes' agents and metrics, and an environment that holds the token."""

    dashboard: str
    agents: Sequence[str]
    metrics: Sequence[str]
    processes: Sequence[subprocess.Popen[bytes]]
    environment: dict[str, str]

    def ray(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RAY, *arguments], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )

    def submit(self, name: str, *command: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        options = ["--address", self.dashboard, "--working-dir", ".", "--submission-id", name]
        return self.ray("job", "submit", *options, *([] if wait else ["--no-wait"]), "--", *command)

    def ask(self, path: str, token: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {token or self.environment['RAY_AUTH_TOKEN']}"} if token != "" else {}
        with urllib.request.urlopen(urllib.request.Request(self.dashboard + path, headers=headers), timeout=30) as got:
            return json.loads(got.read())


def start_node(environment: dict[str, str], log: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], str, str]:
    """The process, the address of the node's agent, and that of its metrics."""
    metrics, agent, agent_grpc, env_agent = free_ports(4)
    command = [RAY, "start", "--block", "--disable-usage-stats", "--object-store-memory", "150000000"]
    command += ["--metrics-export-port", str(metrics), "--dashboard-agent-listen-port", str(agent)]
    command += ["--dashboard-agent-grpc-port", str(agent_grpc), "--runtime-env-agent-port", str(env_agent)]
    with log.open("w") as printed:
        node = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=printed, stderr=printed, start_new_session=True
        )
    return node, f"http://127.0.0.1:{agent}", f"http://127.0.0.1:{metrics}/metrics"


@pytest.fixture(scope="module")
def nodes(s3_bucket: str) -> Iterator[Nodes]:  # the bucket first: nodes take over the environment that reaches it
    # Ray's sockets lie below its folder, and a socket's path may have 107 characters.
    folder = Path("/tmp") / f"ts-{secrets.token_hex(3)}"
    folder.mkdir()
    port, dashboard, client = free_ports(3)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_agent_register_timeout_ms": "120000",
        "RAY_TMPDIR": str(folder),
    }
    head = ["--head", "--num-cpus", "0", "--port", str(port), "--ray-client-server-port", str(client)]
    head += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--temp-dir", str(folder)]
    reader = ["--num-cpus", "2", "--labels", "tilestream-role=reader", "--resources", '{"driver": 1}']
    trainer = ["--num-cpus", "2", "--labels", "tilestream-role=trainer", "--resources", '{"accelerator": 2}']
    started: list[tuple[subprocess.Popen[bytes], str, str]] = []
    try:
        for kind in (head, reader, reader, trainer):
            address = ["--address", f"127.0.0.1:{port}"] if started else []
            # Ray gives a node 30 s to start, whatever is set: too few on a loaded machine, hence tries, one by one.
            for attempt in range(5):
                log = folder / f"node{len(started)}-{attempt}.log"
                node, agent, metrics = start_node(environment, log, *address, *kind)
                if answers(f"{agent}/api/local_raylet_healthz", node, log):
                    break
            started.append((node, agent, metrics))
        assert answers(f"http://127.0.0.1:{dashboard}/api/gcs_healthz", started[0][0], folder / "node0-0.log")
        processes, agents, endpoints = zip(*started, strict=True)
        yield Nodes(f"http://127.0.0.1:{dashboard}", agents, endpoints, processes, environment)
    finally:
        for node, _, _ in started:
            kill_tree(node)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def mixed_catalog(slides: list[Path], s3_bucket: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Slides of which one is staged: it lies on S3, and only OpenSlide reads it."""
    folder, uri = tmp_path_factory.mktemp("mixed"), f"{s3_bucket}/job/staged.svs"
    storage.write_bytes(uri, write_tiff(STAGED, folder / "staged.svs").read_bytes())
    write_catalog(folder, [*slides, uri], 0.5)
    backends = Catalog.load(str(folder)).table["backend"].to_pylist()
    assert sorted(backends) == [*["blocks"] * len(slides), "openslide"]
    return str(folder)


def answers(address: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Waits for a node and its server; False if the node gave up, which it may after its server answered."""
    deadline = time.monotonic() + 180
    while process.poll() is None:
        if "Ray runtime started" in log.read_text():
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=5).close()
                return True
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)
    return False


def test_nobody_submits_or_looks_without_the_token_but_probes_get_their_answer(nodes: Nodes) -> None:
    for token, status in (("", 401), ("wrong" * 8, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            nodes.ask("/api/jobs/", token)
        assert refused.value.code == status
        refused.value.close()
    assert nodes.ask("/api/jobs/") == []
    urllib.request.urlopen(f"{nodes.dashboard}/api/gcs_healthz", timeout=30).close()
    for agent in nodes.agents:
        urllib.request.urlopen(f"{agent}/api/local_raylet_healthz", timeout=30).close()


def test_a_job_runs_the_code_that_was_shipped_and_ends_with_the_runs_status(nodes: Nodes) -> None:
    failed = nodes.submit("bad-input", "tilestream", "train", "no-such-preset")
    assert failed.returncode == 1
    assert "tilestream: no-such-preset: neither a file nor a preset" in failed.stdout
    assert nodes.ask("/api/jobs/bad-input")["driver_exit_code"] == 2
    (ROOT / "where_am_i.py").write_text("import streaming, os\nprint(streaming.__file__, sorted(os.listdir()))\n")
    try:
        shipped = nodes.submit("where", "python", "where_am_i.py")
    finally:
        (ROOT / "where_am_i.py").unlink()
    assert shipped.returncode == 0, shipped.stdout + shipped.stderr
    assert re.search(r"working_dir_files/\S+/streaming/__init__.py", shipped.stdout)
    listed = re.search(r"\[('.*')\]", shipped.stdout)
    assert listed is not None
    assert not {"'tests'", "'benchmarks'", "'.venv'", "'.git'"} & set(listed[1].split(", ")), "code goes, data stays"


def test_a_job_whose_driver_is_killed_is_submitted_again_by_a_loop_and_goes_on_where_it_was(
    nodes: Nodes, mixed_catalog: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "run"
    command = ["tilestream", "train", "debug", "--data.catalog", mixed_catalog, "--run.out", str(out)]
    command += ["--train.steps", "5000", "--train.batch", "8", "--optim.warmup_steps", "2", "--data.tile_size", "64"]
    command += ["--train.ranks", "2", "--train.checkpoint_every", "2", "--train.log_every", "1"]
    command += ["--train.rank_resources.accelerator", "1", "--train.rank_labels.tilestream-role", "trainer"]
    # Two readers of one cache: the second one finds the staged copy there.
    command += ["--data.readers", "[2,2]", "--data.min_tissue", "0.01", "--data.staging", str(tmp_path / "staging")]
    command += ["--data.reader_labels.tilestream-role", "reader"]
    loop = LOOP.format("first again", "--working-dir .")
    environment = nodes.environment | {"RAY_API_SERVER_ADDRESS": nodes.dashboard}
    submitting = subprocess.Popen(
        ["bash", "-c", loop, "submit", *command], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    request.addfinalizer(partial(end, nodes, submitting, "first", "again"))
    until(lambda: is_known(nodes, "first"), nodes)
    until(lambda: bool(checkpoints.steps_of(str(out))), nodes, "first")
    assert_placed_by_label(nodes)
    until(lambda: scraped(nodes) >= EXPORTED, nodes, "first")
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(out) in command and "submit" not in command:
            process.kill()
    until(lambda: nodes.ask("/api/jobs/first")["status"] == "FAILED", nodes)
    reached, killed_at = checkpoints.steps_of(str(out))[-1], time.time()

    until(lambda: is_known(nodes, "again"), nodes)
    until(lambda: checkpoints.steps_of(str(out))[-1] >= reached + 6, nodes, "again")
    progress = nodes.ask("/api/jobs/again/logs")["logs"]
    assert re.search(r"^train: \d+/5,000 steps  \d+ tiles/s", progress, re.MULTILINE), "progress as lines"
    assert nodes.ray("job", "stop", "--address", nodes.dashboard, "again").returncode == 0
    until(lambda: nodes.ask("/api/jobs/again")["status"] == "STOPPED", nodes)
    assert submitting.wait(timeout=60) == 0, "who stops it ends the loop, too"
    steps = checkpoints.steps_of(str(out))[-1]
    rows = storage.read_table(f"{out}/metrics.parquet").to_pylist()[:steps]
    assert [(row["first_index"], row["next_index"]) for row in rows] == [(8 * s, 8 * s + 8) for s in range(steps)]
    assert [row["time"] < killed_at for row in rows] == [True] * reached + [False] * (steps - reached)


def test_a_job_whose_drivers_node_is_lost_is_submitted_again_and_goes_on_from_another_node(
    nodes: Nodes, catalog: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "run"
    command = ["tilestream", "train", "debug", "--data.catalog", catalog, "--run.out", str(out), *SMALL]
    command += ["--data.mpp", "{0.5: 1}", "--train.steps", "5000", "--train.batch", "8"]
    command += ["--train.checkpoint_every", "2"]
    command += ["--train.rank_labels.tilestream-role", "trainer", "--data.readers", "[1,2]"]
    command += ["--data.reader_labels.tilestream-role", "reader", "--train.log_every", "1"]
    # Drivers run on the head unless they are asked elsewhere.
    loop = LOOP.format("one other", """--working-dir . --entrypoint-resources '{"driver": 1}'""")
    environment = nodes.environment | {"RAY_API_SERVER_ADDRESS": nodes.dashboard}
    submitting = subprocess.Popen(
        ["bash", "-c", loop, "submit", *command], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    request.addfinalizer(partial(end, nodes, submitting, "one", "other"))
    until(lambda: is_known(nodes, "one"), nodes)
    until(lambda: bool(checkpoints.steps_of(str(out))), nodes, "one")
    where = node_of(nodes, "one")
    kill_tree(nodes.processes[where])
    until(lambda: nodes.ask("/api/jobs/one")["status"] == "FAILED", nodes)
    reached, killed_at = checkpoints.steps_of(str(out))[-1], time.time()

    until(lambda: is_known(nodes, "other"), nodes)
    until(lambda: checkpoints.steps_of(str(out))[-1] >= reached + 4, nodes, "other")
    assert node_of(nodes, "other") != where
    assert nodes.ray("job", "stop", "--address", nodes.dashboard, "other").returncode == 0
    until(lambda: nodes.ask("/api/jobs/other")["status"] == "STOPPED", nodes)
    steps = checkpoints.steps_of(str(out))[-1]
    rows = storage.read_table(f"{out}/metrics.parquet").to_pylist()[:steps]
    assert [(row["first_index"], row["next_index"]) for row in rows] == [(8 * s, 8 * s + 8) for s in range(steps)]
    assert [row["time"] < killed_at for row in rows] == [True] * reached + [False] * (steps - reached)


def node_of(nodes: Nodes, job: str) -> int:
    """The node that a job's driver runs on, by its agent's port: Ray tells the machine's own address."""
    port = nodes.ask(f"/api/jobs/{job}")["driver_agent_http_address"].rpartition(":")[2]
    return [agent.rpartition(":")[2] for agent in nodes.agents].index(port)


def end(nodes: Nodes, submitting: subprocess.Popen[bytes], *jobs: str) -> None:
    """Ends a loop and its jobs, wherever a test failed: they hold what the next one needs."""
    kill_tree(submitting)
    for job in jobs:
        nodes.ray("job", "stop", "--address", nodes.dashboard, job)


def is_known(nodes: Nodes, job: str) -> bool:
    return job in [each["submission_id"] for each in nodes.ask("/api/jobs/")]


def until(holds: Callable[[], bool], nodes: Nodes, running: str | None = None) -> None:
    """Waits; a job that must run meanwhile is watched."""
    deadline = time.monotonic() + 600
    while not holds():
        if running:
            job = nodes.ask(f"/api/jobs/{running}")
            log = "" if job["status"] in ("PENDING", "RUNNING") else nodes.ask(f"/api/jobs/{running}/logs")["logs"]
            assert not log, log
        assert time.monotonic() < deadline, "not within ten minutes"
        time.sleep(0.5)


def assert_placed_by_label(nodes: Nodes) -> None:
    """Readers are on nodes of theirs, ranks on the one with accelerators, and the head has no work."""
    listed = nodes.ask("/api/v0/nodes?limit=100&detail=1")["data"]["result"]["result"]
    roles = {node["node_id"]: node["labels"].get("tilestream-role", "head") for node in listed}
    assert sorted(roles.values()) == ["head", "reader", "reader", "trainer"]
    actors = nodes.ask("/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
    # Those that have ended, too: with tiles this small all of a segment may be read before its first checkpoint.
    where = {(a["class_name"], roles[a["node_id"]]) for a in actors if a["node_id"] in roles}
    placed = {name: {role for other, role in where if other == name} for name, _ in where}
    assert placed["RayTrainWorker"] == {"trainer"}, placed
    (readers,) = [role for name, role in placed.items() if "ReaderActor" in name]
    assert readers == {"reader"}, placed


def scraped(nodes: Nodes) -> set[str]:
    """Names of the samples that the nodes' endpoints show."""
    found: set[str] = set()
    for endpoint in nodes.metrics:
        with contextlib.suppress(OSError), urllib.request.urlopen(endpoint, timeout=30) as answer:
            found |= set(re.findall(r"^(ray_tilestream_\w+)", answer.read().decode(), re.MULTILINE))
    return found
