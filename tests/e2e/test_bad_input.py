"""Bad input: every command names it and the remedy in one line on stderr, and exits 2."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from streaming import cluster
from tests.conftest import write_catalog
from tests.processes import free_ports, serving
from tests.trainer.publish.test_export import saved
from trainer.cli import main
from trainer.recipe.backbone import create_backbone
from trainer.run import checkpoints
from trainer.run.config import read_config


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that the command leaves on stderr, beside lines of progress."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as left:
        status = left.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    own = [line for line in lines if line.startswith("tilestream")]
    assert len(own) == 1, lines
    assert not any("Traceback" in line for line in lines)
    return own[0]


def test_a_missing_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refusal(capsys, "catalog", tmp_path / "nowhere", "--out", tmp_path / "catalog")
    assert str(tmp_path / "nowhere") in line
    assert "not found; check the address" in line


def test_an_empty_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refusal(capsys, "catalog", tmp_path / "empty", "--out", tmp_path / "catalog")
    assert str(tmp_path / "empty") in line
    assert "is empty" in line


def test_a_folder_without_slides(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no slide")
    line = refusal(capsys, "embed", tmp_path, tmp_path, "--out", tmp_path / "out")
    assert str(tmp_path) in line


def test_a_bucket_that_does_not_exist(capsys: pytest.CaptureFixture[str], s3_bucket: str, tmp_path: Path) -> None:
    line = refusal(capsys, "catalog", "s3://no-such-bucket/slides", "--out", tmp_path / "catalog")
    assert "s3://no-such-bucket/slides" in line
    assert "bucket does not exist" in line


def test_no_credentials(
    capsys: pytest.CaptureFixture[str], s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    line = refusal(capsys, "catalog", f"{s3_bucket}/slides", "--out", tmp_path / "catalog")
    assert f"{s3_bucket}/slides" in line
    assert "AWS_ACCESS_KEY_ID" in line


@pytest.fixture
def closed_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket whose server checks keys, and knows none of ours: moto does after its first, free request."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with serving(command, port, {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "1"}):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAREFUSED")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "refused")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="closed")
        yield "s3://closed"


def test_a_key_that_the_server_refuses(
    capsys: pytest.CaptureFixture[str], closed_bucket: str, slides: list[Path], catalog: str, tmp_path: Path
) -> None:
    for source in ("slides", "a.svs", "*.svs"):
        line = refusal(capsys, "catalog", f"{closed_bucket}/{source}", "--out", tmp_path / "catalog")
        assert f"{closed_bucket}/{source}: access denied; check the credentials and their rights" in line
    assert "access denied" in refusal(capsys, "stream", f"{closed_bucket}/catalog")
    out = f"{closed_bucket}/run"
    assert f"{out}" in refusal(capsys, "train", "debug", "--data.catalog", catalog, "--run.out", out)
    assert "access denied" in refusal(capsys, "embed", out, slides[0], "--out", tmp_path / "out")
    assert not (tmp_path / "catalog").exists()


@pytest.mark.slow
def test_a_slide_that_breaks_after_cataloguing_stops_training_or_is_replaced_where_that_is_allowed(
    capsys: pytest.CaptureFixture[str], slides: list[Path], tmp_path: Path
) -> None:
    copies = [tmp_path / path.name for path in slides]
    for path, copy in zip(slides, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    catalog = write_catalog(tmp_path / "catalog", copies)
    changed = copies[1].stat().st_mtime_ns
    copies[1].write_bytes(os.urandom(copies[1].stat().st_size))
    os.utime(copies[1], ns=(changed, changed))  # size and time as catalogued: only reading shows it
    arguments = ["train", "debug", "--debug", "--data.catalog", catalog, "--run.out", str(tmp_path / "run")]
    arguments += ["--data.mpp", "{0.5: 1, 1.0: 1}", "--train.ranks", "1", "--train.batch", "8", "--train.steps", "6"]
    arguments += ["--optim.warmup_steps", "2"]
    line = refusal(capsys, *arguments)
    assert str(copies[1]) in line
    assert "raise data.max_failed_share" in line
    assert main([*arguments, "--data.max_failed_share", "0.9"]) == 0
    assert f"tiles replaced: {copies[1]}: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_that_is_no_slide(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "letter.svs").write_text("Dear reader, " * 100)
    line = refusal(capsys, "catalog", tmp_path / "letter.svs", "--out", tmp_path / "catalog")
    assert str(tmp_path / "letter.svs") in line
    assert "not a slide" in line
    reasons = pq.read_table(tmp_path / "catalog" / "rejected.parquet").to_pylist()
    assert [entry["slide"] for entry in reasons] == [str(tmp_path / "letter.svs")]


@pytest.mark.slow
def test_a_truncated_slide(capsys: pytest.CaptureFixture[str], slides: list[Path], tmp_path: Path) -> None:
    content = slides[0].read_bytes()
    (tmp_path / "cut.svs").write_bytes(content[: len(content) // 2])
    line = refusal(capsys, "catalog", tmp_path / "cut.svs", "--out", tmp_path / "catalog")
    assert str(tmp_path / "cut.svs") in line


def test_a_place_without_a_catalog(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["stream", tmp_path], ["train", "debug", "--data.catalog", tmp_path]):
        line = refusal(capsys, *command)
        assert str(tmp_path) in line
        assert "tilestream catalog" in line


def test_a_catalog_of_another_version(capsys: pytest.CaptureFixture[str], catalog: str, tmp_path: Path) -> None:
    table = pq.read_table(Path(catalog, "slides.parquet"))
    pq.write_table(table.replace_schema_metadata({"tilestream.catalog": "999"}), tmp_path / "slides.parquet")
    line = refusal(capsys, "stream", tmp_path)
    assert str(tmp_path) in line
    assert "version 999" in line


def test_a_folder_without_a_checkpoint(capsys: pytest.CaptureFixture[str], slides: list[Path], tmp_path: Path) -> None:
    line = refusal(capsys, "embed", tmp_path, slides[0], "--out", tmp_path / "out")
    assert str(tmp_path) in line
    assert "no checkpoint" in line


def test_a_checkpoint_of_another_architecture(
    capsys: pytest.CaptureFixture[str], slides: list[Path], tmp_path: Path
) -> None:
    config = read_config("debug", ["--run.out", str(tmp_path / "run")])
    uri = checkpoints.checkpoint_uri(str(tmp_path / "run"), 1)
    state = {"global_step": 1, "state_dict": {"teacher.backbone.vit.other": torch.zeros(1)}}
    checkpoints.write(uri, state, config, "c0ffee")
    line = refusal(capsys, "embed", tmp_path / "run", slides[0], "--out", tmp_path / "out")
    assert uri in line
    assert "another architecture" in line


def test_a_configuration_with_a_typo(capsys: pytest.CaptureFixture[str], catalog: str) -> None:
    line = refusal(capsys, "train", "debug", "--data.catalog", catalog, "--train.bach", "8")
    assert "'train.bach'; the nearest is 'train.batch'" in line


def test_a_batch_that_the_ranks_do_not_divide(capsys: pytest.CaptureFixture[str], catalog: str) -> None:
    line = refusal(capsys, "train", "debug", "--data.catalog", catalog, "--train.batch", "10", "--train.ranks", "4")
    assert "batch 10" in line
    assert "8 or 12" in line
    assert "batch 10" in refusal(capsys, "stream", catalog, "--batch", "10", "--ranks", "4")


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU")
def test_a_recipe_or_an_embedding_for_gpus_on_a_machine_without(
    capsys: pytest.CaptureFixture[str], catalog: str, slides: list[Path], tmp_path: Path
) -> None:
    arguments = ("--data.catalog", catalog, "--data.mpp", "{0.5: 1}", "--run.out", tmp_path / "run")
    for extra in ((), ("--debug",)):
        line = refusal(capsys, "train", "vits14", *arguments, *extra)
        assert "this machine has 0 of the 1 GPUs that are needed; add --train.gpu false" in line
    cluster.connect(1)  # another job of this process may have started Ray
    assert "this machine has 0 of the 1 GPUs" in refusal(capsys, "train", "vits14", *arguments)
    assert not (tmp_path / "run").exists()
    embed = ("embed", saved(tmp_path / "model"), slides[0], "--out", tmp_path / "out", "--gpu")
    assert "--gpu: this machine has 0 of the 1 GPUs that are needed; leave it out" in refusal(capsys, *embed)
    assert "0 of the 2 GPUs that are needed; leave it out or lower --models" in refusal(capsys, *embed, "--models", "2")
    assert not (tmp_path / "out").exists()


def test_a_command_line_with_a_typo(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps" in refusal(capsys, "stream", "catalog", "--steps", "5")
    assert "trian" in refusal(capsys, "trian")
    assert "KEY=VALUE" in refusal(capsys, "stream", "catalog", "--storage", "nonsense")


def test_crops_that_the_patches_do_not_divide(capsys: pytest.CaptureFixture[str], catalog: str, tmp_path: Path) -> None:
    run = ("--data.catalog", catalog, "--run.out", tmp_path / "run", "--data.mpp", "{0.5: 1}")
    line = refusal(capsys, "train", "debug", *run, "--augment.global_size", "72")
    assert "72×72 px: patch size 16 does not divide it; nearest: 64 and 80" in line
    assert "50×50" in refusal(capsys, "train", "debug", *run, "--augment.local_size", "50", "--dry-run")


def test_weights_of_another_architecture_or_with_missing_keys(
    capsys: pytest.CaptureFixture[str], catalog: str, tmp_path: Path
) -> None:
    run = ("--data.catalog", catalog, "--run.out", tmp_path / "run", "--data.mpp", "{0.5: 1}")
    small = create_backbone("vit_small_patch16_224", img_size=64).vit.state_dict()
    save_file(small, tmp_path / "small.safetensors")
    line = refusal(capsys, "train", "debug", *run, "--model.init", tmp_path / "small.safetensors")
    assert str(tmp_path / "small.safetensors") in line
    assert "of another shape" in line
    some = create_backbone("vit_tiny_patch16_224", img_size=64).vit.state_dict()
    del some["norm.weight"]
    save_file(some, tmp_path / "some.safetensors")
    line = refusal(capsys, "train", "debug", *run, "--model.init", tmp_path / "some.safetensors")
    assert "missing" in line
    assert "norm.weight" in line
