"""What benchmarks share: slides, a catalog of them, OpenSlide's tiles, peers in their own environments, the table.

Speed is told as ratios: we and the others take turns on the same tiles; the median of several turns counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from streaming import storage
from streaming.catalog import Catalog, merge, part_of, write
from streaming.catalog_job import Rejected, inspect
from streaming.plan import TilePlan
from streaming.slide import Staging
from streaming.slide.synthetic import SyntheticSlide
from streaming.slide.synthetic_svs import write_slide

SIZE, BATCH, TURNS = 256, 128, 3


@dataclass(frozen=True)
class Line:
    """One line of the table; ratio is ours to theirs."""

    what: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    must: str
    holds: bool
    extract_s: float | None = None
    """seconds of cutting 1,000 tiles beforehand, where theirs needs it"""
    stored_mb: float | None = None
    """MB that 1,000 such tiles take"""


def line(
    what: str, ours: float, theirs: float, unit: str, *, most: float = 0, least: float = 0, **extraction: float
) -> Line:
    """A line whose ratio must be at most, or at least, something."""
    ratio = ours / theirs
    must = f"≤ {most}" if most else f"≥ {least}" if least else "–"
    return Line(what, ours, theirs, unit, ratio, must, ratio <= most if most else ratio >= least, **extraction)


def made_slides(folder: Path, num: int) -> list[Path]:
    """40× slides with levels 1, 4, 16; made once."""
    paths = [folder / "bench" / f"made{patient}.svs" for patient in range(num)]
    folder.joinpath("bench").mkdir(parents=True, exist_ok=True)
    for patient, path in enumerate(paths):
        if not path.exists():
            sys.stderr.write(f"making {path.name}\n")
            write_slide(SyntheticSlide(width=24576, height=20480, patient=patient, downsamples=(1, 4, 16)), path)
    return paths


def made_catalog(uris: Sequence[str], options: dict[str, Any] | None = None, out: str | None = None) -> Catalog:
    """A catalog of some slides, in a folder of its own."""
    out = out or tempfile.mkdtemp()
    rows = [inspect(storage.stat(uri, options), None, options, Staging(), out) for uri in uris]
    rejected = [row for row in rows if isinstance(row, Rejected)]
    assert not rejected, rejected
    write(out, *merge([part_of([row for row in rows if not isinstance(row, Rejected)])], None), None)
    return Catalog.load(out)


class OpenSlideTiles:
    """What most loaders do: OpenSlide reads the level, PIL makes the tile."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._slides = [openslide.OpenSlide(path) for path in paths]

    def __call__(self, slide: int, x: int, y: int, mpp: float) -> np.ndarray[Any, Any]:
        """A tile of a made slide, uint8 (SIZE, SIZE, 3)."""
        handle = self._slides[slide]
        level = handle.get_best_level_for_downsample(mpp / 0.25)
        extent = round(SIZE * mpp / 0.25 / handle.level_downsamples[level])
        image = handle.read_region((x, y), level, (extent, extent)).convert("RGB")
        if extent != SIZE:
            image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
        return np.asarray(image)


class LocalTiles(IterableDataset[torch.Tensor]):
    """The plan's tiles through OpenSlide on local files, for a DataLoader."""

    def __init__(self, plan: TilePlan, paths: list[Path], stop: int) -> None:
        self._plan, self._paths, self._stop = plan, paths, stop

    def __iter__(self) -> Iterator[torch.Tensor]:
        """This worker's share."""
        info = get_worker_info()
        assert info is not None, "the loader has workers"
        read = OpenSlideTiles(self._paths)
        specs = self._plan.specs(np.arange(info.id, self._stop, info.num_workers))
        for slide, x, y, mpp in zip(specs.slide, specs.x, specs.y, specs.mpp, strict=True):
            yield torch.from_numpy(read(int(slide), int(x), int(y), float(mpp)).copy())


def rate(batches: Iterator[Any], skip: int, count: int) -> float:
    """Tiles per second of `count` batches after the first ones."""
    for _ in range(skip):
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - started)


def openslide_rate(plan: TilePlan, paths: list[Path], skip: int, count: int) -> float:
    """Tiles per second of a DataLoader with two workers and OpenSlide on local files."""
    loader = DataLoader(LocalTiles(plan, paths, (skip + count) * BATCH), batch_size=BATCH, num_workers=2)
    return rate(iter(loader), skip, count)


def peer(name: str, packages: Sequence[str], folder: Path, **work: Any) -> dict[str, float] | None:
    """What `peers/with_<name>.py` measures, in a virtual environment of its own; None, and why on stderr, if it can't.

    The environment, made once, sees our libraries (torch above all) behind its own; `work` is what the peer is told.
    """
    home = folder / "peers" / name
    python = home / "bin" / "python"
    if not (home / "installed").exists():
        sys.stderr.write(f"installing {' '.join(packages)}\n")
        venv.create(home, with_pip=False, clear=True, symlinks=True)
        libraries = sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])
        own = next(home.glob("lib/python*/site-packages"))
        own.joinpath("libraries.pth").write_text("\n".join(dict.fromkeys(libraries)) + "\n")
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--prefix", home, *packages]
        if (made := subprocess.run(command, capture_output=True, text=True)).returncode:
            sys.stderr.write(f"{name}: can't be installed: {(made.stderr.strip().splitlines() or ['?'])[-1]}\n")
            return None
        (home / "installed").touch()
    script = Path(__file__).parent / "peers" / f"with_{name}.py"
    work |= {"size": SIZE, "batch": BATCH}
    try:
        ran = subprocess.run([python, script], input=json.dumps(work), capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        sys.stderr.write(f"{name}: did not end in 300 s\n")
        return None
    if ran.returncode:
        sys.stderr.write(f"{name}: {(ran.stderr.strip().splitlines() or ['?'])[-1]}\n")
        return None
    return json.loads(ran.stdout.splitlines()[-1])


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"tilestream bench {name}", description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--slides", type=int, default=2, help="slides that are made for it (2)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave out what must be installed first")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir(), "tilestream-bench"),
        help="where slides and peers are kept",
    )
    return parser


def machine() -> str:
    """What the numbers were measured on."""
    kind = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {kind}, Python {platform.python_version()}"


def report(lines: Sequence[Line], as_json: bool, **facts: str) -> int:
    """Prints the table; 1 where a ratio does not hold, else 0."""
    if as_json:
        print(json.dumps({"machine": machine(), **facts, "lines": [asdict(entry) for entry in lines]}))
        return 0 if all(entry.holds for entry in lines if entry.must != "–") else 1
    print("; ".join([machine(), *(f"{key}: {fact}" for key, fact in facts.items()), f"median of {TURNS} turns\n"]))
    cut = any(entry.extract_s is not None for entry in lines)
    more = f"{'cut s':>7} {'MB':>6}  " if cut else ""
    print(f"{'ours':>9} {'theirs':>9} {'':8} {'ratio':>6}  {'must':7}      {more}what")
    for entry in lines:
        verdict = "" if entry.must == "–" else "yes" if entry.holds else "NO"
        if cut:
            more = f"{entry.extract_s:7.1f} {entry.stored_mb:6.1f}  " if entry.extract_s is not None else " " * 16
        print(
            f"{entry.ours:9.2f} {entry.theirs:9.2f} {entry.unit:8} {entry.ratio:6.2f}  {entry.must:7} {verdict:4} "
            f"{more}{entry.what}"
        )
    if cut:
        print("\ncut s, MB: seconds and storage of cutting 1,000 tiles beforehand")
    return 0 if all(entry.holds for entry in lines if entry.must != "–") else 1
