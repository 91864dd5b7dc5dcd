"""The whole road by its command lines, as a user goes it: S3, several processes, a kill."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from streaming import open_slide, storage
from tests.processes import SMALL, TILESTREAM, kill_tree, signal_tree, wait_for
from trainer.embed.model import load_model
from trainer.run import checkpoints

pytestmark = pytest.mark.slow
# The made slides are too small for a tile at 2 µm/px.
MIX = ("--data.mpp", "{0.5: 1, 1.0: 1}")


def run(*arguments: str) -> str:
    # Into files: Ray's processes outlive a command by moments, and would hold a pipe open.
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        status = subprocess.run([*TILESTREAM, *arguments], stdout=stdout, stderr=stderr).returncode
        stdout.seek(0)
        stderr.seek(0)
        assert status == 0, stderr.read()
        return stdout.read()


@pytest.mark.long
def test_catalog_training_kill_resume_and_embedding_on_s3(s3_slides: str, s3_bucket: str, tmp_path: Path) -> None:
    slides = storage.expand(s3_slides)[0]
    catalog, out = f"{s3_bucket}/road/catalog", f"{s3_bucket}/road/run"
    assert f"{len(slides)} slides: {len(slides)} added" in run("catalog", s3_slides, "--out", catalog)
    assert f"0 added, 0 changed, {len(slides)} unchanged" in run("catalog", s3_slides, "--out", catalog)

    arguments = ["train", "debug", "--data.catalog", catalog, "--run.out", out, "--train.steps", "8"]
    arguments += [*MIX, *SMALL, "--train.ranks", "2", "--train.batch", "8", "--train.checkpoint_every", "2"]
    arguments += ["--optim.warmup_steps", "2", "--train.log_every", "1"]
    killed = subprocess.Popen([*TILESTREAM, *arguments], start_new_session=True)
    wait_for(lambda: checkpoints.steps_of(out), killed)
    kill_tree(killed)
    reached, *later = checkpoints.steps_of(out)
    for step in later:  # where the kill came late
        storage.remove(checkpoints.checkpoint_uri(out, step))
    assert reached < 8

    assert f"trained steps {reached} to 8" in run(*arguments)
    metrics = storage.read_table(f"{out}/metrics.parquet").to_pylist()
    resumed = [(row["first_index"], row["next_index"]) for row in metrics if row["step"] > reached]
    assert resumed == [(8 * step, 8 * step + 8) for step in range(reached, 8)]

    embeddings = f"{s3_bucket}/road/embeddings"
    run("embed", out, s3_slides, "--out", embeddings, "--mpp", "1.0", "--size", "128")
    files = [info.uri for info in storage.expand(embeddings)[0]]
    assert len(files) == len(slides)
    for uri in files:
        table = storage.read_table(uri)
        assert table.num_rows > 0
        assert table.column_names == ["slide", "x", "y", "mpp", "size", "embedding"]
    row = table.to_pylist()[-1]
    tile = open_slide(row["slide"]).read_tile(row["x"], row["y"], 1.0, 128)
    np.testing.assert_allclose(
        load_model(checkpoints.find(out), "cls").embed(tile[None])[0], row["embedding"], atol=1e-5
    )


@pytest.mark.long
def test_a_killed_rank_is_started_again_and_trains_the_same_indices(catalog: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", "debug", "--data.catalog", catalog, "--run.out", str(out), "--train.steps", "10"]
    arguments += [*MIX, *SMALL, "--train.ranks", "2", "--train.batch", "8"]
    arguments += ["--train.checkpoint_every", "2", "--train.log_every", "1"]
    printed = tmp_path / "printed"
    # Into a file: Ray's processes outlive a command by moments, and would hold a pipe open.
    with printed.open("w") as stdout:
        running = subprocess.Popen([*TILESTREAM, *arguments], start_new_session=True, stdout=stdout)
    wait_for(lambda: checkpoints.steps_of(str(out)), running)
    os.kill(_child_named("ray::RayTrainWorker", running.pid), signal.SIGKILL)
    assert running.wait(timeout=300) == 0
    assert "trained steps 0 to 10" in printed.read_text()
    steps = pq.read_table(out / "metrics.parquet").to_pylist()
    assert [(row["first_index"], row["next_index"]) for row in steps] == [(8 * s, 8 * s + 8) for s in range(10)]


def endless(catalog: str, out: Path, said: Path) -> subprocess.Popen[bytes]:
    """A training far from its end, once it has made a step; what it says goes into a file."""
    arguments = ["train", "debug", "--data.catalog", catalog, "--run.out", str(out), *MIX, *SMALL]
    arguments += ["--train.steps", "100000", "--train.batch", "8", "--train.log_every", "1"]
    arguments += ["--train.checkpoint_every", "100000"]
    with said.open("w") as stderr:
        running = subprocess.Popen([*TILESTREAM, *arguments], start_new_session=True, stderr=stderr)
    wait_for(lambda: "loss" in said.read_text(), running)
    return running


@pytest.mark.long
def test_control_c_ends_a_training_with_a_word_and_its_own_status(catalog: str, tmp_path: Path) -> None:
    running = endless(catalog, tmp_path / "run", tmp_path / "said")
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert (tmp_path / "said").read_text().endswith("\ninterrupted\n")


@pytest.mark.long
def test_a_sigterm_to_all_processes_of_a_training_saves_it(catalog: str, tmp_path: Path) -> None:
    running = endless(catalog, tmp_path / "run", tmp_path / "said")
    signal_tree(running, signal.SIGTERM)  # as SLURM's scancel and systemd do
    assert running.wait() == 143
    (step,) = checkpoints.steps_of(str(tmp_path / "run"))
    assert step > 0
    checkpoints.verify(checkpoints.checkpoint_uri(str(tmp_path / "run"), step))


def _child_named(name: str, pid: int) -> int:
    """A process below another; other Ray sessions of this machine are left alone."""
    children = psutil.Process(pid).children(recursive=True)
    return next(child.pid for child in children if " ".join(child.cmdline()).startswith(name))


@pytest.mark.long
def test_the_digests_of_steps_do_not_depend_on_ranks_readers_or_where_a_run_starts(catalog: str) -> None:
    def digests(*arguments: str) -> list[str]:
        printed = run("stream", catalog, "--batch", "8", "--size", "64", "--digest", *arguments)
        return [line for line in printed.splitlines() if line.startswith("step ")]

    whole = digests("--steps", "0:4", "--ranks", "1", "--readers", "1:1")
    assert len(set(whole)) == 4
    assert digests("--steps", "2:4", "--ranks", "4", "--readers", "2:2") == whole[2:]
