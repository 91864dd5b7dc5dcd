"""The layouts in which others keep a vision transformer's weights, and one set of names for all of them.

Known are timm's names, the reference DINOv2's (released files and training checkpoints, whose blocks lie in chunks and
whose backbone lies beside heads, in a student and a teacher), transformers' Dinov2 and Dinov2WithRegisters, and any of
them below a prefix, as Lightning, DDP and torch.compile leave it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

Weights = dict[str, Tensor]

# What wrappers put into names: DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of several networks in a file; the teacher is the one that is used.
_NESTED = ("teacher", "model", "state_dict", "model_state_dict")
_OF_TRANSFORMERS = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)


def backbone_weights(held: Any) -> Weights:
    """The tensors of the one backbone that a file holds, under timm's or the reference's names.

    Of a student and a teacher it is the teacher. Heads, centres and an optimiser's state beside the backbone are left
    out; where nothing is beside it, every tensor is given back, for the loader to compare.

    Raises:
        ValueError: there is no map of names to tensors, no class token in it, or more than one.
    """
    named = {_WRAPPERS.sub("", key): value for key, value in _innermost(held).items()}
    roots = {key.removesuffix("cls_token").removesuffix("embeddings.") for key in named if key.endswith("cls_token")}
    of_teacher = {root for root in roots if "teacher" in root}
    found = sorted(of_teacher or roots)
    if len(found) != 1:
        places = ", ".join(found) if found else "none"
        raise ValueError(f"it should hold one class token (cls_token), not {len(found)} ({places})")
    (root,) = found
    own = {key.removeprefix(root): value for key, value in named.items() if key.startswith(root)}
    if root.endswith("vit.") and (mask_token := named.get(root.removesuffix("vit.") + "mask_token")) is not None:
        own["mask_token"] = mask_token  # this project's own, beside timm's names
    if not all(isinstance(value, Tensor) for value in own.values()):
        raise ValueError("it holds no map of names to tensors")
    if any(key.startswith("embeddings.") for key in own):
        own = _of_transformers(own)
    # The reference's blocks lie in chunks for sharding, each block under its number in the whole.
    return {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", key): value for key, value in own.items()}


def _innermost(held: Any) -> Mapping[str, Any]:
    while isinstance(held, dict):
        nested = next((held[key] for key in _NESTED if isinstance(held.get(key), dict)), None)
        if nested is None:
            break
        held = nested
    if not isinstance(held, dict) or not any(isinstance(value, Tensor) for value in held.values()):
        raise ValueError("it holds no map of names to tensors")
    return cast("dict[str, Any]", held)


def _of_transformers(weights: Weights) -> Weights:
    """Transformers' names as the reference's; query, key and value become one matrix."""
    named: Weights = {}
    for key, weight in weights.items():
        for pattern, replacement in _OF_TRANSFORMERS:
            key = re.sub(pattern, replacement, key)
        named[key] = weight
    for key in [key for key in named if ".attn.query." in key]:
        parts = [named.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        named[key.replace("query", "qkv")] = torch.cat(parts)
    return named


def timm_names(weights: Mapping[str, Tensor]) -> Weights:
    """The reference's names as timm's; weights that have timm's stay as they are.

    timm keeps no position for class and register tokens where there are registers: the class token's is added to it.
    """
    named = dict(weights)
    if "mask_token" in named:
        named["mask_token"] = named["mask_token"].reshape(1, 1, -1)
    if "register_tokens" in named:
        named["reg_token"] = named.pop("register_tokens").reshape(1, -1, named["cls_token"].shape[-1])
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return dict(_timm_mlp(named))


def _timm_mlp(named: Weights) -> Iterator[tuple[str, Tensor]]:
    for key, weight in named.items():
        yield key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."), weight
