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
