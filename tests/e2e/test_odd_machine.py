"""A Ray that is started on a machine as SLURM, `uv run` and containers leave it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_ray_starts_with_a_long_tmpdir_no_home_a_part_of_the_machine_and_under_uv_run(
    tmp_path: Path, catalog: str
) -> None:
    folder, job = tmp_path / "project", tmp_path / ("job" * 30)
    folder.mkdir()
    # What Ray would ship to its workers, and refuse for its size.
    with open(folder / "slide.bin", "wb") as file:
        file.truncate(600 * 2**20)
    # Ray looks for a process that is called `uv run …` among those above.
    (folder / "run").write_text("import subprocess, sys\nsys.exit(subprocess.run(sys.argv[1:]).returncode)\n")
    command = [sys.executable, "-m", "trainer.cli", "stream", catalog, "--steps", "0:1", "--batch", "4", "--mpp", "0.5"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_TMPDIR", "RAY_ADDRESS")}
    environment |= {"TMPDIR": str(job), "HOME": "/proc", "SLURM_CPUS_ON_NODE": "1", "SLURM_MEM_PER_NODE": "4096"}
    ended = subprocess.run(
        ["uv", "run", *command], executable=sys.executable, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "4 tiles of 1 steps" in ended.stdout
    assert "Traceback" not in ended.stderr
    # Its files lie where the job wants them.
    assert list((job / "ray").glob("session_2*/logs/raylet.out"))
