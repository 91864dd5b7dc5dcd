import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streaming.errors import CheckpointError
from trainer import checkpoint
from trainer.checkpoint import FolderCheckpointIO, checkpoint_uri, find, latest, load, load_weights, read_meta, steps_of
from trainer.config import Config, read_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    base = read_config("debug", ["--train.keep_checkpoints", "2", "--train.batch", "8"])
    return replace(base, run=replace(base.run, out=str(tmp_path / "run")))


def save(config: Config, step: int) -> str:
    uri = checkpoint_uri(config.run.out, step)
    state = {"global_step": step, "state_dict": {"weight": torch.arange(4.0)}}
    FolderCheckpointIO(config, "c0ffee").save_checkpoint(state, uri)
    return uri


def test_what_is_saved_is_loaded_with_its_next_index_and_configuration(config: Config) -> None:
    uri = save(config, 3)
    assert torch.equal(load(uri)["state_dict"]["weight"], torch.arange(4.0))
    assert read_meta(uri).next_index == 24
    assert read_meta(uri).catalog == "c0ffee"
    assert Path(uri, "config.yaml").read_text() == config.to_yaml()


def test_only_the_newest_checkpoints_are_kept(config: Config) -> None:
    for step in (1, 2, 3):
        save(config, step)
    assert steps_of(config.run.out) == [2, 3]
    assert sorted(os.listdir(Path(config.run.out, "checkpoints"))) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(config: Config) -> None:
    save(config, 1)
    broken = save(config, 2)
    os.remove(Path(broken, checkpoint.META))
    assert latest(config.run.out) == checkpoint_uri(config.run.out, 1)
    assert find(config.run.out) == checkpoint_uri(config.run.out, 1)


def test_a_damaged_checkpoint_is_refused_with_its_name(config: Config) -> None:
    uri = save(config, 1)
    state = Path(uri, checkpoint.STATE)
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000001.*checksum"):
        load(uri)


def test_a_checkpoint_that_would_run_code_is_refused(config: Config, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    uri = checkpoint_uri(config.run.out, 1)
    FolderCheckpointIO(config, "c0ffee").save_checkpoint({"global_step": 1, "evil": Evil()}, uri)
    with pytest.raises(CheckpointError, match="can't be read"):
        load(uri)
    assert not marker.exists()


def test_no_checkpoint_is_told_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*no checkpoint"):
        find(str(tmp_path))


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"weight": torch.zeros(2, 3)}, "1 missing \\(bias\\)"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "gate": torch.zeros(1)}, "1 left over \\(gate\\)"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight: \(2, 4\), not \(2, 3\)"),
    ],
)
def test_weights_of_another_architecture_are_refused(weights: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_weights(torch.nn.Linear(3, 2), weights, "run")


def test_weights_that_fit_are_loaded() -> None:
    layer = torch.nn.Linear(3, 2)
    load_weights(layer, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "run")
    assert layer(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]
