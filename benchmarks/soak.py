"""A stream of hundreds of small segments: does memory stay flat, and what does the change of segments cost?

    tilestream bench soak [--segments 200] [--steps-a-segment 8] [--json]

Two runs on slides made on the spot, on this machine: many small segments, with the resident memory (RSS) of the driver,
the chain, the segments' coordinators, the readers and Ray's GCS along the way, and how many series of metrics the node
shows; then a few segments of a realistic length, with the
time that the first batch of each segment was waited for, as a share of the run's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import psutil
import ray

from benchmarks.common import made_catalog
from benchmarks.table import machine
from streaming import cluster
from streaming.catalog import Catalog
from streaming.delivery.stream import BatchShape, TileStream
from streaming.plan import TilePlan
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide

KINDS = {
    "driver": "",
    "chain": "ray::Chain",
    "coordinators": "ray::SplitCoordinator",
    "readers": "ReaderActor",
    "gcs": "gcs_server",
}


def make_catalog(folder: Path) -> Catalog:
    """Three small slides and their catalog."""
    paths = [folder / f"patient{patient}.svs" for patient in range(3)]
    for patient, path in enumerate(paths):
        write_slide(SyntheticSlide(width=2048, height=1536, patient=patient, downsamples=(1, 4)), path)
    return made_catalog([str(path) for path in paths])


def memory() -> dict[str, tuple[int, float]]:
    """Processes and their RSS in MiB, by kind, of this process and what it started."""
    driver = psutil.Process()
    found: dict[str, tuple[int, float]] = {"driver": (1, driver.memory_info().rss / 2**20)}
    for process in driver.children(recursive=True):
        try:
            title, rss = " ".join(process.cmdline()), process.memory_info().rss / 2**20
        except psutil.Error:
            continue
        for kind, sign in KINDS.items():
            if sign and (title.startswith("ray::") or kind == "gcs") and sign in title:
                count, total = found.get(kind, (0, 0.0))
                found[kind] = count + 1, total + rss
    return found


def num_series() -> int:
    """Series of metrics that this node shows: lines of its endpoint that are no comments."""
    node = next(node for node in ray.nodes() if node["Alive"])
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60) as answer:
        return sum(not line.startswith(b"#") for line in answer)


def run(stream: TileStream, steps: int, watch: Callable[[int], None]) -> list[float]:
    """Seconds that each step was waited for."""
    waits: list[float] = []
    batches = stream.steps(0, steps)
    for step in range(steps):
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        watch(step)
    batches.close()  # type: ignore[attr-defined]
    return waits


def soak(catalog: Catalog, segments: int, per_segment: int) -> list[dict[str, float]]:
    """Memory at twenty moments of a run of many small segments, and a table of it on the way."""
    plan = TilePlan(catalog, mpp={0.5: 1}, size=64)
    stream = TileStream(catalog, plan, BatchShape(16), readers=(1, 1), segment_blocks=per_segment)
    rows: list[dict[str, float]] = []
    every = max(1, segments * per_segment // 20)

    def watch(step: int) -> None:
        if step % every == 0:
            found = memory()
            row: dict[str, float] = {"segment": step // per_segment, "series": num_series()}
            for kind in KINDS:
                count, total = found.get(kind, (0, 0.0))
                row |= {f"{kind}_count": count, f"{kind}_mib": round(total / max(count, 1), 1)}
            rows.append(row)
            each = "  ".join(f"{kind} {row[f'{kind}_count']:.0f} × {row[f'{kind}_mib']:.0f} MiB" for kind in KINDS)
            print(f"segment {row['segment']:4.0f}  {each}  {row['series']:.0f} series", flush=True)

    run(stream, segments * per_segment, watch)
    return rows


def gaps(catalog: Catalog, segments: int, blocks: int) -> dict[str, float]:
    """What the change of segments costs a consumer: how much longer the first step of a segment is waited for."""
    plan = TilePlan(catalog, mpp={0.5: 1}, size=64)
    stream = TileStream(catalog, plan, BatchShape(64), readers=(1, 1), segment_blocks=blocks)
    waits = run(stream, segments * blocks, lambda _: None)
    by_place: dict[bool, list[float]] = defaultdict(list)
    for step, wait in enumerate(waits[1:], start=1):
        by_place[step % blocks == 0].append(wait)
    usual, total = statistics.median(by_place[False]), sum(waits[1:])
    lost = sum(max(0.0, wait - usual) for wait in by_place[True])
    return {
        "segments": segments,
        "blocks": blocks,
        "run_s": round(total, 1),
        "ends": len(by_place[True]),
        "longest_gap_ms": round(1000 * max(by_place[True]), 1),
        "gap_share": round(lost / total, 5),
    }


def main() -> None:
    """Both runs."""
    parser = argparse.ArgumentParser(prog="tilestream bench soak", description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, default=200, help="small segments (200)")
    parser.add_argument("--steps-a-segment", type=int, default=8, help="steps of each (8)")
    parser.add_argument("--long-blocks", type=int, default=2000, help="blocks of a segment whose end is timed (2000)")
    parser.add_argument("--long-segments", type=int, default=6, help="such segments (6)")
    parser.add_argument("--json", action="store_true", help="the results as JSON at the end")
    args = parser.parse_args()
    print(machine())
    cluster.connect(8)
    with tempfile.TemporaryDirectory() as folder:
        catalog = make_catalog(Path(folder))
        rows = soak(catalog, args.segments, args.steps_a_segment)
        found = gaps(catalog, args.long_segments, args.long_blocks)
    print(
        f"{found['ends']} segment ends in {found['run_s']} s, {found['blocks']} blocks each: longest wait "
        f"{found['longest_gap_ms']} ms, {found['gap_share']:.2%} of the time lost"
    )
    if args.json:
        print(json.dumps({"memory": rows, "gaps": found}))


if __name__ == "__main__":
    main()
