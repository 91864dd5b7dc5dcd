"""Secrets given as options go the whole road, against a real cluster, and are looked for in all that it leaves."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import boto3
import pytest

from tests.faulty_server import FaultyServer
from tests.processes import SMALL, TILESTREAM, free_ports, kill_tree, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]

MARK = "5ecret"
SIGNED = f"X-Amz-Credential={MARK}&X-Amz-Signature={MARK}"
RAY = Path(sys.executable).parent / "ray"
ASKED = ("jobs/", "v0/actors?limit=1000&detail=1", "v0/tasks?limit=1000&detail=1", "v0/workers?detail=1")
ASKED += ("v0/runtime_envs?detail=1", "v0/cluster_events", "v0/logs?node_ip=127.0.0.1", "v0/objects?detail=1")
ASKED += ("data/datasets/{job}", "train/v2/runs/v1", "v0/placement_groups?detail=1")


@dataclass
class Road:
    """Where commands run, and all that they said."""

    folder: Path
    """their working folder, home and temporary folder are below it, and Ray's session"""
    environment: Mapping[str, str]
    dashboard: str
    options: Mapping[str, str]
    """of the storage"""
    told: dict[str, str] = field(default_factory=dict)
    """by command line"""

    @property
    def flags(self) -> list[str]:
        return [part for name, value in self.options.items() for part in ("--storage", f"{name}={value}")]

    def run(self, *arguments: str, status: int = 0) -> str:
        said = self.folder / "said"
        with said.open("w") as file:  # a pipe would be held open by Ray's processes
            found = subprocess.run(
                [*TILESTREAM, *arguments],
                env={**self.environment},
                cwd=self.folder / "work",
                stdout=file,
                stderr=file,
                timeout=1200,
            )
        text = self.told[" ".join(arguments)] = said.read_text()
        said.unlink()
        assert found.returncode == status, (arguments, text)
        return text


class Guarded(FaultyServer):
    """Serves nobody without the signature."""

    def answer(
        self, command: str, path: str, headers: Mapping[str, str], content: bytes
    ) -> tuple[int, Mapping[str, str], bytes]:
        if not path.endswith(f"?{SIGNED}"):
            return 403, {"Content-Length": "0"}, b""
        return super().answer(command, path, headers, content)


def everything(road: Road) -> Iterator[tuple[str, bytes]]:
    """All that was written or said: files here, objects there, what Ray's dashboard tells, what commands print."""
    yield from ((command, text.encode()) for command, text in road.told.items())
    for path in road.folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                yield str(path), path.read_bytes()
    client = boto3.client("s3", region_name="us-east-1")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="tiles", Prefix="secret/"):
        for entry in page.get("Contents", []):
            yield f"s3://tiles/{entry['Key']}", client.get_object(Bucket="tiles", Key=entry["Key"])["Body"].read()
    for path in ASKED:
        asked = f"{road.dashboard}/api/{path.format(job='01000000')}"
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(asked, timeout=30) as answer:
            yield path, answer.read()


def assert_no_secret(road: Road) -> None:
    found = [(where, text) for where, text in everything(road) if MARK.encode() in text]
    shown = [(where, text[max(0, at - 300) : at + 100]) for where, text in found for at in [text.find(MARK.encode())]]
    assert not shown


@pytest.fixture
def road(s3_slides: str, tmp_path: Path) -> Iterator[Road]:
    # Ray's sockets lie below its folder, and a socket's path may have 107 characters.
    folder = Path("/tmp") / f"ts-{secrets.token_hex(3)}"
    for name in ("ray", "work", "home", "tmp"):
        (folder / name).mkdir(parents=True)
    port, dashboard, client, metrics, agent, agent_grpc, env_agent = free_ports(7)
    address = f"http://127.0.0.1:{dashboard}"
    kept = ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")
    environment = {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(folder / "ray"),
        "RAY_agent_register_timeout_ms": "120000",
        # Events of tasks, actors, datasets and trainings go into files.
        "RAY_enable_export_api_write": "1",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    }
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--object-store-memory", "200000000"]
    command += ["--num-cpus", "8", "--port", str(port), "--ray-client-server-port", str(client)]
    command += ["--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--metrics-export-port", str(metrics), "--dashboard-agent-listen-port", str(agent)]
    command += ["--dashboard-agent-grpc-port", str(agent_grpc), "--runtime-env-agent-port", str(env_agent)]
    options = {
        "key": f"{MARK}-key",
        "secret": f"{MARK}-secret",
        "token": f"{MARK}-token",
        "query": SIGNED,
        "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
        "region": "us-east-1",
    }
    heads = list[subprocess.Popen[bytes]]()
    try:
        # Ray gives a node 30 s to start, whatever is set: too few on a loaded machine, hence tries.
        for attempt in range(5):
            log = folder / f"head{attempt}.log"
            with log.open("w") as printed:
                pipes = {"stdout": printed, "stderr": printed}
                heads.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
            started = partial(lambda log: heads[-1].poll() is not None or "Ray runtime started" in log.read_text(), log)
            wait_for(started, timeout_s=180)
            if heads[-1].poll() is None:
                break
        yield Road(folder, {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}, address, options)
    finally:
        for head in heads:
            kill_tree(head)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_secret_is_found_in_nothing_that_the_whole_road_leaves(road: Road, slides: list[Path]) -> None:
    base, catalog, run = "s3://tiles/secret", "s3://tiles/secret/catalog", "s3://tiles/secret/run"
    small = ["--data.mpp", "{0.5: 1, 1.0: 1}", *SMALL, "--train.batch", "8", "--optim.warmup_steps", "1"]
    small += ["--train.steps", "2", "--train.checkpoint_every", "1", "--train.log_every", "1"]
    (road.folder / "work" / "tiles.csv").write_text(
        "path,label,x,y,mpp,size\n"
        + "".join(
            f"s3://tiles/slides/{path.name},{'ab'[j % 2]},{256 * j},256,0.5,64\n" for path in slides for j in range(6)
        )
    )
    with Guarded(slides[0].read_bytes()) as server:
        web = f"{server.url}/web.svs"
        road.run("catalog", "s3://tiles/slides", web, "--out", catalog, "--preview", *road.flags)
        streamed = ["stream", catalog, "--steps", "0:2", "--batch", "8", "--size", "64", "--mpp", "0.5,1.0"]
        road.run(*streamed, "--log", f"{base}/stream", "--mosaic", f"{base}/tiles.png", *road.flags)
        mirror = f"s3://tiles/slides?secret={MARK}"
        stores = ["--data.mirrors", json.dumps({"s3://tiles/slides": mirror})]
        stores += ["--data.storage_options", json.dumps(dict(road.options))]
        trained = ["train", "debug", "--data.catalog", catalog, "--run.out", run, *small, *stores]
        road.run(*trained, "--print_config")
        road.run(*trained)
        road.run(
            "embed",
            run,
            "s3://tiles/slides",
            web,
            "--out",
            f"{base}/embeddings",
            "--mpp",
            "1.0",
            "--size",
            "64",
            *road.flags,
        )
        road.run("evaluate", run, "tiles.csv", "--task", "knn", "--out", f"{base}/scores", *road.flags)
        road.run("export", run, "--out", f"{base}/model", *road.flags)
        road.run("picture", "map", f"{base}/embeddings", "--out", f"{base}/map.html", *road.flags)
        road.run(
            "report",
            run,
            "--scores",
            f"{base}/scores",
            "--embeddings",
            f"{base}/embeddings",
            "--out",
            "report.html",
            *road.flags,
        )
        road.run("replay", run, "--step", "2", "--out", f"{base}/replay", *road.flags)
        road.run(*trained, "--dry-run")
        road.run("doctor", "--catalog", catalog, *road.flags)
        # What ends in an error is told, and listed, without them.
        road.run("embed", run, f"{web}?{SIGNED}", "--out", "e", "--verbose", *road.flags, status=2)
        server.mood, server.befalls_all = lambda n: "403", True
        road.run("embed", run, web, "--out", f"{base}/none", "--verbose", *road.flags, status=2)
        road.run("catalog", web, "--out", f"{base}/none", "--recheck", "--verbose", *road.flags, status=2)
        failing = ("--max-failed-share", "0", "--log", f"{base}/failed", "--verbose")
        road.run(*streamed, *failing, *road.flags, status=2)
        assert_no_secret(road)
