"""Configurations of kaiko's eva for an export."""

from pathlib import Path

import pytest
import yaml

from streaming.errors import ConfigError
from tests.trainer.publish.test_export import saved
from trainer.publish.export import export
from trainer.publish.options import ExportOptions

TASK = """
output: logs/${oc.env:MODEL_NAME, dino_vits16}/bach
head: {in_features: "${oc.env:IN_FEATURES, 384}"}
size: ${oc.env:RESIZE_DIM, 224}
mean: ${oc.env:NORMALIZE_MEAN, [0.485, 0.456, 0.406]}
callbacks:
  - backbone:
      class_path: eva.vision.models.ModelFromRegistry
      init_args: {model_name: "${oc.env:MODEL_NAME, dino_vits16}"}
"""


def test_a_task_of_eva_gets_the_exported_folder_as_its_backbone(tmp_path: Path) -> None:
    (tmp_path / "bach.yaml").write_text(TASK)
    out = tmp_path / "model"
    task = str(tmp_path / "bach.yaml")
    export(saved(tmp_path / "run"), str(out), ExportOptions(token="cls+patch", name="mine", eva=(task,)))
    found = yaml.safe_load((out / "eva-bach.yaml").read_text())
    backbone = found["callbacks"][0]["backbone"]
    assert backbone["class_path"] == "eva.core.models.wrappers.ModelFromFunction"
    assert backbone["init_args"]["arguments"]["model_name"] == f"local-dir:{out}"
    assert found["head"]["in_features"] == "${oc.env:IN_FEATURES, 384}"  # 2 × 192: class and mean patch token
    assert found["size"] == "${oc.env:RESIZE_DIM, 64}"
    assert found["mean"] == "${oc.env:NORMALIZE_MEAN, [0.5, 0.5, 0.5]}"
    assert found["output"].startswith("logs/${oc.env:MODEL_NAME, mine-")
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"has no eva\.vision\.models"):
        export(str(tmp_path / "run"), str(out), ExportOptions(eva=(str(tmp_path / "other.yaml"),)))


MAPS = TASK.replace("{model_name:", "{model_kwargs: {out_indices: 1}, model_name:")


def test_a_decoder_of_eva_gets_the_patch_tokens_alone(tmp_path: Path) -> None:
    (tmp_path / "consep.yaml").write_text(MAPS)
    out, options = tmp_path / "model", ExportOptions(token="cls+patch", eva=(str(tmp_path / "consep.yaml"),))
    export(saved(tmp_path / "run", "--model.num_registers", "4"), str(out), options)
    found = yaml.safe_load((out / "eva-consep.yaml").read_text())
    section = found["callbacks"][0]["backbone"]["init_args"]
    assert section["arguments"]["global_pool"] == ""  # all tokens, behind the norm
    assert section["transforms"]["class_path"] == "eva.core.models.transforms.ExtractPatchFeatures"
    assert section["transforms"]["init_args"] == {"num_register_tokens": 4}
    assert found["head"]["in_features"] == "${oc.env:IN_FEATURES, 192}"
