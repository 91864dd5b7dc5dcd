"""Writes a synthetic slide as a tiled pyramidal SVS, a band of rows at a time."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from streaming.synthetic.drawing import CHUNK, pixels
from streaming.synthetic.jpeg2000 import jpeg2000_rgb, jpeg2000_ycbcr
from streaming.synthetic.layout import Codec, Pixels, SyntheticSlide
from streaming.vision import cv2

cv: Any = cv2  # its stubs know neither dtypes nor optional maps

# What Aperio's description calls each, and what tifffile does.
_CODECS: dict[Codec, tuple[str, str]] = {
    "jpeg": ("JPEG", "jpeg"),
    "jp2k-rgb": ("J2K/KDU", "aperio_jp2000_rgb"),
    "jp2k-ycbcr": ("J2K/YUV16", "aperio_jp2000_ycbc"),
}


def _grouped(bands: Iterable[Pixels], num_rows: int) -> Iterator[Pixels]:
    """The same rows in bands of num_rows; the last one may be shorter."""
    pending = np.empty((0, 0, 3), np.uint8)
    for band in bands:
        rows = np.concatenate((pending, band)) if len(pending) else band
        whole = len(rows) // num_rows * num_rows
        yield from (rows[start : start + num_rows] for start in range(0, whole, num_rows))
        pending = rows[whole:]
    if len(pending):
        yield pending


def _spooling(bands: Iterable[Pixels], ratio: int, spool: Path) -> Iterator[Pixels]:
    """Passes bands on and writes their area reduction to a file; what fills no whole pixel is left out."""
    with spool.open("wb", buffering=0) as file:  # unbuffered: the writer leaves this iterator unfinished
        for band in _grouped(bands, ratio * -(-CHUNK // ratio)):
            height, width = band.shape[0] // ratio, band.shape[1] // ratio
            if height:
                whole = band[: height * ratio, : width * ratio]
                file.write(cv.resize(whole, (width, height), interpolation=cv.INTER_AREA).tobytes())
            yield band


def _spooled(spool: Path, width: int) -> Iterator[Pixels]:
    """The image in such a file, CHUNK rows at a time."""
    with spool.open("rb") as file:
        while rows := file.read(CHUNK * width * 3):
            yield np.frombuffer(rows, np.uint8).reshape(-1, width, 3)


def _blocks(bands: Iterable[Pixels], block_px: int) -> Iterator[Pixels]:
    """An image in blocks, row by row; those at the edge repeat their last pixels."""
    for band in _grouped(bands, block_px):
        for x in range(0, band.shape[1], block_px):
            block = band[:, x : x + block_px]
            missing = block_px - block.shape[0], block_px - block.shape[1]
            yield cv.copyMakeBorder(block, 0, missing[0], 0, missing[1], cv.BORDER_REPLICATE)


def _compressed(slide: SyntheticSlide, blocks: Iterable[Pixels]) -> Iterator[bytes]:
    """JPEG 2000 of each block."""
    for block in blocks:
        if slide.codec == "jp2k-rgb":
            yield jpeg2000_rgb(block, slide.quality)
        else:
            yield jpeg2000_ycbcr(block, slide.subsampling, slide.quality)


def _description(slide: SyntheticSlide, detail: str) -> str:
    """Aperio's image description, from which OpenSlide learns vendor, magnification and mpp."""
    facts = [f"AppMag = {10 / slide.mpp:.4g}", f"Filename = synthetic-{slide.patient}", "Date = 01/01/25"]
    facts += [f"MPP = {slide.mpp:.4f}"] if slide.write_mpp else []
    return "|".join([f"Aperio Image Library v12.0.0 \r\n{slide.width}x{slide.height} {detail}", *facts])


def _write_levels(slide: SyntheticSlide, tiff: tifffile.TiffWriter, folder: Path) -> None:
    """Level 0, thumbnail and further levels, in the order of an Aperio file; reductions wait in files in `folder`."""
    options: dict[str, Any] = {"photometric": "rgb", "dtype": np.uint8}
    options |= {"metadata": None, "software": False, "buffersize": 2**24}  # tifffile would gather 512 MB of blocks
    jpeg: dict[str, Any] = {"compression": "jpeg", "subsampling": (2, 2)}
    if is_jpeg := slide.codec == "jpeg":
        jpeg |= {"subsampling": slide.subsampling, "compressionargs": {"level": slide.quality}}
    side = slide.block_px
    long, short = max(slide.width, slide.height), min(slide.width, slide.height)
    thumb_ratio = 1 << min(max(0, (long - 1).bit_length() - 10), short.bit_length() - 1)
    bands = (pixels(slide, 0, y, slide.width, min(CHUNK, slide.height - y)) for y in range(0, slide.height, CHUNK))
    bands = _spooling(bands, thumb_ratio, folder / "thumbnail")
    for level, downsample in enumerate(slide.downsamples):
        width, height = slide.width // downsample, slide.height // downsample
        if level:
            bands = _spooled(folder / str(level), width)
        if downsample != slide.downsamples[-1]:
            bands = _spooling(bands, slide.downsamples[level + 1] // downsample, folder / str(level + 1))
        detail = f"-> {width}x{height} ({side}x{side}) {_CODECS[slide.codec][0]} Q={slide.quality}"
        blocks = _blocks(bands, side)
        of_blocks: dict[str, Any] = jpeg if is_jpeg else {"compression": _CODECS[slide.codec][1]}
        tiff.write(
            blocks if is_jpeg else _compressed(slide, blocks),
            shape=(height, width, 3),
            tile=(side, side),
            description=_description(slide, detail),
            **options,
            **of_blocks,
        )
        if level == 0:
            thumbnail = np.concatenate(list(_spooled(folder / "thumbnail", width // thumb_ratio)))
            detail = f"-> {thumbnail.shape[1]}x{thumbnail.shape[0]} -"
            tiff.write(thumbnail, rowsperstrip=16, description=_description(slide, detail), **options, **jpeg)


def write_slide(slide: SyntheticSlide, path: str | os.PathLike[str]) -> None:
    """Writes the slide as a tiled pyramidal SVS; the file appears under its name when it is whole.

    Holds a few rows of blocks in memory; needs a tenth of the slide's raw size on disk beside the file meanwhile.
    """
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        part = Path(folder) / "slide"
        with tifffile.TiffWriter(part, bigtiff=slide.width * slide.height > 2**30) as tiff:
            _write_levels(slide, tiff, Path(folder))
        part.replace(target)
