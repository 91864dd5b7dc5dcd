"""Export: a checkpoint's teacher as a folder that timm and Hugging Face load without this project.

`model.safetensors` + `config.json` in timm's layout (timm's `local-dir:` and transformers' timm wrapper read it), or in
that of transformers' Dinov2; `README.md` is the model card.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import save_file
from timm.layers.mlp import GluMlp
from timm.models import save_for_hf
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from streaming import storage
from streaming.errors import ConfigError
from trainer.embed.model import load_backbone, side_px
from trainer.publish import benchmarks
from trainer.publish.kaiko_eva import eva_config, eva_name
from trainer.publish.model_card import model_card
from trainer.publish.options import ExportOptions
from trainer.recipe.backbone import Backbone, positions_for, timm_options
from trainer.recipe.network import build_backbone
from trainer.run import checkpoints
from trainer.run.config import Config
from trainer.run.slide_sources import trained_mpp

_OF_OTHER_WEIGHTS = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
FILES = re.compile(
    r"README\.md|(preprocessor_)?config\.json|model\.safetensors|eva-.*\.yaml|"
    + "|".join(map(re.escape, benchmarks.FILES))
)


def export(
    checkpoint_uri: str,
    out: str,
    options: ExportOptions | None = None,
    storage_options: dict[str, Any] | None = None,
) -> list[str]:
    """Writes a checkpoint's teacher to `out` (any fsspec URI); returns the files' URIs.

    Raises:
        CheckpointError: no usable checkpoint.
        ConfigError: `out` holds something else, or the layout can't hold the model.
        StorageError: `out` can't be written.
    """
    options = options or ExportOptions()
    if any(not FILES.fullmatch(name) for name in storage.list_names(out, storage_options)):
        raise ConfigError(f"{out}: holds other files than an export's; name another folder")
    found = checkpoints.find(checkpoint_uri, storage_options)
    config, trained = load_backbone(found, storage_options)
    backbone = for_tiles(config, trained)
    meta = checkpoints.read_meta(found, storage_options)
    about = description(config, backbone, meta, options)
    folder = Path(tempfile.mkdtemp(prefix="tilestream-export-"))
    try:
        write = {"timm": write_timm, "transformers": write_transformers}[options.layout]
        write(folder, config, backbone, about)
        card = model_card(config, about, meta.sources, options)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for task in options.eva:
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            content = eva_config(task, out, settings, options.name, storage_options)
            (folder / eva_name(task)).write_text(content, encoding="utf-8")
        asked = {
            benchmarks.TRIDENT_FILE: options.trident,
            benchmarks.PATHO_BENCH_FILE: options.patho_bench,
            benchmarks.THUNDER_FILE: options.thunder,
        }
        for file in (file for file, wanted in asked.items() if wanted):
            content = benchmarks.benchmark_file(file, options.name, about["embedding_dim"])
            (folder / file).write_text(content, encoding="utf-8")
        # The configuration last: a folder without it is no model to anybody. That of an export before goes first.
        for name in ("config.json", "preprocessor_config.json"):
            storage.remove(storage.join(out, name), storage_options)
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == "config.json")
        written = [storage.join(out, name) for name in names]
        for name, uri in zip(names, written, strict=True):
            storage.write_bytes(uri, (folder / name).read_bytes(), storage_options)
        return written
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def for_tiles(config: Config, trained: Backbone) -> Backbone:
    """The network for tiles as it was trained on, not for their crops: its positions resampled as `embed` does it.

    So a library has nothing to resample, which each does in its own way.
    """
    side, rule = side_px(config.data.tile_size, trained.patch_size), config.model.interpolation
    backbone = build_backbone(config.model, side)
    weights = trained.state_dict()
    weights["vit.pos_embed"] = positions_for(trained.vit, backbone.vit.patch_embed.grid_size, rule)
    backbone.load_state_dict(weights)
    return backbone.eval()


def description(config: Config, backbone: Backbone, meta: checkpoints.Meta, options: ExportOptions) -> dict[str, Any]:
    """What a user of the model must know; stands in `config.json` under `tilestream`."""
    return {
        "embedding": options.token,
        "embedding_dim": backbone.embed_dim * (2 if options.token == "cls+patch" else 1),
        "license": options.license,
        "tile_size": config.data.tile_size,
        "input_size": side_px(config.data.tile_size, backbone.patch_size),
        "crop_size": config.augment.global_size,
        "num_registers": backbone.vit.num_reg_tokens,
        "interpolation": config.model.interpolation,
        "mpp": trained_mpp(config.data.drawn_mpp, meta.sources),
        "mean": list(config.augment.mean),
        "std": list(config.augment.std),
        "steps": meta.step,
        "tiles_seen": meta.next_index,
        "catalog": meta.catalog,
        "sources": [asdict(source) for source in meta.sources],
        "checkpoint_sha256": meta.sha256,
    }


def write_timm(folder: Path, config: Config, backbone: Backbone, about: dict[str, Any]) -> None:
    """Timm's layout, by timm itself: it notes what `timm.create_model` needs to build the same network.

    Raises:
        ConfigError: timm has no name for it.
    """
    side, model = about["input_size"], config.model
    # Training has blocks of its own, which timm could not name; their weights are those of timm's.
    options = timm_options(side, model.patch_size, model.num_registers, model.layer_scale)
    plain: Any = timm.create_model(model.backbone, **options)
    try:
        plain.load_state_dict(backbone.vit.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"timm's {model.backbone} has no {model.ffn} layers, as this model has; take --layout transformers"
        ) from error
    # What timm knows of weights of that name is not of these.
    plain.pretrained_cfg = {key: value for key, value in plain.pretrained_cfg.items() if key not in _OF_OTHER_WEIGHTS}
    save_for_hf(
        plain,
        str(folder),
        model_config={"tilestream": about, "pretrained_cfg": {"license": about["license"]}},
        safe_serialization=True,
        data_config={
            "input_size": (3, side, side),
            "mean": config.augment.mean,
            "std": config.augment.std,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
    )


def write_transformers(folder: Path, config: Config, backbone: Backbone, about: dict[str, Any]) -> None:
    """Transformers' Dinov2, with registers Dinov2WithRegisters, and the configuration of its image processor.

    Raises:
        ConfigError: the network has a part that Dinov2 has not.
    """
    vit = backbone.vit
    weights = dinov2_weights(vit, backbone.mask_token)
    num_registers = vit.num_reg_tokens
    kind = "Dinov2WithRegisters" if num_registers else "Dinov2"
    block = cast(Block, vit.blocks[0])
    gated = isinstance(block.mlp, GluMlp)
    settings: dict[str, Any] = {
        "architectures": [f"{kind}Model"],
        "model_type": "dinov2_with_registers" if num_registers else "dinov2",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": about["input_size"],
        "patch_size": backbone.patch_size,
        "mlp_ratio": 4,
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu",
        "layer_norm_eps": vit.norm.eps,
        "qkv_bias": "blocks.0.attn.qkv.bias" in vit.state_dict(),
        "torch_dtype": "float32",
        "tilestream": about,
        **({"num_register_tokens": num_registers} if num_registers else {}),
    }
    hidden = weights["encoder.layer.0.mlp.weights_out.weight" if gated else "encoder.layer.0.mlp.fc2.weight"].shape[1]
    wanted = (vit.embed_dim * 4 * 2 // 3 + 7) // 8 * 8 if gated else 4 * vit.embed_dim
    if hidden != wanted:
        raise ConfigError(f"transformers' {kind} has {wanted} hidden units, this model {hidden}; take --layout timm")
    side = about["input_size"]
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.augment.mean),
        "image_std": list(config.augment.std),
        "do_convert_rgb": True,
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def dinov2_weights(vit: VisionTransformer, mask_token: Tensor) -> dict[str, Tensor]:
    """Timm's weights under the names of transformers' Dinov2: query, key and value apart, a position for every token.

    Raises:
        ConfigError: a weight that Dinov2 has no place for.
    """
    own = {name: weight.detach().clone() for name, weight in vit.state_dict().items()}
    width = vit.embed_dim
    position = own.pop("pos_embed")
    if vit.no_embed_class:  # timm keeps no position for the class token, Dinov2 has one
        position = torch.cat((position.new_zeros(1, 1, width), position), dim=1)
    found = {
        "embeddings.cls_token": own.pop("cls_token"),
        "embeddings.mask_token": mask_token.detach().clone()[0],
        "embeddings.position_embeddings": position,
        "embeddings.patch_embeddings.projection.weight": own.pop("patch_embed.proj.weight"),
        "embeddings.patch_embeddings.projection.bias": own.pop("patch_embed.proj.bias"),
        "layernorm.weight": own.pop("norm.weight"),
        "layernorm.bias": own.pop("norm.bias"),
    }
    if "reg_token" in own:
        found["embeddings.register_tokens"] = own.pop("reg_token")
    names = {
        **{f"{norm}.{part}": f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")},
        "attn.proj.weight": "attention.output.dense.weight",
        "attn.proj.bias": "attention.output.dense.bias",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }
    gated = isinstance(vit.blocks[0].mlp, GluMlp)
    for layer, part in (("fc1", "weights_in"), ("fc2", "weights_out")):
        for kind in ("weight", "bias"):
            names[f"mlp.{layer}.{kind}"] = f"mlp.{part if gated else layer}.{kind}"
    for i in range(len(vit.blocks)):
        ours, theirs = f"blocks.{i}.", f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            if (fused := own.pop(f"{ours}attn.qkv.{kind}", None)) is not None:
                for name, part in zip(("query", "key", "value"), fused.chunk(3), strict=True):
                    found[f"{theirs}attention.attention.{name}.{kind}"] = part.clone()
        for name, renamed in names.items():
            if (weight := own.pop(ours + name, None)) is not None:
                found[theirs + renamed] = weight
        for scale in ("layer_scale1", "layer_scale2"):
            found.setdefault(f"{theirs}{scale}.lambda1", torch.ones(width))
    if own:
        raise ConfigError(f"transformers' Dinov2 has no place for {sorted(own)[0]}; take --layout timm")
    return found
