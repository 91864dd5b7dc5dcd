"""What an hour of streaming costs: a capacity times a price list."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import yaml

from streaming import storage
from streaming.errors import ConfigError
from streaming.operate.capacity import Capacity


@dataclass(frozen=True, kw_only=True)
class Prices:
    """A price list, in its own currency."""

    currency: str
    """what the numbers are in"""
    gpu_hour: float
    """an hour of one GPU with its share of the node"""
    reader_node_hour: float
    """an hour of a reader node"""
    reader_node_cores: int
    """cores of a reader node"""
    reader_node_gbit_s: float
    """network of a reader node, Gbit/s each way"""
    requests_1000: float
    """a thousand GETs"""
    read_gb: float
    """a GB (10^9 bytes) out of the storage"""
    cross_zone_gb: float
    """a GB of pixels between readers and trainers"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least_ok = isinstance(value, str) if name == "currency" else _is_price(value)
            if not least_ok:
                raise ConfigError(f"price {name} is {value!r}; give a number of at least 0")
        for name in ("reader_node_cores", "reader_node_gbit_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")


def _is_price(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


@dataclass(frozen=True)
class Cost:
    """One line of the bill."""

    what: str
    an_hour: float
    a_million_tiles: float


def read_prices(uri: str) -> Prices:
    """A price list from a YAML file; deploy/prices.yaml is an example.

    Raises:
        ConfigError: a price is missing, unknown or no number.
        StorageError: the file can't be read.
    """
    try:
        values: Any = yaml.safe_load(storage.read_bytes(uri))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: not YAML: {' '.join(str(error).split())}") from error
    wanted = {field.name for field in fields(Prices)}
    given: set[str] = set(values) if isinstance(values, dict) else set()
    if given != wanted:
        missing, unknown = ", ".join(sorted(wanted - given)), ", ".join(sorted(map(str, given - wanted)))
        raise ConfigError(f"{uri}: prices missing: {missing or 'none'}; unknown: {unknown or 'none'}")
    return Prices(**values)


def bill(capacity: Capacity, gpus: int, prices: Prices) -> list[Cost]:
    """The lines of the bill and their sum, last."""
    hours = {
        "GPUs": gpus * prices.gpu_hour,
        "reader nodes": capacity.reader_nodes * prices.reader_node_hour,
        "GETs": capacity.requests_s * 3600 / 1000 * prices.requests_1000,
        "bytes out of the storage": capacity.nbytes_s * 3600 / 1e9 * prices.read_gb,
        "pixels to the trainers": capacity.network_nbytes_s * 3600 / 1e9 * prices.cross_zone_gb,
    }
    hours["all"] = sum(hours.values())
    millions = capacity.tiles_s * 3600 / 1e6
    return [Cost(what, an_hour, an_hour / millions) for what, an_hour in hours.items()]
