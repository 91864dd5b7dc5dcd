"""Weights to start from: a backbone's in any of the layouts of `weight_layouts`, or a whole checkpoint of ours.

Every tensor of a backbone must be used and every parameter filled; positions of another patch grid are resampled.
Networks on torch's meta device are filled with shapes: of a source, only names and shapes are read then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Generator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from streaming import storage
from streaming.errors import CheckpointError
from trainer.recipe.backbone import Backbone, resample_positions
from trainer.run import checkpoints
from trainer.run.weight_layouts import Weights, backbone_weights, timm_names

FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
EXPORTED = ("config.json", "model.safetensors")
# What published checkpoints hold beside tensors, and what nothing can be executed by: DINO's command line.
_HARMLESS: list[Any] = [Namespace]
_LOG = logging.getLogger(__name__)


def start_from(source: str, student: nn.Module, teacher: nn.Module, options: storage.StorageOptions | None) -> None:
    """Fills student and teacher, each with a `backbone` and heads; they may share tensors then.

    source is a file of weights, a folder in timm's or transformers' layout or a name of timm's hub (both get that
    backbone and the student's heads), or a checkpoint of ours (student and teacher get theirs, heads included). What
    will be replaced is dropped before the source is read: a host needs room for one of them. On the meta device, a
    source without a mask token is told in a warning.

    Raises:
        CheckpointError: there is no such source, or it holds weights of another architecture.
        StorageError: it can't be read.
    """
    device = next(student.parameters()).device
    for network in (student, teacher):
        network.get_submodule("backbone.vit").to("meta")
    file = weights_file(source, options)
    if file is not None:
        published = read_shapes(file, options) if device.type == "meta" else read_weights(file, options)
    elif timm.is_model_pretrained(source):
        published = hub_weights(source, device)
    else:
        return _load_checkpoint(source, student, teacher, options)
    if "mask_token" not in published and device.type == "meta":
        _LOG.warning("%s: has no mask token; it begins at 0, as in any file of timm's", source)
    backbone = student.get_submodule("backbone")
    assert isinstance(backbone, Backbone), "a network's backbone"
    load_published(backbone, published, source)
    first = student.state_dict()
    teacher.load_state_dict({key: first[key] for key in teacher.state_dict()}, assign=True)


def weights_file(source: str, options: storage.StorageOptions | None) -> str | None:
    """The file of weights that a source is, or that a folder in timm's or transformers' layout has."""
    if PurePosixPath(source).suffix in FILES:
        return source
    if timm.is_model_pretrained(source) or EXPORTED[0] not in storage.list_names(source, options):
        return None
    return storage.join(source, EXPORTED[1])


def is_awaited(source: str, options: storage.StorageOptions | None) -> bool:
    """Whether a source is no file or name, but a run of ours that has no checkpoint yet."""
    if weights_file(source, options) is not None or timm.is_model_pretrained(source):
        return False
    return not storage.exists(storage.join(source, checkpoints.META), options) and not checkpoints.latest(
        source, options
    )


def _load_checkpoint(
    source: str, student: nn.Module, teacher: nn.Module, options: storage.StorageOptions | None
) -> None:
    try:
        found = checkpoints.find(source, options)
    except CheckpointError as error:
        kinds = (
            f"a file ({', '.join(FILES)}), a folder in timm's or transformers' layout, timm's hub (such as "
            "vit_small_patch14_dinov2.lvd142m)"
        )
        raise CheckpointError(f"{error}; model.init also takes {kinds}") from error
    shapes_only = all(parameter.is_meta for parameter in student.parameters())
    if shapes_only:
        state: Weights = checkpoints.read_index(found, options).state["state_dict"]
    else:
        state = checkpoints.load(found, options, checkpoints.WEIGHTS)["state_dict"]
    for name, network in (("student", student), ("teacher", teacher)):
        own = {key.removeprefix(f"{name}."): w for key, w in state.items() if key.startswith(f"{name}.")}
        backbone = network.get_submodule("backbone")
        assert isinstance(backbone, Backbone), "a network's backbone"
        key = "backbone.vit.pos_embed"
        if key in own:
            own[key] = resize_positions(own[key], backbone)
        for key, weight in network.state_dict().items():
            if key.endswith("last_layer.scale"):
                own.setdefault(key, torch.ones(weight.shape))  # a checkpoint of before the field, or of DINO's norms
        checkpoints.load_weights(network, own, found)


def read_weights(uri: str, options: storage.StorageOptions | None = None) -> Weights:
    """A backbone's tensors by name of a .safetensors or torch file; nothing in it is ever executed.

    Raises:
        CheckpointError: it is damaged, or holds something else.
        StorageError: it can't be read.
    """
    return _read(uri, options, "cpu", _tensor)


def read_shapes(uri: str, options: storage.StorageOptions | None = None) -> Weights:
    """Names and shapes of such a file, as tensors without memory; little of it is read.

    Raises:
        CheckpointError, StorageError: as `read_weights`.
    """
    return _read(uri, options, "meta", lambda _file, _start, entry: torch.empty(entry["shape"], device="meta"))


def _read(
    uri: str,
    options: storage.StorageOptions | None,
    device: str,
    tensor: Callable[[BinaryIO, int, dict[str, Any]], Tensor],
) -> Weights:
    """A backbone's tensors on a device; `tensor` makes each of a .safetensors file, from its entry in the header."""
    nbytes = storage.stat(uri, options).size
    with storage.reading(uri, options) as file, _no_weights(uri, nbytes):
        if not uri.endswith(".safetensors"):
            with torch.serialization.safe_globals(_HARMLESS):
                return backbone_weights(torch.load(file, map_location=device, weights_only=True))
        entries = _entries(file, nbytes)
        return backbone_weights({name: tensor(file, *entry) for name, entry in entries.items()})


def _entries(file: BinaryIO, nbytes: int) -> dict[str, tuple[int, dict[str, Any]]]:
    """Where each tensor of a safetensors file begins, and its type, shape and offsets; in the file's order."""
    # https://huggingface.co/docs/safetensors: the header's length, the header, the tensors.
    length = int.from_bytes(file.read(8), "little")
    header: dict[str, Any] = json.loads(file.read(length) if length < nbytes else b"")
    header.pop("__metadata__", None)
    found = {name: (8 + length + entry["data_offsets"][0], entry) for name, entry in header.items()}
    if max((8 + length + entry["data_offsets"][1] for entry in header.values()), default=0) != nbytes:
        raise ValueError("its end is missing")
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def _tensor(file: BinaryIO, start: int, entry: dict[str, Any]) -> Tensor:
    """One of them, by the library, which takes whole files alone: the host never has two copies of all."""
    begin, end = entry["data_offsets"]
    header = json.dumps({"it": {**entry, "data_offsets": [0, end - begin]}}).encode()
    file.seek(start)
    return safetensors.torch.load(len(header).to_bytes(8, "little") + header + file.read(end - begin))["it"]


@contextlib.contextmanager
def _no_weights(uri: str, nbytes: int) -> Generator[None]:
    """Tells in one line what a reader of weights makes of other content."""
    try:
        yield
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{uri}: holds a {refused[1]}, and only tensors and plain values are loaded; where you trust the file, "
                "torch.load it with weights_only=False and torch.save its tensors alone"
            ) from error
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{uri}: {nbytes:,} bytes that are no weights: {reason}; fetch it again") from error


def hub_weights(name: str, device: torch.device) -> Weights:
    """Tensors of a model of timm's hub, in timm's naming; for the meta device, nothing is fetched.

    Raises:
        CheckpointError: they can't be fetched.
    """
    pretrained = device.type != "meta"
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, device=device).state_dict()
    except Exception as error:  # whatever its downloader raises: no network, no such file, a full disk
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: not fetched from timm's hub ({reason}); give a local file instead") from error


def load_published(backbone: Backbone, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads DINOv2 weights, in timm's naming or the reference's.

    Files without a mask token leave it as it is.

    Raises:
        CheckpointError: naming what is missing, left over or of another shape.
    """
    named = timm_names(weights)
    named.setdefault("mask_token", backbone.mask_token.detach())
    named = {key if key == "mask_token" else f"vit.{key}": weight for key, weight in named.items()}
    if "vit.pos_embed" in named:
        named["vit.pos_embed"] = resize_positions(named["vit.pos_embed"], backbone)
    checkpoints.load_weights(backbone, named, source)


def resize_positions(positions: Tensor, backbone: Backbone) -> Tensor:
    """A position embedding (1, P + N, D) for the patch grid of a backbone's own crop size, by `resample_positions`.

    Positions of another form are given back unchanged, for the shape check to name.
    """
    vit = backbone.vit
    num_patches = positions.shape[1] - (0 if vit.no_embed_class else vit.num_prefix_tokens)
    side = math.isqrt(max(num_patches, 0))
    if side**2 != num_patches or not side or (side, side) == vit.patch_embed.grid_size:
        return positions
    return resample_positions(positions, (side, side), vit.patch_embed.grid_size, vit)
