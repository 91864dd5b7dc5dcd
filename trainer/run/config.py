"""The whole configuration of a run, one class a section; `--section.key value` sets any field."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from streaming import storage
from streaming.delivery.stream import BatchShape
from streaming.errors import ConfigError
from streaming.plan.plan import DEFAULT_MPP
from streaming.plan.universe import Universe
from streaming.reading.hsv_rule import HsvRule
from streaming.storage.staging import Staging
from trainer.configs import preset_text, presets
from trainer.recipe.augment import Augmentation
from trainer.recipe.diagnostics import WatchConfig
from trainer.recipe.masks import Masking
from trainer.recipe.schedule import Schedules, scaled_lr


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives."""

    out: str = "runs/default"
    """folder or URI of the run: checkpoints, metrics, the resolved configuration; a run found there is resumed"""
    seed: int = 0
    """decides the tiles, the crops, the masks and the initial weights"""
    loggers: tuple[str, ...] = ("csv",)
    """where metrics go beside metrics.parquet: csv (local runs), tensorboard, wandb, mlflow"""

    def __post_init__(self) -> None:
        for name in self.loggers:
            if name not in ("csv", "tensorboard", "wandb", "mlflow"):
                raise ValueError(f"loggers names {name!r}; take csv, tensorboard, wandb or mlflow")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tiles."""

    catalog: str | None = None
    """folder or URI that `tilestream catalog` wrote"""
    storage_options: dict[str, Any] = field(default_factory=dict)
    """fsspec's options for all remote URIs of the run; empty: the usual environment variables"""
    mpp: dict[float, float] = field(default_factory=lambda: dict(DEFAULT_MPP))
    """weight of each magnification in µm/px"""
    cohorts: dict[str, float] | None = None
    """weight of each value of the catalog's `cohort` column; none: every slide alike"""
    tile_size: int = 256
    """side of a tile in px"""
    min_tissue: float = 0.4
    """share of a tile's area that must be tissue"""
    max_upsampling: float = 2.0
    """a slide is left out at magnifications this many times finer than its own"""
    universe: Universe = field(default_factory=Universe)
    """which part of the catalog's tiles may be drawn, and in what order"""
    hsv_rule: HsvRule = field(default_factory=HsvRule)
    """filter on a tile's pixels"""
    max_failed_share: float = 0.01
    """share of unreadable tiles past which the run stops"""
    readers: tuple[int, int] = (1, 2)
    """least and most reader actors"""
    reader_cpus: float = 1.0
    """CPU slots of a reader actor"""
    requests_in_flight: int = 32
    """requests to the storage that a reader keeps under way"""
    reader_labels: dict[str, str] = field(default_factory=dict)
    """labels of the nodes that readers run on; empty: any node"""
    segment_blocks: int = 2000
    """micro-batches that Ray Data plans at once; a run is a chain of such segments"""
    stall_s: float | None = 900.0
    """seconds that a rank waits for a batch before the run stops and says why; none: for ever"""
    staging: str = Staging.folder
    """local folder for copies of remote slides"""
    staging_gb: float = 100.0
    """disk that those copies may take, in GiB"""

    def __post_init__(self) -> None:
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share is a share from 0 to 1, not {self.max_failed_share}")
        if not self.staging_gb > 0:
            raise ValueError(f"staging_gb is {self.staging_gb}; it must be above 0")
        if self.requests_in_flight < 1:
            raise ValueError(f"requests_in_flight is {self.requests_in_flight}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Backbone and heads."""

    backbone: str = "vit_small_patch14_dinov2"
    """name of a timm vision transformer"""
    patch_size: int | None = None
    """side of a patch in px; none: the backbone's own"""
    num_registers: int | None = None
    """register tokens; none: the backbone's own"""
    ffn: Literal["mlp", "swiglu"] | None = None
    """feed-forward part of the blocks; none: the backbone's own"""
    layer_scale: float | None = 1e-5
    """initial scale of residual branches"""
    drop_path: float = 0.1
    """stochastic depth of the student"""
    num_prototypes: int = 65536
    """width of the heads' output"""
    head_hidden: int = 2048
    """width of the heads' hidden layers"""
    head_bottleneck: int = 256
    """width before the prototypes"""
    separate_heads: bool = False
    """whether iBOT has a head of its own"""
    ibot_prototypes: int | None = None
    """width of that head's output; none: num_prototypes"""
    ibot_bottleneck: int | None = None
    """width before its prototypes; none: head_bottleneck"""
    init: str | None = None
    """weights to start from: a checkpoint of ours (student, teacher and heads), a file of DINOv2 weights in timm's
    naming (.safetensors, .pth), or a name of timm's hub such as vit_small_patch14_dinov2.lvd142m; none: random"""

    def __post_init__(self) -> None:
        if not self.separate_heads and (self.ibot_prototypes or self.ibot_bottleneck):
            raise ValueError("ibot_prototypes and ibot_bottleneck are of iBOT's own head; set separate_heads true")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and temperatures of the loss terms."""

    dino_weight: float = 1.0
    """weight of the class-token term"""
    ibot_weight: float = 1.0
    """weight of the masked-token term"""
    regulariser: Literal["koleo", "kde", "none"] = "koleo"
    """what spreads the class tokens of each global view"""
    koleo_weight: float = 0.1
    """weight of the KoLeo regulariser, per view"""
    kde_weight: float = 0.05
    """weight of the KDE regulariser, per view"""
    kde_concentration: float = 5.0
    """concentration κ of its kernel exp(κ·cosine)"""
    regulariser_over_ranks: bool = True
    """whether it compares the crops of all ranks; the reference's KoLeo stays on its own"""
    centring: Literal["sinkhorn", "centring"] = "sinkhorn"
    """how the teacher's targets are kept from collapse: Sinkhorn-Knopp, or DINO's moving mean"""
    centre_momentum: float = 0.9
    """momentum of that mean"""
    student_temp: float = 0.1
    """temperature of the student's softmax"""

    def __post_init__(self) -> None:
        if not 0 <= self.centre_momentum < 1:
            raise ValueError(f"centre_momentum is {self.centre_momentum}; it must be in [0, 1)")
        if not (self.kde_concentration > 0 and self.student_temp > 0):
            raise ValueError(
                f"kde_concentration {self.kde_concentration}, student_temp {self.student_temp}: both must be above 0"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and schedules, all in optimiser steps."""

    base_lr: float = 2e-4
    """learning rate at batch 1024; scaled by the square root of batch / 1024"""
    min_lr: float = 1e-6
    """learning rate at the end"""
    warmup_steps: int = 100
    """steps of linear learning-rate warm-up"""
    beta2: float = 0.999
    """AdamW's second momentum"""
    weight_decay: float = 0.04
    """weight decay at the start"""
    weight_decay_end: float = 0.4
    """weight decay at the end"""
    layer_decay: float = 0.9
    """factor of the learning rate from a block to the one below"""
    patch_embed_lr_mult: float = 0.2
    """factor of the patch embedding's learning rate"""
    clip: float = 3.0
    """highest gradient norm of the backbone and of each head"""
    freeze_last_layer_steps: int = 0
    """steps before the heads' last layers learn"""
    momentum: float = 0.994
    """the teacher's momentum at the start; 1 at the end"""
    teacher_temp_start: float = 0.04
    """teacher's temperature at step 0"""
    teacher_temp: float = 0.07
    """teacher's temperature after its warm-up"""
    teacher_temp_warmup_steps: int = 0
    """steps of that warm-up"""

    def schedules(self, total_steps: int, batch: int) -> Schedules:
        """The schedules of a run of that many steps and that global batch."""
        return Schedules(
            total_steps=total_steps,
            lr=scaled_lr(self.base_lr, batch),
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            weight_decay_end=self.weight_decay_end,
            momentum=self.momentum,
            teacher_temp_start=self.teacher_temp_start,
            teacher_temp=self.teacher_temp,
            teacher_temp_warmup_steps=self.teacher_temp_warmup_steps,
            freeze_last_layer_steps=self.freeze_last_layer_steps,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how large, on what."""

    steps: int = 1000
    """optimiser steps of the whole run"""
    batch: int = 64
    """tiles of an optimiser step, over all ranks and accumulation rounds"""
    ranks: int = 1
    """trainer workers"""
    accumulate: int = 1
    """rounds of gradient accumulation within a step"""
    gpu: bool = False
    """whether each rank takes a GPU"""
    rank_cpus: float = 1.0
    """CPU slots of a rank"""
    rank_resources: dict[str, float] = field(default_factory=dict)
    """what else a rank takes of its node: Ray's resources by name, such as another maker's accelerator"""
    rank_labels: dict[str, str] = field(default_factory=dict)
    """labels of the nodes that ranks run on; empty: any node"""
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    """32-true; bf16-mixed: weights in float32, products in bfloat16; bf16-true: all in bfloat16"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each rank holds the model; fsdp: each holds its share of weights, gradients, moments and teacher (FSDP2)"""
    compile: bool = False
    """whether torch.compile is run on the blocks"""
    activation_checkpointing: bool = False
    """whether the backward pass computes the blocks' activations anew instead of keeping them"""
    log_every: int = 10
    """steps between two rows of the metrics"""
    checkpoint_every: int = 500
    """steps between two checkpoints"""
    checkpoint_minutes: float | None = 30.0
    """minutes after which a checkpoint is due besides; none: only by steps"""
    keep_checkpoints: int = 3
    """newest checkpoints that are kept"""
    max_restarts: int = 3
    """how often Ray Train starts the workers again from the last checkpoint when one is lost"""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.checkpoint_minutes is not None and not self.checkpoint_minutes > 0:
            raise ValueError(f"checkpoint_minutes is {self.checkpoint_minutes}; it must be above 0, or none")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts is {self.max_restarts}; it must not be negative")
        _ = self.shape  # tells at once when the ranks don't divide the batch

    @property
    def shape(self) -> BatchShape:
        """How the batch is cut."""
        return BatchShape(self.batch, self.ranks, self.accumulate)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: Augmentation = field(default_factory=Augmentation)
    mask: Masking = field(default_factory=lambda: Masking(group_size=4))
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} exceeds train.steps {self.train.steps}; lower it"
            )
        if self.watch.knn_dataset and self.watch.knn_every % self.train.log_every:
            raise ValueError(
                f"watch.knn_every {self.watch.knn_every} is no multiple of train.log_every {self.train.log_every}"
            )
        if self.augment.global_size > self.data.tile_size * 2:
            raise ValueError(
                f"augment.global_size {self.augment.global_size} is over twice data.tile_size {self.data.tile_size}"
            )

    def to_yaml(self) -> str:
        """The resolved configuration, as a file that `tilestream train` takes."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


# What may change from one start of a run to the next without changing what is trained.
FREE_FIELDS = {
    "run": ("out",),
    "data": (
        *("catalog", "storage_options", "max_failed_share", "readers", "reader_cpus", "reader_labels"),
        *("segment_blocks", "stall_s", "staging", "staging_gb", "requests_in_flight"),
    ),
    "model": ("init",),
    "train": (
        *("ranks", "gpu", "rank_cpus", "rank_labels", "rank_resources", "strategy"),
        *("compile", "activation_checkpointing"),
        *("log_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "max_restarts"),
    ),
    "watch": tuple(entry.name for entry in fields(WatchConfig)),
}
# What no force can change: another model's weights don't fit, another batch's next index lies within a step.
_FIXED = ("model.", "train.batch", "augment.global_size")


def recipe_changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """Fields of the recipe that differ, with both values: those that may be forced, and those that can't be."""
    was, becomes = _flat(_plain(asdict(before))), _flat(_plain(asdict(now)))
    free = {f"{section}.{name}" for section, names in FREE_FIELDS.items() for name in names}
    changed = [
        key
        for key in becomes | was
        if was.get(key) != becomes.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in free)
    ]
    fixed = [key for key in changed if key.startswith(_FIXED) and key != "model.drop_path"]
    told = {key: f"{key} {was.get(key)} (now {becomes.get(key)})" for key in changed}
    return [told[key] for key in changed if key not in fixed], [told[key] for key in fixed]


def _flat(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def config_parser() -> ArgumentParser:
    """A parser with an option for every field."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, prog="tilestream train CONFIG")
    parser.add_class_arguments(Config, nested_key=None, sub_configs=False)
    return parser


def read_config(source: str, overrides: list[str]) -> Config:
    """A YAML file (path or URI) or a preset's name, with `--section.key value` overrides.

    Raises:
        ConfigError: no such file or preset, an unknown key (with the nearest valid one), an ill-typed value, or values
            that don't go together.
        StorageError: the file can't be read.
    """
    if source in presets():
        text = preset_text(source)
    elif storage.exists(source):
        text = storage.read_bytes(source).decode()
    else:
        raise ConfigError(f"{source}: neither a file nor a preset; presets: {', '.join(presets())}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: not a map of sections; see the presets for an example")
    return parse_config(values, overrides, source)


def parse_config(values: dict[str, Any], overrides: list[str], source: str = "configuration") -> Config:
    """The configuration of nested values, with `--section.key value` overrides.

    Raises:
        ConfigError: as `read_config`.
    """
    parser = config_parser()
    keys = sorted(list(parser.get_defaults().keys()))  # noqa: C414 — a Namespace iterates over values
    for key in _leaf_keys(values):
        if any(known.startswith(f"{key}.") for known in keys):
            raise ConfigError(f"{source}: {key!r} is a section; write its fields below it, for example {key}: {{…}}")
        _check_key(key, keys, source)
    for option in overrides:
        if option.startswith("--"):
            _check_key(option[2:].split("=", 1)[0], keys, option)
    try:
        base = parser.parse_object(values)
        namespace = parser.parse_args(overrides, namespace=base) if overrides else base
        instantiated = parser.instantiate(namespace)
        return Config(**vars(instantiated))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from error


def _leaf_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys of the fields that values sets; dictionaries that are a field's value (weights, options) are not entered."""
    keys: list[str] = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_section = isinstance(value, dict) and key not in _DICT_FIELDS
        keys += _leaf_keys(value, f"{key}.") if is_section else [key]
    return keys


_DICT_FIELDS = {
    "data.mpp",
    "data.cohorts",
    "data.storage_options",
    "data.reader_labels",
    "train.rank_labels",
    "train.rank_resources",
}


def _check_key(key: str, keys: list[str], source: str) -> None:
    sections = {known.rsplit(".", 1)[0] for known in keys}
    if key in keys or key in sections or any(key.startswith(f"{field_name}.") for field_name in _DICT_FIELDS):
        return
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    raise ConfigError(f"{source}: no key {key!r}; the nearest is {close[0]!r}")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)
