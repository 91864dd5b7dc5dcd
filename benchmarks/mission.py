"""Slides as TCGA's are, and what trains on them: the mix that `tilestream bench reader` measures.

Of TCGA's 11,766 diagnostic slides seven tenths are JPEG and three JPEG 2000; scanners write 0.2527, 0.2485 and 0.5022
µm/px, and blocks of 240 and 256 px.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import SIZE, made_catalog
from streaming.catalog import Catalog
from streaming.plan import TilePlan
from streaming.plan.footprints import Corners
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide

MPPS = (0.25, 0.5, 1.0, 2.0)

# Ten alike are drawn from alike. The qualities give blocks of tissue the bytes that real ones have: 14 KB of TCGA's
# JPEG 2000 (14 : 1), and of Aperio's JPEG.
_JPEG, _YCBCR, _RGB = (
    SyntheticSlide(codec="jpeg", quality=90),
    SyntheticSlide(codec="jp2k-ycbcr", quality=46, subsampling=(2, 1)),
    SyntheticSlide(codec="jp2k-rgb", quality=46),
)
_KINDS = (
    *(replace(_JPEG, mpp=mpp, block_px=block) for mpp in (0.2527, 0.2485, 0.5022) for block in (240, 256)),
    replace(_JPEG, mpp=0.2527, block_px=240),
    replace(_YCBCR, mpp=0.2527),
    replace(_RGB, mpp=0.2485),
    replace(_YCBCR, mpp=0.5022),
)


@dataclass(frozen=True)
class MadeSlide:
    """A made slide and its file."""

    slide: SyntheticSlide
    path: Path

    @property
    def is_jpeg(self) -> bool:
        """Whether it is JPEG, else JPEG 2000."""
        return self.slide.codec == "jpeg"


def mission_slides(folder: Path, side_px: int) -> list[MadeSlide]:
    """The ten slides of the mix, square, with levels 1, 4 and 16; made once."""
    folder = folder / "bench" / f"mission-{side_px}"
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        MadeSlide(
            replace(kind, width=side_px, height=side_px, patient=patient),
            folder / f"{patient}-{kind.codec}-{kind.block_px}-{kind.mpp}.svs",
        )
        for patient, kind in enumerate(_KINDS)
    ]
    missing = [each for each in made if not each.path.exists()]
    if missing:
        sys.stderr.write(f"making {len(missing)} slides in {folder}\n")
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            list(pool.map(_write, missing))
    return made


def _write(made: MadeSlide) -> None:
    write_slide(made.slide, made.path)


@dataclass(frozen=True)
class Mission:
    """Some of the slides, in a catalog of where they are read from."""

    paths: list[Path]
    catalog: Catalog
    options: dict[str, Any]

    def plan(self, corners: Corners, mpps: Sequence[float] = MPPS) -> TilePlan:
        """The plan of tiles of these magnifications in equal shares."""
        return TilePlan(self.catalog, mpp=dict.fromkeys(mpps, 1.0), size=SIZE, corners=corners)


def mission(made: Sequence[MadeSlide], endpoint: str | None = None) -> Mission:
    """Slides read from their files, or from the bucket that holds them at that endpoint."""
    paths = [each.path for each in made]
    if endpoint is None:
        return Mission(paths, made_catalog([str(path) for path in paths]), {})
    options = {"anon": True, "endpoint_url": endpoint, "region": "us-east-1"}
    # The bucket is the folder above the slides' own (`mission_slides`).
    return Mission(
        paths, made_catalog([f"s3://bench/{path.parent.name}/{path.name}" for path in paths], options), options
    )
