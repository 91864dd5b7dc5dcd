"""The batch scripts, in a SLURM of several nodes on this machine."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.pages import ROOT
from tests.processes import wait_for
from tests.slurm import missing, slurm

CONFIG = (
    *("debug", "--data.catalog", "catalog", "--data.mpp", "{0.5: 1}", "--data.readers", "[1,1]", "--train.batch", "4"),
    *("--train.checkpoint_every", "5", "--optim.warmup_steps", "1", "--augment.num_local", "1"),
    *("--model.head_hidden", "16", "--model.num_prototypes", "32"),
)


@pytest.fixture
def scratch(catalog: str) -> Iterator[Path]:
    """A folder as a user's clone looks to the scripts, whose name leaves room for those of sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "deploy").symlink_to(ROOT / "deploy")
        shutil.copytree(catalog, folder / "catalog")
        (folder / "slurm").mkdir()
        yield folder


def steps_done(log: Path) -> int:
    """The last step that a job's log tells of."""
    found = re.findall(r"^train: ([\d,]+)/", log.read_text(), re.MULTILINE) if log.exists() else []
    return int(found[-1].replace(",", "")) if found else 0


def shown(job: str, env: Mapping[str, str]) -> dict[str, str]:
    """What SLURM tells of a job."""
    said = subprocess.run(["scontrol", "show", "job", job], env=env, capture_output=True, text=True)
    words = [word.split("=", 1) for word in said.stdout.split() if "=" in word]
    return dict(reversed(words))  # of a heterogeneous job the first part's


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "options"),
    [("one-node", ()), ("many-nodes", ("--partition=gpu", "--nodes=2", ":", "--partition=cpu", "--nodes=1"))],
)
@pytest.mark.timeout(1500)
def test_a_job_whose_time_is_up_saves_and_goes_on_by_itself(
    script: str, options: tuple[str, ...], scratch: Path
) -> None:
    if reason := missing():
        pytest.skip(reason)
    log = scratch / "tilestream-1.log"
    with slurm(scratch / "slurm", {"gpu": ["g1", "g2"], "cpu": ["c1"]}, cpus=2) as env:
        command = ["sbatch", "--parsable", *options, f"deploy/slurm/{script}.sh", *CONFIG]
        command += ["--run.out", str(scratch / "run"), "--train.steps", "60"]
        done = subprocess.run(command, env=env, cwd=scratch, capture_output=True, text=True)
        assert done.stdout.split(";")[0].strip() == "1", done.stderr
        wait_for(lambda: steps_done(log) >= 5 or shown("1", env).get("JobState") == "FAILED")
        assert shown("1", env).get("JobState") == "RUNNING", log.read_text()
        # What SLURM does before the time is up.
        subprocess.run(["scancel", "--batch", "--signal=USR1", "1"], env=env, check=True)
        wait_for(lambda: shown("1", env).get("Restarts") == "1")
        # It would wait for two minutes.
        wait_for(lambda: shown("1", env).get("JobState") == "PENDING", timeout_s=120)
        subprocess.run(["scontrol", "update", "JobId=1", "StartTime=now"], env=env, check=True)
        wait_for(lambda: shown("1", env).get("JobState") in ("COMPLETED", "FAILED"), timeout_s=900)
        assert shown("1", env)["JobState"] == "COMPLETED", log.read_text()
    said = log.read_text()
    saved = re.findall(r"^trained steps (\d+) to (\d+)", said, re.MULTILINE)
    assert len(saved) == 2, said
    assert saved[0][0] == "0"
    assert saved[0][1] == saved[1][0]
    assert saved[1][1] == "60"
