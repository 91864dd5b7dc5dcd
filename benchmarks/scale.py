"""What feeds N GPUs, from costs measured here, and whether such arithmetic holds: `tilestream bench scale`.

A short run with one reader measures what a tile costs (CPU of each process, requests, bytes). From that, runs with 1, 2
and 4 readers are predicted, at 20 and 100 ms and with 16 to 128 requests in flight; then they are run. The same
arithmetic (`streaming/operate/capacity.py`) then answers for the GPUs and the storage that were asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import obstore

from benchmarks.common import made_slides
from benchmarks.latency_server import serve
from streaming import cluster, storage
from streaming.catalog import Catalog
from streaming.catalog.given import Given
from streaming.catalog.index_packs import save_indexes
from streaming.catalog.inspection import Inspected, inspect
from streaming.catalog.writing import merge, part_of, write
from streaming.delivery.stream import BatchShape, TileStream
from streaming.delivery.time_use import TimeUse
from streaming.operate.capacity import Capacity, StageCosts, Surroundings, one_machine_rate, plan_capacity, reader_rates
from streaming.plan import TilePlan
from streaming.plan.footprints import Corners
from streaming.reading.reader import ReaderOptions
from streaming.storage import clients
from streaming.storage.staging import Staging

SIZE, MICRO = 256, 64
# Latency, requests in flight, readers. The first one, which its cores bound, tells the costs.
SETTINGS = (
    (0.02, 128, 1),
    *((0.02, in_flight, 1) for in_flight in (64, 32, 16)),
    *((0.02, 32, readers) for readers in (2, 4)),
    *((0.1, in_flight, 1) for in_flight in (128, 64, 16)),
    *((0.1, 16, readers) for readers in (2, 4)),
)
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Run:
    """One run: what it gave, and what its processes took."""

    tiles_s: float
    tiles: int
    cpu_s: dict[str, float]
    use: TimeUse


def process_cpu() -> Counter[str]:
    """CPU seconds so far of this process and all below it, by what they do."""
    parents, names, spent = dict[int, int](), dict[int, str](), dict[int, float]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            names[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        parents[int(folder.name)] = int(stat[1])
        spent[int(folder.name)] = (int(stat[11]) + int(stat[12])) * _TICK_S
    found = Counter[str]()
    for pid, name in names.items():
        above = pid
        while above not in (0, 1, os.getpid()):
            above = parents.get(above, 0)
        if above == os.getpid():
            kind = "consumer" if pid == os.getpid() else _kind(name)
            found[kind] += spent[pid]
    return found


def _kind(name: str) -> str:
    for part, kind in (("ReaderActor", "reader"), ("SplitCoordinator", "scheduler"), ("nginx", "server")):
        if part in name:
            return kind
    return "server" if "latency_server" in name else "transport"


def run(
    catalog: Catalog,
    options: dict[str, object],
    readers: int,
    in_flight: int,
    blocks: int,
    *,
    micro: int = MICRO,
    corners: Corners = "anywhere",
) -> Run:
    """Pulls blocks of `micro` tiles, after those in which readers start and open the slides."""
    skip = 4 + 2 * readers
    stream = TileStream(
        catalog,
        TilePlan(catalog, mpp={0.25: 1}, size=SIZE, corners=corners),
        BatchShape(micro),
        reader=ReaderOptions(storage_options=options, requests_in_flight=in_flight),
        readers=(readers, readers),
    )
    steps, use = stream.steps(0, skip + blocks), TimeUse()
    for _ in range(skip):
        next(steps)
    before, started = process_cpu(), time.perf_counter()
    for _ in range(blocks - 2):
        for batch in next(steps):
            use.add(batch)
    took, after = time.perf_counter() - started, process_cpu()
    steps.close()
    tiles = (blocks - 2) * micro
    return Run(tiles / took, tiles, {kind: after[kind] - before[kind] for kind in after}, use)


def costs_of(found: Run, small: Run, on_blocks: Run) -> StageCosts:
    """What a tile cost in a run with one reader, a micro-batch in one of one tile each, and a slide's compressed block.

    (The process that schedules is awake now and then without work, so that only many blocks tell what one costs.)
    """
    total, per_tile = found.use.totals, {kind: spent / found.tiles for kind, spent in found.cpu_s.items()}
    blocks, fewest = (each.use.totals["blocks"] / each.use.totals["tiles"] for each in (found, on_blocks))
    spared_s = per_tile["reader"] - on_blocks.cpu_s["reader"] / on_blocks.tiles
    return StageCosts(
        reader_cpu_s=per_tile["reader"],
        transport_cpu_s=max(per_tile["transport"], 1e-6),
        consumer_s=per_tile["consumer"],
        reader_cores=found.tiles_s * per_tile["reader"],
        requests=total["requests"] / total["tiles"],
        nbytes=total["nbytes"] / total["tiles"],
        tile_nbytes=SIZE * SIZE * 3 + 100,
        blocks=blocks,
        block_cpu_s=max(spared_s / (blocks - fewest), 1e-6),
        block_s=max(small.cpu_s["scheduler"] / small.tiles, 1e-6),
    )


def answered_s(options: dict[str, object], path: str) -> float:
    """Seconds that one small request takes here, median: the latency that was asked for, and what the server adds."""
    store = clients.object_store("s3://bench", options)
    taken = []
    for i in range(15):
        started = time.perf_counter()
        obstore.get_range(store, path, start=i * 1000, end=i * 1000 + 1000)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def measured(folder: Path, paths: list[Path], blocks: int) -> tuple[StageCosts, list[dict[str, float]]]:
    """The costs of a tile, and predicted and measured tiles/s of all settings."""
    cluster.connect(8)
    costs: StageCosts | None = None
    rows, other_cpu_s = list[dict[str, float]](), 0.0
    for latency_s, in_flight, readers in SETTINGS:
        with serve(folder, latency_s) as server:
            options: dict[str, object] = {"anon": True, "endpoint_url": server.url, "region": "us-east-1"}
            catalog = _catalog(paths, options)
            around = Surroundings(
                latency_s=answered_s(options, paths[0].name), requests_in_flight=in_flight, reader_cores=64
            )
            # Where few requests are under way fewer blocks do.
            by_requests = readers * reader_rates(StageCosts(), around, MICRO)[0]
            found = run(catalog, options, readers, in_flight, min(blocks, max(12, round(15 * by_requests / MICRO))))
            if costs is None:
                small = run(catalog, options, 2, in_flight, 2 * blocks, micro=1)
                costs = costs_of(found, small, run(catalog, options, 1, in_flight, blocks, corners="blocks"))
                other_cpu_s = found.cpu_s.get("server", 0.0) / found.tiles
            predicted = one_machine_rate(
                costs,
                around,
                readers=readers,
                cores=len(os.sched_getaffinity(0)),
                micro_batch=MICRO,
                other_cpu_s=other_cpu_s,
            )
            rows.append(
                {
                    "latency_ms": around.latency_s * 1000,
                    "in_flight": in_flight,
                    "readers": readers,
                    "predicted": predicted,
                    "measured": found.tiles_s,
                }
            )
            sys.stderr.write(
                f"{latency_s * 1000:.0f} ms, {in_flight} in flight, {readers} readers: {found.tiles_s:,.0f}/s\n"
            )
    assert costs is not None, "the first setting measures the costs"
    return costs, rows


def _catalog(paths: list[Path], options: dict[str, object]) -> Catalog:
    out = tempfile.mkdtemp()
    infos = [storage.stat(f"s3://bench/{path.name}", options) for path in paths]
    found = save_indexes([inspect(info, Given(), options, Staging()) for info in infos], out, None)
    write(out, *merge([part_of([entry for entry in found if isinstance(entry, Inspected)])], None), None)
    return Catalog.load(out)


def answer_lines(found: Capacity, gpus: int, per_gpu: float) -> Iterator[str]:
    """What was asked for, in lines."""
    yield f"{gpus} GPUs of {per_gpu:g} tiles/s take {found.tiles_s:,.0f} tiles/s:"
    yield f"  readers       {found.readers} of {found.reader_tiles_s:,.0f} tiles/s each (bound by {found.reader_bound})"
    yield f"  nodes         {found.reader_nodes}"
    yield f"  storage       {found.requests_s:,.0f} GETs/s, {found.nbytes_s / 1e6:,.1f} MB/s"
    yield f"  to the GPUs   {found.network_nbytes_s / 1e6:,.1f} MB/s of pixels"
    yield (
        f"  object store  at least {found.reader_store_nbytes / 2**20:,.0f} MiB a reader node, "
        f"{found.rank_store_nbytes / 2**20:,.0f} MiB a rank"
    )
    for limit in found.limits:
        yield f"  limit         {limit.tiles_s:>12,.0f} tiles/s: {limit.what}"
    yield found.sentence()


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tilestream bench scale", description=__doc__)
    parser.add_argument("--gpus", type=int, default=64, help="GPUs to feed (64)")
    parser.add_argument("--tiles-per-second-per-gpu", type=float, default=40.0, metavar="RATE", help="of each (40)")
    parser.add_argument("--latency-ms", type=float, default=30.0, help="of the storage (30)")
    parser.add_argument("--storage-gb-s", type=float, help="bandwidth of the storage in GB/s (no bound)")
    parser.add_argument("--storage-requests-s", type=float, default=5500.0, help="GETs/s that it allows (5500)")
    parser.add_argument("--in-flight", type=int, default=32, help="requests that a reader keeps under way (32)")
    parser.add_argument("--micro-batch", type=int, default=64, help="tiles of a rank's micro-batch (64)")
    parser.add_argument("--costs", type=Path, help="costs as `--json` prints them, instead of measuring")
    parser.add_argument("--blocks", type=int, default=120, help=f"blocks of {MICRO} tiles a run (120)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "tilestream-bench"), help="where slides are kept"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Prints costs, predicted and measured rates, and the answer."""
    args = arguments(given)
    rows = list[dict[str, float]]()
    if args.costs:
        costs = StageCosts(**json.loads(args.costs.read_text())["costs"])
    else:
        costs, rows = measured(args.folder, made_slides(args.folder, 2), args.blocks)
    around = Surroundings(
        latency_s=args.latency_ms / 1000,
        requests_in_flight=args.in_flight,
        storage_requests_s=args.storage_requests_s,
        storage_nbytes_s=args.storage_gb_s and args.storage_gb_s * 1e9,
    )
    found = plan_capacity(
        costs,
        gpus=args.gpus,
        tiles_per_second_per_gpu=args.tiles_per_second_per_gpu,
        micro_batch=args.micro_batch,
        around=around,
    )
    if args.json:
        print(json.dumps({"costs": asdict(costs), "runs": rows, "capacity": asdict(found)}))
        return 0
    print("costs of a tile: " + ", ".join(f"{name} {value:.4g}" for name, value in asdict(costs).items()) + "\n")
    if rows:
        print(f"{'latency':>8} {'in flight':>9} {'readers':>7} {'predicted':>9} {'measured':>9} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['latency_ms']:5.0f} ms {row['in_flight']:9.0f} {row['readers']:7.0f} {row['predicted']:9.0f} "
            f"{row['measured']:9.0f} {row['predicted'] / row['measured']:6.2f}"
        )
    print("\n" * bool(rows) + "\n".join(answer_lines(found, args.gpus, args.tiles_per_second_per_gpu)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
