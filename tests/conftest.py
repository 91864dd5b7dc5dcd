import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from streaming.catalog import build
from streaming.catalog.given import Given
from streaming.catalog.index_packs import save_indexes
from streaming.catalog.inspection import inspect, inspect_named
from streaming.catalog.named import Named
from streaming.catalog.sources import find_slides
from streaming.catalog.writing import merge, part_of, write
from streaming.storage.staging import Staging
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from streaming.vision import cv2

# What a machine can't be given by an installation: a GPU, other people's slides and environments, a right.
_MAY_BE_SKIPPED = ("GPU", "real slide", "wsidata", "_PYTHON names no Python", "IPP", "may mount a disk")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In continuous integration a test that is skipped for want of a program fails the run: it would check nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("TILESTREAM_NO_SKIPS") != "1" or reporter is None:
        return  # on request, and with several processes in the one that reports
    reasons = {str(report.longrepr[2]) for report in reporter.stats.get("skipped", ())}
    if missing := sorted(reason for reason in reasons if not any(why in reason for why in _MAY_BE_SKIPPED)):
        sys.stderr.write(f"\nskipped, which TILESTREAM_NO_SKIPS=1 forbids: {'; '.join(missing)}\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    paths = [folder / f"patient{patient}.svs" for patient in range(3)]
    for patient, path in enumerate(paths):
        write_slide(SyntheticSlide(width=2048, height=1536, patient=patient, downsamples=(1, 4)), path)
    return paths


def write_catalog(
    folder: Path | str, slides: Sequence[Path | str], mpp: float | None = None, staging: Staging | None = None
) -> str:
    infos = find_slides(list(map(str, slides)), None)
    found = save_indexes(
        [inspect(info, Given(mpp=mpp), None, staging or Staging()) for info in infos], str(folder), None
    )
    write(str(folder), *merge([part_of(found)], None), None)
    return str(folder)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slides are looked at here instead of by Ray, which other tests start."""

    def here(slides: Sequence[tuple[Named, Given]], options: Any, staging: Staging, out: str) -> Iterator[Any]:
        return iter(save_indexes([inspect_named(*slide, options, staging) for slide in slides], out, options))

    monkeypatch.setattr(build.cluster, "connect", lambda **_: None)
    monkeypatch.setattr(build, "inspect_all", here)


@pytest.fixture(scope="session")
def catalog(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalog(tmp_path_factory.mktemp("catalog"), slides)


@pytest.fixture(scope="session")
def other_catalog(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalog(tmp_path_factory.mktemp("other_catalog"), slides[:2])


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy images of two colours by class and patient: red/p0/0.png …"""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, colour in (("red", (40, 40, 200)), ("blue", (200, 40, 40))):
        for patient in range(4):
            place = folder / name / f"p{patient}"
            place.mkdir(parents=True)
            for i in range(6):
                noise = random.integers(-30, 30, (32, 32, 3))
                cv2.imwrite(str(place / f"{i}.png"), np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # or a failed test prints every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="tiles")
    yield "s3://tiles"
    server.stop()
    os.environ.clear()
    os.environ |= before


@pytest.fixture(scope="session")
def s3_slides(s3_bucket: str, slides: list[Path]) -> str:
    client = boto3.client("s3", region_name="us-east-1")
    real = Path(__file__).parents[1].parent / "shared/data/CMU-1-crop.svs"
    for path in [*slides, *([real] if real.exists() else [])]:
        client.upload_file(str(path), "tiles", f"slides/{path.name}")
    return f"{s3_bucket}/slides"


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of its own of so many bytes; skips where that is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(nbytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", disk]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a disk")
        return disk

    yield mount
    # Lazily: Ray's processes may still be on their way out.
    subprocess.run(["umount", "--lazy", disk], capture_output=True)
