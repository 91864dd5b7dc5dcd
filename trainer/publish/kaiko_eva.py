"""An export as the backbone of a task in kaiko's eva (PyPI `kaiko-eva`): eva's configuration of the task, rewritten.

eva hands a backbone of its `timm/` registry none of the options that make the network (0.4.5 filters them by the
loader's signature), so weights with layer scale, registers or another size can't be named by its variables. The
rewritten configuration has timm build the exported folder instead.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

import yaml

from streaming import storage
from streaming.errors import ConfigError
from trainer.embed.options import Token

_REGISTRY = "eva.vision.models.ModelFromRegistry"


def eva_name(task: str) -> str:
    """The file that a task's configuration becomes beside the model."""
    return f"eva-{PurePosixPath(storage.name_of(task)).stem}.yaml"


def eva_config(
    task: str, out: str, settings: dict[str, Any], name: str, options: storage.StorageOptions | None = None
) -> str:
    """A task's configuration, such as eva's `…/offline/classification/bach.yaml`, with the export at `out` as backbone.

    settings is the export's `config.json`. Size, normalisation, width and the folders of results become this model's
    wherever the configuration asks the environment for them, which still goes first.

    Raises:
        ConfigError: `out` is remote, or the task has no backbone.
        StorageError: the task can't be read.
    """
    if not storage.is_local(out):
        raise ConfigError(f"{out}: eva reads weights from a local folder; export there for --eva")
    about, data = settings["tilestream"], settings["pretrained_cfg"]
    variables = {
        "MODEL_NAME": f"{name}-{about['checkpoint_sha256'][:8]}",  # eva takes results that it finds for this model's
        "IN_FEATURES": about["embedding_dim"],
        "RESIZE_DIM": data["input_size"][-1],
        "NORMALIZE_MEAN": json.dumps(data["mean"]),
        "NORMALIZE_STD": json.dumps(data["std"]),
    }
    registers = settings["model_args"].get("reg_tokens") or 0
    try:
        content: Any = yaml.safe_load(storage.read_bytes(task, options))
    except yaml.YAMLError as error:
        raise ConfigError(f"{task}: no YAML ({' '.join(str(error).split())[:120]})") from error
    if "out_indices" in json.dumps(content, default=str) and about["embedding"] == "cls+patch":
        variables["IN_FEATURES"] = about["embedding_dim"] // 2  # a decoder sees patch tokens alone
    section = backbone(storage.canonical(out), about["embedding"], registers)
    rewritten = _rewritten(content, section, variables, registers)
    if _REGISTRY not in json.dumps(content, default=str):
        raise ConfigError(f"{task}: has no {_REGISTRY}; take one of eva's configurations of vision tasks")
    return yaml.safe_dump(rewritten, sort_keys=False, width=10**6)


def backbone(folder: str, token: Token, num_registers: int) -> dict[str, Any]:
    """A section of eva's configuration: the exported folder, which gives that token."""
    arguments: dict[str, Any] = {"model_name": f"local-dir:{folder}", "pretrained": True, "dynamic_img_size": True}
    section: dict[str, Any] = {"path": "timm.create_model", "arguments": arguments}
    if token == "patch":
        arguments |= {"global_pool": "avg", "fc_norm": False}
    if token == "cls+patch":
        arguments["global_pool"] = ""
        section["transforms"] = {
            "class_path": "eva.core.models.transforms.ExtractCLSFeatures",
            "init_args": {"num_register_tokens": num_registers, "include_patch_tokens": True},
        }
    return {"class_path": "eva.core.models.wrappers.ModelFromFunction", "init_args": section}


def _rewritten(value: Any, section: dict[str, Any], variables: dict[str, Any], num_registers: int) -> Any:
    if isinstance(value, dict):
        if value.get("class_path") == _REGISTRY:
            return _with_maps(section, (value.get("init_args") or {}).get("model_kwargs") or {}, num_registers)
        return {key: _rewritten(entry, section, variables, num_registers) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rewritten(entry, section, variables, num_registers) for entry in value]
    if isinstance(value, str):
        for name, mine in variables.items():
            value = re.sub(rf"\$\{{oc\.env:{name},[^}}]*\}}", lambda _, n=name, m=mine: f"${{oc.env:{n}, {m}}}", value)
    return value


def _with_maps(section: dict[str, Any], asked: dict[str, Any], num_registers: int) -> dict[str, Any]:
    """The section, which gives a map of patch tokens where a task (segmentation) asks for the outputs of blocks.

    They are those of the last block behind the norm, as eva has them of networks in transformers' layout.
    """
    if "out_indices" not in asked:
        return section
    arguments = section["init_args"]["arguments"]
    kept = {key: arguments[key] for key in ("model_name", "pretrained", "dynamic_img_size")}
    tokens = {
        "class_path": "eva.core.models.transforms.ExtractPatchFeatures",
        "init_args": {"num_register_tokens": num_registers},
    }
    whole = {"path": "timm.create_model", "arguments": {**kept, "global_pool": ""}, "transforms": tokens}
    return {**section, "init_args": whole}
