import json
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import ray
from ray.cluster_utils import Cluster

from streaming import cluster
from streaming.operate import doctor
from streaming.operate.doctor import Finding, examine
from streaming.storage.clock import clock_skew
from tests.conftest import write_catalog
from trainer.cli import main


def findings(catalog: str | None = None) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(catalog, {}, ray=False)}


def test_a_machine_with_enough_of_everything_needs_no_mending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_000_000, 1_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    found = findings()
    checks = [
        "python",
        "libraries",
        "gpu",
        "cpus",
        "memory",
        "/dev/shm",
        "open files",
        "staging",
        "home",
        "ray's files",
    ]
    assert list(found) == checks
    assert {finding.state for check, finding in found.items() if check != "gpu"} == {"ok"}


def test_what_is_scarce_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 2048))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    found = findings()
    assert found["open files"] == Finding(
        check="open files", state="mend", what="1,024 (at most 2,048)", remedy=found["open files"].remedy
    )
    assert "ulimit -n 65536" in found["open files"].remedy
    assert found["/dev/shm"].state == "mend"
    assert "--shm-size" in found["/dev/shm"].remedy
    assert "TILESTREAM_STAGING" in found["staging"].remedy


def test_a_cache_that_others_may_change_is_to_be_mended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("TILESTREAM_STAGING", str(tmp_path))
    found = findings()["staging"]
    assert (found.state, "others may write into it" in found.what) == ("mend", True)
    assert "TILESTREAM_STAGING" in found.remedy


def test_what_ray_would_stumble_over_is_seen_before_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "_ANSWERS_S", 0.1)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("job" * 30)))
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found = findings()
    assert found["cpus"].what in ("1, by SLURM_CPUS_ON_NODE", "1, by the affinity", "1, by the cgroup")
    assert (found["home"].state, "HOME" in found["home"].remedy) == ("note", True)
    assert found["ray's files"].what.startswith(f"{tmp_path / ('job' * 30)}, by the short link /")
    assert found["ray address"] == Finding(
        check="ray address",
        state="mend",
        what="RAY_ADDRESS=127.0.0.1:1: no Ray answers there (Connection refused)",
        remedy="is the cluster up? For a Ray on this machine unset it",
    )
    monkeypatch.setenv("RAY_TMPDIR", "/proc/no")
    assert findings()["ray's files"].state == "mend"


def test_a_library_out_of_its_bounds_is_named_with_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.59.0" if name == "ray" else real(name))
    found = findings()["libraries"]
    assert found.state == "mend"
    assert found.what.startswith("ray 2.59.0 (wanted ")


def test_a_gpu_that_torch_cannot_use_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert findings()["gpu"].state == "mend"
    assert "requirements-cuda.lock" in findings()["gpu"].remedy
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert findings()["gpu"] == Finding(check="gpu", state="ok", what="GPU 0: NVIDIA H100")


def test_a_gpu_whose_driver_is_mounted_where_nobody_looks_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_DEVICES", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert findings()["gpu"].state == "note", "a machine without a GPU"
    for name in ("nvidia0", "nvidiactl"):
        (tmp_path / name).touch()
    found = findings()["gpu"]
    assert (found.state, "LD_LIBRARY_PATH" in found.remedy) == ("mend", True)
    assert found.what.startswith("nvidia0 in ")


@pytest.mark.slow
def test_a_node_of_each_kind_is_examined_in_a_cluster(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    ray.shutdown()
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        # Full of work, as in a run; the other kind's cache is one that others may change.
        for _ in range(2):
            running.add_node(num_cpus=0, labels={"role": "reader"}, object_store_memory=100 * 2**20)
        running.add_node(
            num_cpus=0,
            num_gpus=2,
            labels={"role": "trainer"},
            object_store_memory=100 * 2**20,
            env_vars={"TILESTREAM_STAGING": str(shared)},
        )
        monkeypatch.setenv("RAY_ADDRESS", running.address)
        found = list(examine(catalog, {}))
    finally:
        ray.shutdown()
        running.shutdown()
    nodes = [finding for finding in found if finding.check == "node" or finding.what.startswith("on ")]
    told = {finding.what.split(" (")[1].split(")")[0]: finding for finding in nodes if finding.check == "node"}
    assert list(told) == ["role=reader, 0 GPUs; one of 2", "role=trainer, 2 GPUs"]
    wrong = [(finding.check, finding.state) for finding in nodes if finding.state == "mend"]
    assert wrong == [("staging", "mend"), ("gpu", "mend")], nodes
    (staging,) = (finding for finding in nodes if (finding.check, finding.state) == ("staging", "mend"))
    assert f"{shared}: others may write into it" in staging.what


@pytest.fixture
def s3_catalog(s3_slides: str, s3_bucket: str, slides: list[Path], tmp_path: Path) -> str:
    """A catalog of slides on S3 of which one is a copy of its own, to be broken."""
    client = boto3.client("s3", region_name="us-east-1")
    for path in slides[:2]:
        client.upload_file(str(path), "tiles", f"doctor/{path.name}")
    rows = [f"{s3_bucket}/doctor/{path.name}" for path in slides[:2]]
    return write_catalog(tmp_path / "catalog", rows)


def test_storage_clock_and_tiles_of_a_catalog_are_tried(s3_catalog: str) -> None:
    found = findings(s3_catalog)
    assert [found[check].state for check in ("clock", "tiles")] == ["ok", "ok"], found
    assert found["storage"].what.startswith("8 GETs of 64 KiB: median ")


def test_slides_that_are_gone_or_replaced_are_named(s3_catalog: str, s3_bucket: str) -> None:
    client = boto3.client("s3", region_name="us-east-1")
    for number in range(2):
        client.put_object(Bucket="tiles", Key=f"doctor/patient{number}.svs", Body=b"no slide")
    found = findings(s3_catalog)
    assert found["tiles"].state == "mend"
    assert f"{s3_bucket}/doctor/patient" in found["tiles"].what
    for number in range(2):
        client.delete_object(Bucket="tiles", Key=f"doctor/patient{number}.svs")
    assert findings(s3_catalog)["storage"].state == "mend"


@pytest.fixture
def slow_clock() -> Iterator[Callable[[float], str]]:
    """A server whose clock is some seconds behind."""
    behind = 0.0

    class Handler(BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            import time

            return formatdate(time.time() - behind, usegmt=True)

        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def at(seconds: float) -> str:
        nonlocal behind
        behind = seconds
        return f"http://127.0.0.1:{server.server_port}/bucket/slide.svs"

    yield at
    server.shutdown()
    server.server_close()


def test_the_clock_is_compared_with_the_storages_even_where_it_refuses(slow_clock: Callable[[float], str]) -> None:
    assert abs(clock_skew(slow_clock(0))) < 5
    assert clock_skew(slow_clock(1000)) == pytest.approx(1000, abs=5)
    assert clock_skew(slow_clock(-1000)) == pytest.approx(-1000, abs=5)
    (finding,) = doctor._clock(slow_clock(1000), {})
    assert finding.state == "mend"
    assert "ahead of the storage's" in finding.what


def test_the_command_exits_1_with_something_to_mend_and_2_without_the_catalog(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_000_000, 1_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    assert main(["doctor", "--no-ray"]) == 0
    assert "ok    python " in capsys.readouterr().out
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 2048))
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--no-ray", "--json"])
    assert left.value.code == 1
    printed = json.loads(capsys.readouterr().out)
    assert [entry["check"] for entry in printed if entry["state"] == "mend"] == ["open files"]
    assert main(["doctor", "--no-ray", "--catalog", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
