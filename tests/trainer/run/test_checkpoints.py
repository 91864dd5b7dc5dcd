import json
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from streaming.errors import CheckpointError, StorageError
from tests.faulty_server import FaultyServer, down
from trainer.run import checkpoints
from trainer.run.background_checkpoints import FolderCheckpointIO
from trainer.run.checkpoints import (
    checkpoint_uri,
    find,
    latest,
    load,
    load_weights,
    newest_good,
    read_meta,
    steps_of,
    verify,
)
from trainer.run.config import Config, read_config
from trainer.run.resuming import library_changes, resume_point


@pytest.fixture
def config(tmp_path: Path) -> Config:
    base = read_config("debug", ["--train.keep_checkpoints", "2", "--train.batch", "8"])
    return replace(base, run=replace(base.run, out=str(tmp_path / "run")))


def save(config: Config, step: int) -> str:
    uri = checkpoint_uri(config.run.out, step)
    state = {"global_step": step, "state_dict": {"weight": torch.arange(4.0)}}
    write(config, state, uri)
    return uri


def write(config: Config, state: dict, uri: str) -> None:
    to_storage = FolderCheckpointIO(config, "c0ffee")
    to_storage.save_checkpoint(state, uri)
    to_storage.wait()
    to_storage.teardown()


def test_what_is_saved_is_loaded_with_its_next_index_and_configuration(config: Config) -> None:
    uri = save(config, 3)
    assert torch.equal(load(uri)["state_dict"]["weight"], torch.arange(4.0))
    assert read_meta(uri).next_index == 24
    assert read_meta(uri).catalog == "c0ffee"
    assert Path(uri, "config.yaml").read_text() == config.to_yaml()


def test_a_checkpoint_notes_what_made_its_pixels_and_one_of_before_that_is_read(config: Config) -> None:
    uri = save(config, 3)
    assert metadata.version("opencv-python-headless").startswith(read_meta(uri).libraries["opencv"])
    assert read_meta(uri).libraries["simplejpeg"] == metadata.version("simplejpeg")
    assert library_changes(read_meta(uri)) == []
    other = replace(read_meta(uri), libraries={**read_meta(uri).libraries, "numpy": "1.9", "zune": "2"})
    assert library_changes(other) == [f"numpy 1.9 (now {metadata.version('numpy')})", "zune 2 (now none)"]
    note = json.loads(Path(uri, checkpoints.META).read_text())
    del note["libraries"]
    Path(uri, checkpoints.META).write_text(json.dumps(note))
    assert library_changes(read_meta(uri)) == []


def test_a_checkpoint_of_before_a_field_of_the_data_was_trained_without_it(config: Config) -> None:
    assert config.data.mpp_tolerance == 0.05
    uri = save(config, 3)
    assert resume_point(config, "c0ffee") == (3, uri)
    text = Path(uri, "config.yaml").read_text()
    Path(uri, "config.yaml").write_text(
        text.replace("  mpp_tolerance: 0.05\n", "").replace("  corners: anywhere\n", "")
    )
    before = checkpoints.read_config(uri).data
    assert (before.mpp_tolerance, before.corners) == (0, "anywhere")
    with pytest.raises(CheckpointError, match=r"data\.mpp_tolerance 0\.0 \(now 0\.05\)"):
        resume_point(config, "c0ffee")
    assert resume_point(replace(config, data=replace(config.data, mpp_tolerance=0.0)), "c0ffee") == (3, uri)


def test_a_checkpoint_of_before_a_field_of_the_model_or_of_its_crops_was_trained_without_it(config: Config) -> None:
    uri = save(config, 3)
    text = Path(uri, "config.yaml").read_text()
    for line in ("shuffle_jitter: true", "draw_ratios: true", "norm_last_layer: false", "interpolation: reference"):
        assert f"  {line}\n" in text
        text = text.replace(f"  {line}\n", "")
    Path(uri, "config.yaml").write_text(text)
    before = checkpoints.read_config(uri)
    assert not before.augment.shuffle_jitter
    assert not before.mask.draw_ratios
    assert (before.model.norm_last_layer, before.model.interpolation) == (True, "timm")
    with pytest.raises(
        CheckpointError, match=r"does not fit .*model\.norm_last_layer True \(now False\).*; set it back"
    ):
        resume_point(config, "c0ffee")
    assert resume_point(replace(before, run=config.run), "c0ffee") == (3, uri)


def test_only_the_newest_checkpoints_are_kept(config: Config) -> None:
    for step in (1, 2, 3):
        save(config, step)
    assert steps_of(config.run.out) == [2, 3]
    assert sorted(os.listdir(Path(config.run.out, "checkpoints"))) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(config: Config) -> None:
    save(config, 1)
    broken = save(config, 2)
    os.remove(Path(broken, checkpoints.META))
    assert latest(config.run.out) == checkpoint_uri(config.run.out, 1)
    assert find(config.run.out) == checkpoint_uri(config.run.out, 1)


def test_a_damaged_checkpoint_is_refused_with_its_name(config: Config) -> None:
    uri = save(config, 1)
    damage(uri)
    with pytest.raises(CheckpointError, match=r"step-00000001.*checksum"):
        load(uri)


def test_a_checkpoint_that_would_run_code_is_refused(config: Config, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    uri = checkpoint_uri(config.run.out, 1)
    write(config, {"global_step": 1, "evil": Evil()}, uri)
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


def damage(uri: str) -> None:
    state = Path(uri, checkpoints.STATE)
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    whole, damaged = save(config, 1), save(config, 2)
    damage(damaged)
    assert newest_good(config.run.out) == whole
    assert damaged in caplog.text
    os.remove(Path(whole, checkpoints.STATE))
    assert newest_good(config.run.out) is None


@pytest.mark.parametrize("content", [b"", bytes(4096), None])
def test_a_checkpoint_whose_configuration_was_lost_is_passed_over(
    config: Config, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    whole, damaged = save(config, 1), Path(save(config, 2), checkpoints.CONFIG)
    damaged.unlink() if content is None else damaged.write_bytes(content)
    assert resume_point(config, "c0ffee") == (1, whole)
    assert f"{damaged}: missing or damaged" in caplog.text
    with pytest.raises(CheckpointError, match="missing or damaged"):
        checkpoints.read_config(str(damaged.parent))


def test_a_damaged_later_checkpoint_does_not_cost_the_one_just_written(config: Config) -> None:
    config = replace(config, train=replace(config.train, keep_checkpoints=1))
    damage(save(config, 9))
    written = save(config, 5)
    assert newest_good(config.run.out) == written
    written = save(config, 6)
    assert newest_good(config.run.out) == written
    assert steps_of(config.run.out) == [6, 9]


def test_saving_goes_on_behind_and_tells_of_its_failure_at_the_next_look(config: Config) -> None:
    in_the_way = Path(config.run.out)
    in_the_way.write_text("a file where the run's folder should be")
    to_storage = FolderCheckpointIO(config, "c0ffee")
    to_storage.save_checkpoint({"global_step": 1}, checkpoint_uri(config.run.out, 1))
    with pytest.raises(StorageError, match=str(in_the_way)):
        to_storage.save_checkpoint({"global_step": 2}, checkpoint_uri(config.run.out, 2))
    to_storage.teardown()


def test_a_checkpoint_goes_to_an_object_store_in_pieces_and_comes_back(config: Config, s3_bucket: str) -> None:
    config = replace(config, run=replace(config.run, out=f"{s3_bucket}/checkpointed"))
    uri = save(config, 7)
    verify(uri)
    assert torch.equal(load(uri)["state_dict"]["weight"], torch.arange(4.0))


def test_storage_that_is_down_for_a_while_costs_no_checkpoint(config: Config, s3_bucket: str) -> None:
    with FaultyServer(os.environ["AWS_ENDPOINT_URL"], befalls_all=True) as server:
        options = {"endpoint_url": server.url}
        data, run = replace(config.data, storage_options=options), replace(config.run, out=f"{s3_bucket}/outage")
        config = replace(config, run=run, data=data)
        server.mood = down("503", 3)
        uri = save(config, 7)
        assert server.num_faults > 1
        # In the midst of a state that is sent in four parts.
        server.mood = lambda n: "503" if server.asked[-1] == "PUT" and server.asked.count("PUT") < sent + 5 else ""
        sent, state = server.asked.count("PUT"), {"global_step": 8, "weight": torch.arange(4.0 * 2**20)}
        write(config, state, checkpoint_uri(run.out, 8))
    verify(uri)
    assert torch.equal(load(uri)["state_dict"]["weight"], torch.arange(4.0))
    assert torch.equal(load(checkpoint_uri(run.out, 8))["weight"], state["weight"])


def test_a_disk_that_is_full_is_told_and_the_checkpoint_before_stays(
    config: Config, make_disk: Callable[[int], Path]
) -> None:
    config = replace(config, run=replace(config.run, out=str(make_disk(2**20))))
    before = save(config, 7)
    with pytest.raises(StorageError, match="No space left on device; check that the storage answers and has room"):
        write(config, {"global_step": 8, "weight": torch.zeros(2**20)}, checkpoint_uri(config.run.out, 8))
    assert newest_good(config.run.out) == before
