"""What embedding costs over the model alone, and whether its memory grows with a slide: `tilestream bench embed`.

One core's worth of model, readers on the others. The model alone gets ready tensors, in a process of its own; embedding
goes from the slides' files through Ray to rows, its start left out. Memory is private memory (RSS less what is shared)
of driver, readers and model, the peak of samples, while HDF5 with token maps is written.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.table import TURNS, Line, arguments, line, report
from streaming import cluster, storage
from streaming.catalog.known import known_slides
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from trainer.embed.job import Job, embed, rows_of
from trainer.embed.model import load_model
from trainer.embed.options import EmbedOptions
from trainer.run import checkpoints
from trainer.run.config import read_config
from trainer.run.fit import make_module

KINDS = {"readers": "ReadTiles", "model": "EmbedTiles"}

# Seconds of wall clock and of CPU that the network alone takes for some batches.
_ALONE = """
import json, sys, time
import torch
from trainer.embed.model import load_model
torch.set_num_threads(1)
source, size, batch, count = sys.argv[1], *map(int, sys.argv[2:])
network = load_model(source).backbone
images = torch.randn(batch, 3, size, size)
with torch.inference_mode():
    network(images)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        network(images)
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""


def made_model(folder: Path, backbone: str, size: int) -> str:
    """A checkpoint of random weights."""
    out = str(folder / f"{backbone}-{size}")
    overrides = ["--model.backbone", backbone, "--augment.global_size", str(size), "--data.tile_size", str(size)]
    overrides += ["--model.patch_size", "16", "--augment.local_size", "32", "--model.num_prototypes", "32"]
    config = read_config("debug", [*overrides, "--run.out", out])
    if not checkpoints.steps_of(out):
        state = {"state_dict": make_module(config).state_dict(), "global_step": 1}
        checkpoints.write(checkpoints.checkpoint_uri(out, 1), state, config, "0")
    return checkpoints.find(out)


def made_slide(folder: Path, side: int) -> str:
    """A square slide at 0.25 µm/px; made once."""
    path = folder / f"square{side}.svs"
    if not path.exists():
        sys.stderr.write(f"making {path.name}\n")
        write_slide(SyntheticSlide(width=side, height=side, patient=1, downsamples=(1, 4, 16)), path)
    return str(path)


def processes(kind: str) -> list[psutil.Process]:
    """The actors of a kind below this process."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and KINDS[kind] in title:
            found.append(child)
    return found


def alone(model: str, size: int, batch: int, count: int) -> tuple[float, float]:
    """Seconds of wall clock and of CPU a tile of the network alone."""
    command = [sys.executable, "-c", _ALONE, model, str(size), str(batch), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280, env=environment)
    wall, cpu = json.loads(ran.stdout.splitlines()[-1])
    return wall / count / batch, cpu / count / batch


def through_ray(model: str, slide: str, options: EmbedOptions, count: int) -> tuple[float, float]:
    """Seconds of wall clock a tile from file to row, and of CPU of the model's process."""
    job = Job(model, load_model(model).digest, "/nowhere", options, {})
    rows: Any = rows_of(job, known_slides([slide]))
    batches = iter(rows.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
    for _ in range(2):
        next(batches)
    (process,) = processes("model")
    wall, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
    tiles = sum(len(next(batches)["slide"]) for _ in range(count))
    took = time.perf_counter() - wall, sum(process.cpu_times()[:2]) - cpu
    del batches, rows
    return took[0] / tiles, took[1] / tiles


class Peaks:
    """The highest private memory in MiB of this process and its actors, looked at all the time; a context manager."""

    def __init__(self) -> None:
        self.mib: dict[str, float] = defaultdict(float)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            for kind, found in {"driver": [psutil.Process()], **{kind: processes(kind) for kind in KINDS}}.items():
                total = 0.0
                for process in found:
                    try:
                        memory = process.memory_info()
                    except psutil.Error:
                        continue
                    total += (memory.rss - memory.shared) / 2**20
                self.mib[kind] = max(self.mib[kind], total)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def memory_lines(folder: Path, sides: tuple[int, int]) -> list[Line]:
    """Peak memory at two sizes of a slide; the first runs twice, for what a process takes once."""
    model = made_model(folder, "vit_tiny_patch16_224", 64)
    options = EmbedOptions(mpp=0.5, size=64, model_batch=64, readers=(1, 1), tokens=True, format="h5")
    peaks: dict[int, dict[str, float]] = {}
    tiles: dict[int, int] = {}
    for side in (sides[0], *sides):
        out = str(folder / f"out{side}")
        storage.remove(out)
        with Peaks() as seen:
            tiles[side] = embed(model, [made_slide(folder, side)], out, options).tiles
        peaks[side] = dict(seen.mib)
        storage.remove(out)
    small, large = sides
    return [
        line(
            f"peak memory of {kind}, {tiles[large]:,} tiles / {tiles[small]:,} tiles",
            peaks[large][kind],
            peaks[small][kind],
            "MiB",
            most=1.15,
        )
        for kind in ("driver", *KINDS)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 where a ratio does not hold."""
    parser = arguments("embed", __doc__)
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="of the speed (vit_small_patch16_224)")
    parser.add_argument("--size", type=int, default=224, help="side of a tile in px (224)")
    parser.add_argument("--batch", type=int, default=16, help="tiles of a batch (16)")
    parser.add_argument("--count", type=int, default=12, help="batches of a turn (12)")
    parser.add_argument("--sides", type=int, nargs=2, default=(6144, 18432), help="slides for the memory, px")
    args = parser.parse_args(argv)
    folder: Path = args.folder / "embed"
    folder.mkdir(parents=True, exist_ok=True)
    model, slide = made_model(folder, args.backbone, args.size), made_slide(folder, args.sides[1])
    options = EmbedOptions(mpp=0.5, size=args.size, model_batch=args.batch, readers=(1, 1))
    cluster.connect(8)
    turns = [
        (
            alone(model, args.size, args.batch, args.count),
            through_ray(model, slide, options, args.count),
        )
        for _ in range(TURNS)
    ]
    wall = [statistics.median(turn[at][0] for turn in turns) for at in (1, 0)]
    cpu = [statistics.median(turn[at][1] for turn in turns) for at in (1, 0)]
    what = f"{args.backbone} at {args.size} px, one core"
    lines = [
        line(f"embedding / forward pass alone, {what}", 1 / wall[0], 1 / wall[1], "tiles/s", least=0.9),
        line(f"CPU a tile of the model's process / the same, {what}", 1000 * cpu[0], 1000 * cpu[1], "ms", most=1.1),
        *memory_lines(folder, tuple(args.sides)),
    ]
    return report(lines, args.json)


if __name__ == "__main__":
    sys.exit(main())
