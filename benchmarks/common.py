"""What benchmarks share: slides, a catalog of them, OpenSlide's tiles, peers in their own environments.

Speed is told as ratios: we and the others take turns on the same tiles; the median of several turns counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.given import Given
from streaming.catalog.index_packs import save_indexes
from streaming.catalog.inspection import Rejected, inspect
from streaming.catalog.writing import merge, part_of, write
from streaming.plan import TilePlan
from streaming.storage.staging import Staging
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide

SIZE, BATCH = 256, 128
# Loaders of ready tiles: the ceiling, for they have neither slides to read nor places to choose.
CUT_PEERS = {"mosaicml": "mosaicml-streaming", "litdata": "litdata", "webdataset": "webdataset"}


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
    rows = save_indexes([inspect(storage.stat(uri, options), Given(), options, Staging()) for uri in uris], out, None)
    rejected = [row for row in rows if isinstance(row, Rejected)]
    assert not rejected, rejected
    write(out, *merge([part_of([row for row in rows if not isinstance(row, Rejected)])], None), None)
    return Catalog.load(out)


class OpenSlideTiles:
    """What most loaders do: OpenSlide reads the level, PIL makes the tile.

    Without OpenSlide's cache, which made slides would hit and ten thousand real ones never do.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._slides = [openslide.OpenSlide(path) for path in paths]
        self._mpp = [float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) for slide in self._slides]
        for slide in self._slides:
            slide.set_cache(openslide.OpenSlideCache(0))

    def __call__(self, slide: int, x: int, y: int, mpp: float) -> np.ndarray[Any, Any]:
        """A tile, uint8 (SIZE, SIZE, 3)."""
        handle, downsample = self._slides[slide], mpp / self._mpp[slide]
        level = handle.get_best_level_for_downsample(downsample)
        extent = round(SIZE * downsample / handle.level_downsamples[level])
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


def _show_libraries(home: Path) -> None:
    """Lets a virtual environment see the libraries of this one."""
    libraries = sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])
    own = next(home.glob("lib/python*/site-packages"))
    own.joinpath("libraries.pth").write_text("\n".join(dict.fromkeys(libraries)) + "\n")


def peer(name: str, packages: Sequence[str], folder: Path, **work: Any) -> dict[str, float] | None:
    """What `peers/with_<name>.py` measures, in a virtual environment of its own; None, and why on stderr, if it can't.

    The environment, made once, sees our libraries (torch above all) behind its own; `work` is what the peer is told.
    """
    home = folder / "peers" / name
    python = home / "bin" / "python"
    is_made = (home / "installed").exists()
    if not is_made:
        sys.stderr.write(f"installing {' '.join(packages)}\n")
        venv.create(home, with_pip=False, clear=True, symlinks=True)
    _show_libraries(home)  # those of now: it may have been made from another environment
    if not is_made:
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--prefix", home, *packages]
        if (made := subprocess.run(command, capture_output=True, text=True)).returncode:
            sys.stderr.write(f"{name}: can't be installed: {(made.stderr.strip().splitlines() or ['?'])[-1]}\n")
            return None
        (home / "installed").touch()
    script = Path(__file__).parent / "peers" / f"with_{name}.py"
    work |= {"size": SIZE, "batch": BATCH}
    try:
        # Without the path that finds these benchmarks: on it lies our package `streaming`, which MosaicML has too.
        told, alone = json.dumps(work), {name: os.environ[name] for name in os.environ if "PYTHON" not in name}
        ran = subprocess.run([python, script], input=told, capture_output=True, text=True, timeout=300, env=alone)
    except subprocess.TimeoutExpired:
        sys.stderr.write(f"{name}: did not end in 300 s\n")
        return None
    if ran.returncode:
        sys.stderr.write(f"{name}: {(ran.stderr.strip().splitlines() or ['?'])[-1]}\n")
        return None
    return json.loads(ran.stdout.splitlines()[-1])
