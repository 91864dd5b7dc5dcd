"""How many readers a training needs, and which limit it meets first: arithmetic on measured costs, nothing is run.

A reader keeps `requests_in_flight` requests under way, each of which takes the storage's latency plus the time its
bytes take, works on some batches at once, each of which waits for its last tiles in rounds (those turned down are asked
for anew), and decodes with as many cores as it has: it gives the smallest of these rates. What all readers share
(storage, network, the process that schedules Ray Data's blocks, the cores of the machine) bounds their sum.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace

from streaming import storage
from streaming.errors import ConfigError
from streaming.reading.batch_reading import batches_at_once

BLOCK_PX = 256  # what most scanners write, and what the defaults were measured with


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """What one tile costs, measured by `tilestream bench scale`.

    The defaults are 256 px tiles of JPEG slides at 0.25 µm/px, 2026-11-28, on two cores (`benchmarks/RESULTS.md`).
    """

    reader_cpu_s: float = 0.00205
    """CPU seconds in the reader: plan, requests, decoding, filter, assembling"""
    transport_cpu_s: float = 0.00018
    """CPU seconds in Ray's own processes on a node, which write and send the object"""
    consumer_s: float = 0.00008
    """CPU seconds in which a rank takes a tile from the object store"""
    reader_cores: float = 1.3
    """cores that one reader process keeps busy at most; Python's lock holds it below its number of threads"""
    requests: float = 2.04
    """ranged GETs"""
    nbytes: float = 47_500.0
    """bytes fetched from the storage"""
    tile_nbytes: float = 196_700.0
    """bytes in the object store: pixels, index, position"""
    blocks: float = 4.08
    """compressed blocks decoded, for tiles that begin anywhere"""
    block_cpu_s: float = 0.00034
    """CPU seconds of `reader_cpu_s` for one of them: asked for, decoded, put into the tile"""
    jpeg2000_block_cpu_s: float = 0.0041
    """the same for a block of JPEG 2000"""
    replaced: float = 0.01
    """tiles turned down, or not readable, for each one handed out; all other costs hold theirs"""
    rule_cpu_s: float = 0.00006
    """CPU seconds of `reader_cpu_s` in which the HSV rule looks at a tile"""
    block_s: float = 0.0041
    """seconds of the one process that schedules the stream, per block of one micro-batch"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name in ("replaced", "rule_cpu_s")))):
                raise ConfigError(f"cost {name} is {value}; it must be above 0")


def read_costs(uri: str) -> StageCosts:
    """Costs from a JSON file, which may leave some at their defaults.

    Raises:
        ConfigError: a cost is unknown or no number above 0.
        StorageError: the file can't be read.
    """
    try:
        values = json.loads(storage.read_bytes(uri))
        return StageCosts(**values)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: not JSON: {error}") from error
    except TypeError as error:
        known = ", ".join(field.name for field in fields(StageCosts))
        raise ConfigError(f"{uri}: {error}; costs are numbers named {known}") from error


def costs_of_size(costs: StageCosts, size: int) -> StageCosts:
    """Costs measured with 256 px tiles, for tiles of that side.

    Bytes and seconds go with a tile's area, requests (one a row of blocks, of which a tile crosses its own height and
    one more) with its side.
    """
    side = size / 256
    by_area = ("reader_cpu_s", "rule_cpu_s", "transport_cpu_s", "consumer_s", "nbytes", "blocks")
    area = {name: getattr(costs, name) * side**2 for name in by_area}
    return replace(costs, **area, tile_nbytes=costs.tile_nbytes * side**2, requests=costs.requests * (side + 1) / 2)


def costs_of_views(costs: StageCosts, num_views: int) -> StageCosts:
    """Costs of a tile, for samples that have a tile of each of so many views."""
    names = (
        "reader_cpu_s",
        "rule_cpu_s",
        "transport_cpu_s",
        "consumer_s",
        "requests",
        "nbytes",
        "tile_nbytes",
        "blocks",
    )
    return replace(costs, **{name: getattr(costs, name) * num_views for name in names})


def costs_on_blocks(costs: StageCosts, size: int) -> StageCosts:
    """Costs of tiles of that side that begin anywhere, for those that begin on blocks, of 256 px.

    Along each axis a tile touches 1 + (size - 1) / 256 blocks on average where it begins anywhere, and size / 256,
    rounded up, at the least. Requests go with the rows of blocks, bytes and decoding with the blocks.
    """
    rows = math.ceil(size / BLOCK_PX) / (1 + (size - 1) / BLOCK_PX)
    spared = costs.blocks * (1 - rows**2) * costs.block_cpu_s
    return replace(
        costs,
        requests=costs.requests * rows,
        nbytes=costs.nbytes * rows**2,
        blocks=costs.blocks * rows**2,
        reader_cpu_s=max(costs.reader_cpu_s - spared, costs.reader_cpu_s * rows**2),
    )


def costs_with_jpeg2000(costs: StageCosts, share: float) -> StageCosts:
    """Costs of JPEG tiles, for a mix of which that share is JPEG 2000, with as many bytes.

    Raises:
        ConfigError: it is no share.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of JPEG 2000 is {share}; give 0 to 1")
    dearer_s = costs.jpeg2000_block_cpu_s - costs.block_cpu_s
    return replace(
        costs,
        reader_cpu_s=costs.reader_cpu_s + share * costs.blocks * dearer_s,
        block_cpu_s=costs.block_cpu_s + share * dearer_s,
    )


def costs_without_rule(costs: StageCosts) -> StageCosts:
    """Costs of tiles that the HSV rule looks at, for those that are taken as they come."""
    looked_at = 1 + costs.replaced
    return replace(
        costs,
        reader_cpu_s=costs.reader_cpu_s / looked_at - costs.rule_cpu_s,
        requests=costs.requests / looked_at,
        nbytes=costs.nbytes / looked_at,
        blocks=costs.blocks / looked_at,
        replaced=0.0,
        rule_cpu_s=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Storage and machines; None: without bound."""

    latency_s: float = 0.03
    """seconds from a request to the first byte of its answer"""
    connection_nbytes_s: float = 50e6
    """bytes/s of one connection to the storage"""
    requests_in_flight: int = 32
    """requests that a reader keeps under way"""
    reader_cores: float = 1.0
    """cores that a reader may keep busy"""
    node_cores: int = 32
    """cores of a reader node"""
    node_nbytes_s: float = 1.25e9
    """bytes/s of a reader node's network, each way"""
    storage_requests_s: float | None = 5500.0
    """GETs/s that the storage allows; S3: 5,500 for each prefix of the keys"""
    storage_nbytes_s: float | None = None
    """bytes/s that the storage gives to all"""
    max_readers: int | None = None
    """readers that may run"""
    headroom: float = 0.25
    """share of readers on top of what the mean needs, for stragglers and lost nodes"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least_ok = value is None or value > 0 or (value == 0 and name in ("latency_s", "headroom"))
            if not least_ok:
                raise ConfigError(f"{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class Limit:
    """Something that bounds the stream: what it is, at how many tiles/s, and what would raise it."""

    what: str
    tiles_s: float
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a training needs, and its limits, the first one first."""

    tiles_s: float
    """tiles/s that all GPUs consume"""
    readers: int
    """reader actors, headroom included"""
    reader_nodes: int
    """nodes for them"""
    reader_tiles_s: float
    """tiles/s of one reader"""
    reader_bound: str
    """what bounds one reader: `storage` or `CPU`"""
    requests_s: float
    """GETs/s to the storage"""
    nbytes_s: float
    """bytes/s from the storage"""
    network_nbytes_s: float
    """bytes/s of pixels from reader nodes to GPU nodes"""
    reader_store_nbytes: int
    """least object-store memory of a reader node, bytes"""
    rank_store_nbytes: int
    """least object-store memory for each rank, bytes"""
    limits: tuple[Limit, ...]
    """all limits by tiles/s, the lowest first"""

    @property
    def first(self) -> Limit:
        """The limit that growing demand meets first."""
        return self.limits[0]

    @property
    def holds(self) -> bool:
        """Whether the stream can feed the GPUs."""
        return self.first.tiles_s >= self.tiles_s

    def sentence(self) -> str:
        """One line: what comes first, and what to do."""
        first = self.first
        state = "enough" if self.holds else "too little"
        return (
            f"first limit: {first.what} at {first.tiles_s:,.0f} tiles/s, {state} for the {self.tiles_s:,.0f} wanted; "
            f"{'for more' if self.holds else 'to go on'}, {first.remedy}"
        )


def rounds_of_requests(num_tiles: int, replaced: float) -> float:
    """How many requests in a row a batch of tiles waits for on average, until none is turned down any more.

    So many are replaced for each tile handed out; each tile is turned down with the same chance p each time. That a
    batch is not done after k rounds has the chance 1 - (1 - pᵏ)ⁿ, whose sum over k is the mean.
    """
    chance, rounds, again = replaced / (1 + replaced), 1.0, 1.0
    while (again := again * chance) * num_tiles > 1e-3:
        rounds += 1 - (1 - again) ** num_tiles
    return rounds


def reader_rates(costs: StageCosts, around: Surroundings, micro_batch: int) -> tuple[float, float]:
    """Tiles/s of one reader as its requests allow, and as its cores allow; the smaller one counts."""
    request_s = around.latency_s + costs.nbytes / costs.requests / around.connection_nbytes_s
    by_slots = around.requests_in_flight / (costs.requests * request_s)
    at_once = batches_at_once(around.requests_in_flight, micro_batch, costs.requests)
    by_batches = at_once * micro_batch / (rounds_of_requests(micro_batch, costs.replaced) * request_s)
    by_cpu = min(around.reader_cores, costs.reader_cores) / costs.reader_cpu_s
    return min(by_slots, by_batches), by_cpu


def one_machine_rate(
    costs: StageCosts, around: Surroundings, *, readers: int, cores: int, micro_batch: int, other_cpu_s: float = 0.0
) -> float:
    """Tiles/s of some readers and one rank that share the cores of one machine; `bench scale` holds it against runs.

    other_cpu_s is CPU per tile of what else runs there, such as the benchmark's own storage server.
    """
    cpu_s = costs.reader_cpu_s + costs.transport_cpu_s + costs.consumer_s + costs.block_s / micro_batch + other_cpu_s
    return min(readers * min(reader_rates(costs, around, micro_batch)), cores / cpu_s, 1 / costs.consumer_s)


def plan_capacity(
    costs: StageCosts,
    *,
    gpus: int,
    tiles_per_second_per_gpu: float,
    micro_batch: int = 64,
    around: Surroundings | None = None,
) -> Capacity:
    """What it takes to feed that many GPUs, one rank each, whose micro-batches are one block each.

    Raises:
        ConfigError: a number that makes no sense.
    """
    around = around or Surroundings()
    if gpus < 1 or micro_batch < 1 or not tiles_per_second_per_gpu > 0:
        raise ConfigError(
            f"{gpus} GPUs of {tiles_per_second_per_gpu} tiles/s, micro-batch {micro_batch}: all must be above 0"
        )
    wanted = gpus * tiles_per_second_per_gpu
    by_storage, by_cpu = reader_rates(costs, around, micro_batch)
    rate = min(by_storage, by_cpu)
    needed = math.ceil(wanted / rate * (1 + around.headroom))
    readers = min(needed, around.max_readers or needed)
    # A node's cores also carry Ray's own processes, its network the bytes in and the pixels out.
    node_cores_per_reader = rate * (costs.reader_cpu_s + costs.transport_cpu_s)
    by_cores = max(1, math.floor(around.node_cores / max(node_cores_per_reader, around.reader_cores)))
    by_network = max(1, math.floor(around.node_nbytes_s / (rate * max(costs.nbytes, costs.tile_nbytes))))
    per_node = min(by_cores, by_network)
    block_nbytes = micro_batch * costs.tile_nbytes
    at_once = batches_at_once(around.requests_in_flight, micro_batch, costs.requests)
    return Capacity(
        tiles_s=wanted,
        readers=readers,
        reader_nodes=math.ceil(readers / per_node),
        reader_tiles_s=rate,
        reader_bound="storage" if by_storage < by_cpu else "CPU",
        requests_s=wanted * costs.requests,
        nbytes_s=wanted * costs.nbytes,
        network_nbytes_s=wanted * costs.tile_nbytes,
        # A reader works on some blocks while two finished ones wait to be taken.
        reader_store_nbytes=math.ceil(min(per_node, readers) * (at_once + 2) * block_nbytes),
        # A rank trains on one block, has two fetched ahead, and one is on its way.
        rank_store_nbytes=math.ceil(4 * block_nbytes),
        limits=_limits(costs, around, gpus, micro_batch, readers * rate, by_storage < by_cpu),
    )


def _limits(
    costs: StageCosts, around: Surroundings, gpus: int, micro_batch: int, supply: float, storage_bound: bool
) -> tuple[Limit, ...]:
    faster = "raise `requests_in_flight`" if storage_bound else "give each reader more cores"
    limits = [
        Limit("the readers", supply, f"{faster}, or add readers"),
        Limit("scheduling of blocks by the driver", micro_batch / costs.block_s, "take larger micro-batches"),
        Limit("the ranks' intake", gpus / costs.consumer_s, "take more ranks, or smaller tiles"),
    ]
    if around.storage_requests_s is not None:
        wide = around.storage_requests_s / costs.requests
        limits.append(Limit("the storage's requests/s", wide, "spread the slides over more prefixes or buckets"))
    if around.storage_nbytes_s is not None:
        wide = around.storage_nbytes_s / costs.nbytes
        limits.append(Limit("the storage's bandwidth", wide, "take storage with more bandwidth, or coarser mpp"))
    return tuple(sorted(limits, key=lambda limit: limit.tiles_s))
