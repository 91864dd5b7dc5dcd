"""The whole configuration of a run, one class a section: assembled, checked across sections, and read."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from streaming import storage
from streaming.catalog import Catalog
from streaming.delivery.stream import TileStream
from streaming.errors import ConfigError
from streaming.mirrors import default_mirrors
from streaming.plan.list_packing import packed_list
from streaming.plan.universe import HeldOut
from streaming.secrets import Secret
from trainer.configs import preset_text, presets
from trainer.recipe.augment import Augmentation
from trainer.recipe.free_field import FREE
from trainer.recipe.losses import LossConfig
from trainer.recipe.masks import Masking
from trainer.recipe.network import ModelConfig
from trainer.recipe.recipe import Recipe
from trainer.recipe.schedule import OptimConfig, Schedules
from trainer.run.data import DataConfig, make_stream
from trainer.run.execution import RunConfig, TrainConfig
from trainer.run.guard import WatchConfig


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
    watch: WatchConfig = field(default_factory=WatchConfig, metadata=FREE)

    def __post_init__(self) -> None:
        if self.watch.validation_slides and self.watch.validation_every % self.train.log_every:
            raise ValueError(
                f"watch.validation_every {self.watch.validation_every} is no multiple of train.log_every "
                f"{self.train.log_every}"
            )
        if self.train.flops is None:
            Schedules(self.optim, self.train.steps, self.train.batch)  # tells of schedules that don't fit the run
        if self.watch.knn_dataset and self.watch.knn_every % self.train.log_every:
            raise ValueError(
                f"watch.knn_every {self.watch.knn_every} is no multiple of train.log_every {self.train.log_every}"
            )
        stall_s, collective_s = self.data.stall_s, self.train.collective_minutes * 60
        if stall_s is not None and stall_s >= collective_s:
            raise ValueError(
                f"train.collective_minutes {self.train.collective_minutes:g} are {collective_s:g} s, no longer than "
                f"data.stall_s {stall_s:g}: ranks would be ended before the stream says why it stands still; raise it"
            )
        least, most = self.train.ranks_range
        if least not in self.possible_ranks:
            raise ValueError(
                f"train.ranks [{least}, {most}]: {least} ranks can't take a batch of {self.train.batch} in groups of "
                f"{self._group_size} masks; of these numbers {', '.join(map(str, self.possible_ranks))} can"
            )
        if least < most and self.train.rank_labels and not (self.train.gpu or self.train.rank_resources):
            raise ValueError(
                f"train.ranks [{least}, {most}]: Ray counts the room for ranks by resources, not by train.rank_labels; "
                "name a resource that only their nodes have in train.rank_resources"
            )
        self.augment.check_views(self.data.num_views)
        if self.augment.global_size > self.data.tile_size * 2:
            raise ValueError(
                f"augment.global_size {self.augment.global_size} is over twice data.tile_size {self.data.tile_size}"
            )

    @property
    def _group_size(self) -> int:
        """Crops of a mask's group, as `fitted` settles it."""
        return math.gcd(self.train.shape.micro, self.mask.group_size)

    @property
    def possible_ranks(self) -> tuple[int, ...]:
        """The numbers of ranks that the run may go on with, of those from the least to the most."""
        least, most = self.train.ranks_range
        return tuple(n for n in range(least, most + 1) if self.train.rounds_on(n, self._group_size))

    def on(self, num_ranks: int) -> Config:
        """The configuration of a rank among so many: with them and their rounds, and else the same."""
        rounds = self.train.rounds_on(num_ranks, self._group_size)
        assert rounds is not None, f"{num_ranks} is one of {self.possible_ranks}"
        train = replace(self.train, ranks=num_ranks, accumulate=rounds, max_micro_batch=None)
        return replace(self, train=train)

    @property
    def recipe(self) -> Recipe:
        """What is trained."""
        return Recipe(augment=self.augment, mask=self.mask, model=self.model, loss=self.loss, optim=self.optim)

    @property
    def held_out(self) -> HeldOut | None:
        """The patients that are not trained on."""
        return HeldOut(self.watch.validation_slides) if self.watch.validation_slides else None

    @property
    def _columns(self) -> tuple[str, ...]:
        """Columns of the catalog that decide which tiles are drawn, or stay."""
        return (*self.data.strata.columns, *(["stain"] if self.data.filters.by_stain else []))

    def identity(self, catalog: Catalog) -> str:
        """What of a catalog, and of a list of tiles, decides the tiles that are trained on, as a fingerprint."""
        of_catalog, data = catalog.identity(self._columns), self.data
        if data.tiles is None:
            return of_catalog
        tiles = packed_list(data.tiles, catalog, data.tile_size, data.mpp_tolerance, data.max_upsampling)
        return hashlib.blake2b(f"{of_catalog} {tiles.digest}".encode(), digest_size=8).hexdigest()

    def stream(self, catalog: Catalog) -> TileStream:
        """The tiles that are trained on."""
        return make_stream(self.data, self.run.seed, self.train.shape, catalog, self.held_out)

    def to_yaml(self) -> str:
        """The resolved configuration, as a file that `tilestream train` takes; without secrets of the storage."""
        return yaml.safe_dump(plain(asdict(self)), sort_keys=False)


class Leaf(NamedTuple):
    """A field of the configuration that is no section."""

    key: str
    """as `--section.key` has it"""
    kind: Any
    """its type"""
    is_free: bool
    """whether it, or a section that it is in, may change from one start of a run to the next"""


def leaves(section: type[Any] = Config, prefix: str = "", *, is_free: bool = False) -> Iterator[Leaf]:
    """The fields of a section and of those within it."""
    kinds = get_type_hints(section)
    for entry in fields(section):
        key, kind, free = prefix + entry.name, kinds[entry.name], bool(entry.metadata.get("free", is_free))
        if is_dataclass(kind):
            yield from leaves(cast("type[Any]", kind), f"{key}.", is_free=free)
        else:
            yield Leaf(key, kind, free)


# Keys of the fields that hold dictionaries (weights, options, labels), whose keys are no fields.
_DICT_FIELDS = frozenset(
    leaf.key for leaf in leaves() if dict in (get_origin(part) for part in (leaf.kind, *get_args(leaf.kind)))
)
# Those whose values may be secret.
_SECRET_FIELDS = ("data.storage_options", "data.mirrors")

# A value that the parser refuses for its type, in its own words.
_ILL_TYPED = re.compile(r'Parser key "(?P<key>[\w.]+)": .*(?:Got|Given) value: ?(?P<value>.*)')
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def plain(value: Any) -> Any:
    """Nested values as YAML has them: lists for tuples, and no secrets."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items() if not isinstance(entry, Secret)}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value


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
        text = _text_of(source)
    else:
        raise ConfigError(f"{source}: neither a file nor a preset; presets: {', '.join(presets())}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        # Its own words quote the line, which may hold a secret.
        at, why = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {at.line + 1}, column {at.column + 1}" if at else ""
        raise ConfigError(f"{source}{where}: not YAML: {why or 'it holds characters that YAML does not'}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: not a map of sections; see the presets for an example")
    return parse_config(values, overrides, source)


def _text_of(source: str) -> str:
    try:
        return storage.read_bytes(source).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not YAML: byte {error.start} is no UTF-8") from None


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
        config = Config(**vars(instantiated))
    except (ArgumentError, ValueError, TypeError) as error:
        text = _one_line(error)
        if secret := next((key for key in _SECRET_FIELDS if key in text), None):
            # The error's own words quote them.
            raise ConfigError(
                f"{source}: {secret} is a map, such as {{region: eu-west-1}}; what is given is none"
            ) from None
        raise ConfigError(f"{source}: {text}") from error
    # Told here, since workers on other machines have another environment.
    return replace(config, data=replace(config.data, mirrors=config.data.mirrors or default_mirrors()))


def changed(config: Config, overrides: list[str], options: dict[str, Any]) -> Config:
    """A run's configuration with `--section.key value` overrides and options of the storage, which files do not hold.

    Raises:
        ConfigError: as `read_config`.
    """
    config = parse_config(plain(asdict(config)), overrides) if overrides else config
    mirrors = options.get("mirrors", config.data.mirrors)
    given = {name: value for name, value in options.items() if name != "mirrors"}
    data = replace(config.data, storage_options={**config.data.storage_options, **given}, mirrors=mirrors)
    return replace(config, data=data)


def _leaf_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys of the fields that values sets; dictionaries that are a field's value are not entered."""
    keys: list[str] = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_section = isinstance(value, dict) and key not in _DICT_FIELDS
        keys += _leaf_keys(value, f"{key}.") if is_section else [key]
    return keys


def _check_key(key: str, keys: list[str], source: str) -> None:
    sections = {known.rsplit(".", 1)[0] for known in keys}
    if key in keys or key in sections or any(key.startswith(f"{field_name}.") for field_name in _DICT_FIELDS):
        return
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    raise ConfigError(f"{source}: no key {key!r}; the nearest is {close[0]!r}")


def _one_line(error: Exception) -> str:
    """An error's own words, or of a value of the wrong type what the field takes instead of Python's types."""
    text = " ".join(str(error).split())
    found = _ILL_TYPED.match(text)
    kind = next((leaf.kind for leaf in leaves() if found and leaf.key == found["key"]), None)
    return f"{found['key']} is {found['value']!r}; give {_wanted(kind)}" if found and kind else text


def _wanted(kind: Any) -> str:
    """What a field of a type takes, in words."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}"
    if origin in (Union, UnionType):
        return ", or ".join(dict.fromkeys(map(_wanted, inside)))
    if origin is tuple:
        many = "a list, such as [a, b], of" if inside[-1] is ... else f"a list of {len(inside)}, [a, b], each"
        return f"{many} {_wanted(inside[0])}"
    if is_dataclass(kind):
        return f"{{{', '.join(f'{entry.name}: …' for entry in fields(kind))}}}"
    return "a map, such as {a: 1, b: 2}" if origin is dict else _WORDS.get(kind, str(kind))
