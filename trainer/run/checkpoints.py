"""Checkpoints at any fsspec URI: a folder a step, whole or not at all, the newest few kept.

`step-00000030/state.ckpt` is Lightning's checkpoint without its tensors' values, which `state_files` keeps beside it,
and `meta.json` is written last and vouches for both: step, next sample index, catalog, SHA-256, libraries. A folder
without it is an upload that did not finish, and is passed over; so is one that does not match its checksums, or whose
configuration is lost. Of the first version, `state.ckpt` has the tensors, too. `background_checkpoints` writes them
while training goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pickle
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from streaming import storage
from streaming.errors import CheckpointError, ConfigError
from streaming.slide.versions import pixel_libraries
from trainer.run import state_files
from trainer.run.config import Config, parse_config
from trainer.run.slide_sources import SlideSource
from trainer.run.state_files import Index

STATE, META, CONFIG = "state.ckpt", "meta.json", "config.yaml"
_BEFORE_THE_FIELD: dict[str, dict[str, Any]] = {
    "data": {"mpp_tolerance": 0.0, "corners": "anywhere"},
    "augment": {"shuffle_jitter": False},
    "mask": {"draw_ratios": False},
    "model": {"norm_last_layer": True, "interpolation": "timm"},
}
_LOG = logging.getLogger(__name__)
_PIECE = 16 << 20
_ONE_FILE = 1  # the version with tensors in `state.ckpt`
WEIGHTS = "['state_dict']"
"""How the names of student's and teacher's tensors begin."""
_STEP = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a checkpoint says of itself."""

    step: int
    next_index: int
    """the first sample index that was not trained on"""
    catalog: str
    """fingerprint of the catalog"""
    nbytes: int
    """of `state.ckpt`"""
    sha256: str
    """of it, which has those of the tensors"""
    libraries: dict[str, str] = field(default_factory=dict[str, str])
    """versions of what makes pixels, where the checkpoint was written; of older checkpoints, none"""
    sources: list[SlideSource] = field(default_factory=list[SlideSource])
    """what was trained on, as the catalog told when the run was started; of older checkpoints, none"""
    version: int = 2


def checkpoint_uri(run: str, step: int) -> str:
    """Where a run keeps the checkpoint of a step."""
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def steps_of(run: str, options: storage.StorageOptions | None = None) -> list[int]:
    """Steps of a run's whole checkpoints, oldest first."""
    names = storage.list_names(storage.join(run, "checkpoints"), options)
    steps = sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))
    return [step for step in steps if storage.exists(storage.join(checkpoint_uri(run, step), META), options)]


def latest(run: str, options: storage.StorageOptions | None = None) -> str | None:
    """The URI of a run's newest whole checkpoint, if it has one; its content is not looked at."""
    steps = steps_of(run, options)
    return checkpoint_uri(run, steps[-1]) if steps else None


def newest_good(run: str, options: storage.StorageOptions | None = None) -> str | None:
    """The URI of a run's newest checkpoint that is whole; damaged ones are passed over with a warning."""
    for step in reversed(steps_of(run, options)):
        uri = checkpoint_uri(run, step)
        try:
            verify(uri, options)
            _config_values(uri, options)
        except CheckpointError as error:
            _LOG.warning("passed over: %s", error)
        else:
            return uri
    return None


def find(uri: str, options: storage.StorageOptions | None = None) -> str:
    """The checkpoint that a URI names: its own folder, or the newest of a run.

    Raises:
        CheckpointError: there is none.
    """
    if storage.exists(storage.join(uri, META), options):
        return uri
    found = latest(uri, options)
    if found is None:
        raise CheckpointError(
            f"{uri}: no checkpoint here; name a run's folder or one of its checkpoints/step-… folders"
        )
    return found


def write(
    uri: str,
    state: Mapping[str, Any],
    config: Config,
    catalog: str,
    sources: Sequence[SlideSource] = (),
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes Lightning's state and the configuration, then the note that vouches for them.

    Args:
        uri: the checkpoint's folder, by `checkpoint_uri`.
        state: with `global_step`, and else tensors and what `torch.save` takes.
        config: what was trained, and where its storage is.
        catalog: fingerprint of the catalog.
        sources: what is trained on.
        group: the ranks that write together, each its part of every DTensor; none: this process alone.

    Raises:
        StorageError: it can't be written; what is there vouches for nothing.
    """
    step, options = int(state["global_step"]), config.data.storage_options

    def finish(index: Index) -> None:
        content = index.to_bytes()
        meta = Meta(
            step=step,
            next_index=step * config.train.batch,
            catalog=catalog,
            nbytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            libraries=pixel_libraries(),
            sources=list(sources),
        )
        storage.write_bytes(storage.join(uri, STATE), content, options)
        storage.write_bytes(storage.join(uri, CONFIG), config.to_yaml().encode(), options)
        storage.write_bytes(storage.join(uri, META), json.dumps(asdict(meta), indent=1).encode(), options)

    if group is None or dist.get_rank(group) == 0:
        # Of a damaged one, passed over before: first what vouches for it.
        storage.remove(storage.join(uri, META), options)
        storage.remove(uri, options)
    state_files.save(uri, state, finish, options, group)


def read_meta(uri: str, options: storage.StorageOptions | None = None) -> Meta:
    """What a checkpoint says of itself.

    Raises:
        CheckpointError: it is not one of this version.
    """
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(storage.join(uri, META), options))
        sources = [SlideSource(**source) for source in found.pop("sources", [])]
        return Meta(**found, sources=sources)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{uri}: {META} is damaged or of another version ({error}); take another step") from error


def read_config(uri: str, options: storage.StorageOptions | None = None) -> Config:
    """The configuration that a checkpoint was trained with.

    Raises:
        CheckpointError: it is missing, or of another version of this project.
    """
    values = _config_values(uri, options)
    # Not today's default: a run that did not know the field trained as with these.
    for section, fields in _BEFORE_THE_FIELD.items():
        values[section] = fields | values.get(section, {})
    try:
        return parse_config(values, [], storage.join(uri, CONFIG))
    except ConfigError as error:
        raise CheckpointError(f"{error}; the checkpoint is of another version of tilestream") from error


def _config_values(uri: str, options: storage.StorageOptions | None) -> dict[str, Any]:
    path = storage.join(uri, CONFIG)
    try:
        values = yaml.safe_load(storage.read_bytes(path, options)) if storage.exists(path, options) else None
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: missing or damaged; delete this folder to go on from the one before")
    return cast("dict[str, Any]", values)


def verify(uri: str, options: storage.StorageOptions | None = None) -> None:
    """Reads a checkpoint's state through and compares it with its checksums, in little memory.

    Raises:
        CheckpointError: it does not match.
    """
    meta, path = read_meta(uri, options), storage.join(uri, STATE)
    if meta.version > _ONE_FILE:
        state_files.verify(uri, read_index(uri, options), options)
        return
    known, nbytes = hashlib.sha256(), 0
    if storage.exists(path, options):
        with storage.reading(path, options) as file:
            while piece := file.read(_PIECE):
                known.update(piece)
                nbytes += len(piece)
    if known.hexdigest() != meta.sha256:
        raise _mismatch(uri, nbytes, meta)


def load(uri: str, options: storage.StorageOptions | None = None, beginning: str = "") -> dict[str, Any]:
    """Lightning's checkpoint of a folder, on the CPU; nothing in it is ever executed.

    beginning: of the names (`state_files.named_tensors`) of the tensors that are wanted; others may have no values.

    Raises:
        CheckpointError: it does not match its checksums, or holds more than tensors and plain values.
    """
    index = read_index(uri, options)
    if not index.is_one_file:
        return state_files.load_whole(uri, index, options, lambda name: name.startswith(beginning))
    verify(uri, options)
    with storage.reading(storage.join(uri, STATE), options) as file, _unreadable(uri):
        return torch.load(file, map_location="cpu", weights_only=True)


def read_index(uri: str, options: storage.StorageOptions | None = None) -> Index:
    """What a checkpoint has but for its tensors' values, which are not looked at.

    Raises:
        CheckpointError: it is not what was written, or holds more than tensors and plain values.
    """
    meta, path = read_meta(uri, options), storage.join(uri, STATE)
    if meta.version > _ONE_FILE:
        content = storage.read_bytes(path, options) if storage.exists(path, options) else b""
        if hashlib.sha256(content).hexdigest() != meta.sha256:
            raise _mismatch(uri, len(content), meta)
        with _unreadable(uri):
            return Index.from_bytes(content)
    if (nbytes := storage.stat(path, options).size) != meta.nbytes:
        raise _mismatch(uri, nbytes, meta)
    with storage.reading(path, options) as file, _unreadable(uri):
        return Index(torch.load(file, map_location="meta", weights_only=True), None)


@contextlib.contextmanager
def _unreadable(uri: str) -> Generator[None]:
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"{uri}: {STATE} can't be read: {error}".splitlines()[0]) from error


def _mismatch(uri: str, nbytes: int, meta: Meta) -> CheckpointError:
    return CheckpointError(
        f"{uri}: {STATE} of {nbytes:,} bytes does not match its checksum ({meta.nbytes:,} were written); "
        "delete this folder to go on from the one before"
    )


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], uri: str) -> None:
    """Gives a module weights that must fit key by key and shape by shape; those of its type are not copied.

    Raises:
        CheckpointError: naming what is missing, left over or of another shape.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = sorted(key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape)
    if not (missing or extra or shapes):
        fitting = {key: weight.to(own[key].dtype).contiguous() for key, weight in weights.items()}
        module.load_state_dict(fitting, assign=True)
        return
    parts = [f"{len(missing)} missing ({missing[0]})"] if missing else []
    parts += [f"{len(extra)} left over ({extra[0]})"] if extra else []
    if shapes:
        key = shapes[0]
        parts.append(
            f"{len(shapes)} of another shape ({key}: {tuple(weights[key].shape)}, not {tuple(own[key].shape)})"
        )
    raise CheckpointError(
        f"{uri}: weights of another architecture: {', '.join(parts)}; take the configuration of the run's start"
    )
