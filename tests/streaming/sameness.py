"""What this machine makes of some slides, as digests: `python sameness.py FOLDER` prints them as JSON.

Run by `test_sameness`, as often as there are kinds of CPU to be looked at, so it imports as little as it can: not Ray.
"""

import hashlib
import importlib
import json
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile

MPP = 0.2527
WIDTH, HEIGHT = 1700, 1300
_JPEG2000 = {"photometric": "rgb", "tile": (256, 256), "compressionargs": {"level": 40}}  # with losses
FORMATS = {
    "jpeg": {
        "compression": "jpeg",
        "photometric": "ycbcr",
        "subsampling": (2, 2),
        "compressionargs": {"level": 85},
        "tile": (240, 240),
    },
    "jp2k-rgb": {**_JPEG2000, "compression": "aperio_jp2000_rgb"},
    "jp2k-ycbcr": {**_JPEG2000, "compression": "aperio_jp2000_ycbc"},
    "lzw": {"compression": "lzw", "photometric": "rgb", "predictor": True, "tile": (256, 256)},
}


def picture() -> np.ndarray:
    """Glass with stained discs on it, uint8 (HEIGHT, WIDTH, 3), in whole numbers."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint64)
    grain = (x * np.uint64(0x9E3779B1) ^ y * np.uint64(0x85EBCA77)) * np.uint64(0xC2B2AE3D27D4EB4F)
    grain = (grain >> np.uint64(58)).astype(np.int64)  # 0 to 63
    x, y = x.astype(np.int64), y.astype(np.int64)
    stained = (x % 430 - 215) ** 2 + (y % 510 - 255) ** 2 < 190**2
    nucleus = (x % 37 - 18) ** 2 + (y % 41 - 20) ** 2 < 70
    depth = np.where(stained, 40 + grain + 60 * nucleus + x * 30 // WIDTH, grain // 16)
    return np.stack((238 - depth // 2, 236 - depth, 240 - depth // 4), axis=-1).clip(0, 255).astype(np.uint8)


def write_slides(folder: Path) -> None:
    """One slide a format, of two levels."""
    level0 = picture()
    for name, options in FORMATS.items():
        with tifffile.TiffWriter(folder / f"{name}.tif") as tiff:
            tiff.write(level0, **options)
            tiff.write(np.ascontiguousarray(level0[::4, ::4]), subfiletype=1, **options)


def digests(folder: Path) -> dict[str, str]:
    """By name, SHA-256 of tiles, of tissue grids and of what indices mean."""
    from streaming.catalog.given import Given
    from streaming.catalog.inspection import Inspected, inspect
    from streaming.slide import open_slide
    from streaming.storage import stat
    from streaming.storage.staging import Staging

    found: dict[str, str] = {}
    slides = {name: open_slide(str(folder / f"{name}.tif"), mpp=MPP) for name in FORMATS}
    assert {slide.backend for slide in slides.values()} == {"blocks"}

    def tiles(name: str, mpp: float, *, exact: bool, tolerance: float = 0.0) -> str:
        corners = [(x, y) for y in (0, 8, 301) for x in (0, 160, 517)]
        slide = slides[name]
        return _sha256(*(slide.read_tile(x, y, mpp, 256, exact=exact, tolerance=tolerance) for x, y in corners))

    for name in FORMATS:
        found[f"{name}: a level's pixels"] = tiles(name, MPP, exact=True)
    found["jpeg: decoded at half its size"] = tiles("jpeg", 2 * MPP, exact=False)
    found["jpeg: own pixels at half their size"] = tiles("jpeg", 0.5, exact=False, tolerance=0.05)
    found["lzw: own pixels at half their size"] = tiles("lzw", 0.5, exact=False, tolerance=0.05)
    found["jpeg: area average"] = tiles("jpeg", 0.5, exact=True)
    found["jpeg: area average over many"] = tiles("jpeg", 0.77, exact=True)
    found["jpeg: enlarged"] = tiles("jpeg", 0.25, exact=True)

    looked_at = [
        inspect(stat(str(folder / f"{name}.tif")), Given(mpp=MPP), None, Staging()) for name in ("jpeg", "lzw")
    ]
    assert all(isinstance(slide, Inspected) for slide in looked_at)
    found["tissue"] = _sha256(*(slide.tissue.fraction for slide in looked_at), [s.tissue.threshold for s in looked_at])
    return found | _specs(folder, [slide for slide in looked_at if isinstance(slide, Inspected)])


def _specs(folder: Path, looked_at: list) -> dict[str, str]:
    from streaming.catalog import Catalog
    from streaming.catalog.tissue import TissueGrid
    from streaming.catalog.writing import merge, part_of, write
    from streaming.plan import TilePlan
    from streaming.plan.universe import Universe

    rows = []
    for number in range(11):
        # In whole numbers, like all here, so that only the plan is seen.
        height, width = 60 + 7 * number, 90 - 5 * number
        y, x = np.mgrid[:height, :width]
        tissue = ((x * x + 3 * y * y + x * y * number) % 311).clip(0, 255).astype(np.uint8)
        mpp = (0.25, 0.2527, 0.2485, 0.5022)[number % 4]
        row = replace(
            looked_at[0].row,
            slide=f"s3://bucket/{number}.svs",
            mpp=mpp,
            width=int(width * 64 / mpp),
            height=int(height * 64 / mpp),
            bounds=(0, 0, int(width * 64 / mpp), int(height * 64 / mpp)),
            levels=[_level(int(width * 64 / mpp), int(height * 64 / mpp), factor) for factor in (1, 4)],
            tissue_rows=height,
            tissue_columns=width,
            metadata=json.dumps({"cohort": "ab"[number % 2], "patient": str(number // 2)}),
        )
        rows.append(replace(looked_at[0], row=row, tissue=TissueGrid(tissue, 20.0)))
    write(str(folder / "catalog"), *merge([part_of(rows)], None), None)
    catalog = Catalog.load(str(folder / "catalog"))
    index, attempt = np.arange(1500) * 1_000_003, (np.arange(1500) % 3).astype(np.int32)
    universes = {
        "all tiles": Universe(),
        "a part, without replacement": Universe(slides=0.7, tiles_per_slide=300, replacement=False),
        "windows": Universe(window=4096, window_slides=4),
    }
    found = {}
    mpp = {0.25: 1, 0.5: 0.5, 1.0: 0.3, 2.0: 0.1}
    plans = {
        name: TilePlan(catalog, 7, mpp, cohorts={"a": 1, "b": 3}, universe=universe, mpp_tolerance=0.0)
        for name, universe in universes.items()
    }
    plans["own pixels"] = TilePlan(catalog, 7, mpp, cohorts={"a": 1, "b": 3}, mpp_tolerance=0.05)
    for name, plan in plans.items():
        specs = plan.specs(index, attempt)
        found[f"specs: {name}"] = _sha256(specs.slide, specs.x, specs.y, specs.mpp)
    return found


def _level(width: int, height: int, factor: int) -> dict:
    width, height = width // factor, height // factor
    return {"width": width, "height": height, "downsample": float(factor), "block_width": 240, "block_height": 240}


def _sha256(*arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def cpu_features() -> str:
    """What of this CPU OpenCV and NumPy make use of; a question mark is what OpenCV does without."""
    from numpy._core._multiarray_umath import __cpu_features__ as of_numpy

    from streaming.vision import cv2

    return f"OpenCV {cv2.getCPUFeaturesLine()} NumPy {' '.join(name for name, has in of_numpy.items() if has)}"


if __name__ == "__main__":
    # The package itself would import Ray Data, which takes longer than all this.
    package = types.ModuleType("streaming")
    package.__path__ = [str(Path(__file__).parents[2] / "streaming")]
    sys.modules["streaming"] = package
    if "--with-ipp" in sys.argv:
        plain = sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
        exec("import cv2", vars(plain))
    # Imported here and read in a thread, as readers are: what an import settles for its own thread alone is not seen.
    importlib.import_module("streaming.slide")
    said = {}
    thread = threading.Thread(target=lambda: said.update(digests(Path(sys.argv[1]))))
    thread.start()
    thread.join()
    print(json.dumps({"digests": said, "features": cpu_features()}))  # noqa: T201
