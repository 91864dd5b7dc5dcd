"""Tiles cut beforehand: the work that a loader of ready tiles needs done first."""

from __future__ import annotations

import io
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


def extraction(task: dict[str, Any], folder: Path, write: Callable[[], None]) -> dict[str, float]:
    """Seconds and MB of 1,000 tiles."""
    started = time.perf_counter()
    write()
    taken, count = time.perf_counter() - started, len(task["tiles"])
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"extract_s": taken / count * 1000, "stored_mb": stored / 1e6 / count * 1000}
