"""Tiles cut beforehand: the work that a loader of ready tiles needs done first.

A task names tiles of slides, which are cut, or a folder of tiles that were cut, each of which is taken `copies` times;
and where shards lie on this machine, with the address at which a server has them.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openslide
from PIL import Image


def tiles(task: dict[str, Any]) -> Iterator[Image.Image]:
    """The task's tiles as images, through OpenSlide."""
    slides = [openslide.OpenSlide(path) for path in task["slides"]]
    for slide, x, y in task["tiles"]:
        yield slides[slide].read_region((x, y), 0, (task["size"],) * 2).convert("RGB")


def jpeg(tile: Image.Image) -> bytes:
    """The tile at JPEG quality 90, which most extractors take or come near."""
    content = io.BytesIO()
    tile.save(content, format="jpeg", quality=90)
    return content.getvalue()


def jpegs(task: dict[str, Any]) -> Iterator[bytes]:
    """The task's tiles as JPEG."""
    if "cut" not in task:
        yield from map(jpeg, tiles(task))
        return
    contents = [path.read_bytes() for path in sorted(Path(task["cut"]).glob("*.jpg"))]
    for _ in range(task["copies"]):
        yield from contents


def extraction(task: dict[str, Any], write: Callable[[Path], None]) -> tuple[Path, dict[str, float]]:
    """The folder of shards that `write` makes, and seconds and MB of 1,000 tiles; none of tiles that were cut."""
    if "cut" in task:
        folder = Path(task["shards"])
        if not folder.exists():
            part = Path(tempfile.mkdtemp(dir=folder.parent))
            write(part)
            part.rename(folder)
        # Any key does: the server asks for none, but clients won't ask without.
        os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}
        return folder, {}
    folder, started = Path(tempfile.mkdtemp()), time.perf_counter()
    write(folder)
    taken, count = time.perf_counter() - started, len(task["tiles"])
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return folder, {"extract_s": taken / count * 1000, "stored_mb": stored / 1e6 / count * 1000}
