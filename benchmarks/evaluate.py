"""Whether evaluation holds at scale: `tilestream bench evaluate`.

The search for neighbours takes turns with scikit-learn's on the same vectors, a sample of them as queries; all of them
are then searched for at once, as `evaluate --task quality` does. Annotations are of one slide, cells as polygons of 24
corners in one file, read, cut into tiles of 256 px and painted. Slides' embeddings are files as CLAM writes them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from benchmarks.table import TURNS, Line, arguments, line, memory_mib, report
from trainer.embed.options import SlideOptions
from trainer.embed.table_slides import TableSlides
from trainer.evaluate.annotations import AnnotatedTiles
from trainer.evaluate.datasets import Samples, Tile, read_dataset
from trainer.evaluate.mil import read_bags, score_slides
from trainer.evaluate.neighbours import nearest, nearest_others
from trainer.evaluate.scratch import scratch
from trainer.evaluate.splits import Fold

K, QUERIES = 20, 2000
LIMIT_S, LIMIT_GB = 120.0, 2.0  # of all neighbours
TILE, MPP = 256, 0.5
LIMIT_MASKS_S, LIMIT_SLIDES_GB = 60.0, 1.0


def search_lines(num: int, width: int) -> list[Line]:
    """Neighbours of vectors, ours and scikit-learn's, and of all at once."""
    vectors = np.random.default_rng(0).standard_normal((num, width), dtype=np.float32)
    queries, groups = vectors[:QUERIES], np.arange(num) % 1000
    before, started = memory_mib("VmHWM") / 1024, time.perf_counter()
    nearest_others(vectors, [(None, K), (groups, 1)])
    took, memory = time.perf_counter() - started, memory_mib("VmHWM") / 1024 - before
    theirs = NearestNeighbors(metric="cosine", algorithm="brute").fit(vectors)
    turns: list[tuple[float, float]] = []
    for _ in range(TURNS):
        started = time.perf_counter()
        nearest(vectors, queries, K)
        middle = time.perf_counter()
        theirs.kneighbors(queries, n_neighbors=K)
        turns.append((middle - started, time.perf_counter() - middle))
    ours, sklearn = (QUERIES / statistics.median(turn[at] for turn in turns) for at in (0, 1))
    what = f"{num:,} vectors of {width:,}"
    return [
        line(f"{K} neighbours of a tile among {what} / scikit-learn", ours, sklearn, "tiles/s"),
        line(f"neighbours of all of {what}, and across patients / limit", took, LIMIT_S, "s", most=1.0),
        line("memory of that over the vectors / limit", memory, LIMIT_GB, "GB", most=1.0),
    ]


def made_cells(folder: Path, tiles: int, cells: int) -> str:
    """A table of one slide of so many tiles, without any pixels, and of so many cells on it."""
    side = math.isqrt(tiles) * TILE * 2
    tifffile.imwrite(folder / "cells.tif", shape=(side, side, 3), dtype="uint8", tile=(256, 256), photometric="rgb")
    random, angles = np.random.default_rng(0), np.linspace(0, 2 * np.pi, 25)
    circle: NDArray[np.float64] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [(centre + radius * circle).round(2).tolist()]},
            "properties": {"objectType": "cell", "classification": {"name": "ABCDE"[i % 5]}},
        }
        for i, (centre, radius) in enumerate(
            zip(random.uniform(0, side, (cells, 2)), random.uniform(10, 30, cells), strict=True)
        )
    ]
    (folder / "cells.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (folder / "cells.csv").write_text("slide,annotation\ncells.tif,cells.geojson\n")
    return str(folder / "cells.csv")


def annotation_lines(folder: Path, tiles: int, cells: int) -> list[Line]:
    """Cells of a slide as points, and as masks of every tile."""
    table = made_cells(folder, tiles, cells)
    lines: list[Line] = []
    for target in ("points", "mask"):
        started = time.perf_counter()
        slides = TableSlides(SlideOptions(slide_mpp=0.25))
        samples = read_dataset(table, AnnotatedTiles(mpp=MPP, size=TILE, target=target), slides=slides)
        for mask in samples.masks or ():
            mask(TILE, TILE)
        what = f"{cells:,} cells, {len(samples):,} tiles of a slide, {target} / limit"
        lines.append(line(what, time.perf_counter() - started, LIMIT_MASKS_S, "s", most=1.0))
    return lines


def slide_lines(folder: Path, slides: int, tiles: int, width: int) -> list[Line]:
    """Slides classified by their embeddings: read, a head trained for an epoch, and scored."""
    made = folder / "slides"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    with h5py.File(made / "s0.h5", "w") as file:
        file["features"] = np.random.default_rng(0).standard_normal((tiles, width), dtype=np.float32)
        file["coords"] = np.zeros((tiles, 2), np.int64)
    for number in range(1, slides):
        os.link(made / "s0.h5", made / f"s{number}.h5")
    named = tuple(Tile(uri=f"s{number}.svs") for number in range(slides))
    samples = Samples(source="made", tiles=named, classes=("a", "b"), labels=np.arange(slides) % 2)
    parts = np.arange(slides)
    with own_memory() as peak, scratch(str(folder)) as room:
        started = time.perf_counter()
        bags = read_bags(str(made), samples, room)
        score_slides(bags, samples, [Fold(train=parts[: slides // 2], test=parts[slides // 2 :])], epochs=1, seed=0)
        took = time.perf_counter() - started
    shutil.rmtree(made)
    what = f"{slides:,} slides of {tiles:,} tiles ({slides * tiles * width * 4 / 1e9:.1f} GB)"
    return [
        line(f"{what}: read, half of them trained on once, the others scored / a second a slide", took, slides, "s"),
        line("memory of that, of this process alone / limit", max(peak), LIMIT_SLIDES_GB, "GB", most=1.0),
    ]


@contextmanager
def own_memory() -> Generator[list[float]]:
    """Notes now and then how much more memory this process has than before, in GB; mapped files don't count."""
    seen, ended = [0.0], threading.Event()
    before = memory_mib("RssAnon")

    def watch() -> None:
        while not ended.wait(0.02):
            seen.append((memory_mib("RssAnon") - before) / 1024)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        ended.set()
        watching.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 where a limit does not hold."""
    parser = arguments("evaluate", __doc__)
    parser.add_argument("--vectors", type=int, default=100_000, help="embeddings (100000)")
    parser.add_argument("--width", type=int, default=1024, help="numbers of each (1024)")
    parser.add_argument("--cells", type=int, default=50_000, help="cells of the annotated slide (50000)")
    parser.add_argument("--tiles", type=int, default=5_000, help="its tiles (5000)")
    parser.add_argument("--bags", type=int, default=100, help="slides with embeddings (100)")
    parser.add_argument("--bag-tiles", type=int, default=10_000, help="tiles of each (10000)")
    args = parser.parse_args(argv)
    folder: Path = args.folder / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*annotation_lines(folder, args.tiles, args.cells), *search_lines(args.vectors, args.width)]
    lines += slide_lines(folder, args.bags, args.bag_tiles, args.width)
    return report(lines, args.json, threads=str(torch.get_num_threads()))


if __name__ == "__main__":
    sys.exit(main())
