"""CPU of one tile from a local file in the page cache, in this process, against OpenSlide + PIL."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from benchmarks.common import SIZE, OpenSlideTiles
from benchmarks.mission import MPPS, MadeSlide, mission
from benchmarks.table import Line, line
from streaming.plan.footprints import Corners
from streaming.slide import Slide
from streaming.storage.staging import Staging

_tile = np.empty((SIZE, SIZE, 3), np.uint8)


def cpu_ms(reads: Sequence[Callable[[], object]]) -> float:
    """CPU milliseconds of this process for one of some tiles."""
    started = time.process_time()
    for read in reads:
        read()
    return (time.process_time() - started) / len(reads) * 1000


def read_into(slide: Slide, x: int, y: int, mpp: float) -> None:
    """Reads a tile as a reader does, into memory that is there already."""
    slide.begin_tile(x, y, mpp, SIZE).fill(_tile)


def cpu_lines(made: Sequence[MadeSlide], tiles: int, turns: int) -> list[Line]:
    """The four magnifications of JPEG at 0.2527 µm/px, and JPEG 2000 at its own and at twice its µm/px."""
    at_2527 = [each for each in made if each.is_jpeg and each.slide.mpp == 0.2527]
    small, large = ([each for each in at_2527 if each.slide.block_px == block] for block in (240, 256))
    wavelets = [each for each in made if not each.is_jpeg and each.slide.mpp < 0.3]
    found, means = list[Line](), list[Line]()
    for slides, corners, most in ((small, "anywhere", 0.12), (large, "anywhere", 0), (large, "blocks", 0.06)):
        what = f"JPEG, 0.2527 µm/px, {slides[0].slide.block_px} px blocks, corners {corners}"
        each = _Contest(slides, corners, MPPS, tiles, turns)
        found += [line(f"CPU per tile: {what}, at {mpp} / OpenSlide + PIL", *each.of(mpp), "ms") for mpp in MPPS]
        means.append(line(f"mean of the four: {what} / OpenSlide + PIL", *each.mean(), "ms", most=most))
        if corners == "blocks":
            means.append(
                line(f"mean of the four: {what} / OpenSlide + PIL, its corners too", *each.mean(same=True), "ms")
            )
    for corners, musts in (("anywhere", (0.85, 0.5)), ("blocks", (0.3, 0.25))):
        each = _Contest(wavelets, corners, (0.25, 0.5), tiles // 2, turns)
        for mpp, times, most in zip((0.25, 0.5), ("native", "2×"), musts, strict=True):
            what = f"CPU per tile: JPEG 2000, {times}, corners {corners}"
            found.append(line(f"{what} / OpenSlide + PIL", *each.of(mpp), "ms", most=most))
            if corners == "blocks":
                found.append(line(f"{what} / OpenSlide + PIL, its corners too", *each.of(mpp, same=True), "ms"))
    return [*means, *found]


class _Contest:
    """We and OpenSlide take turns; it reads tiles that begin anywhere, as loaders draw them, and ours as well."""

    def __init__(
        self, slides: Sequence[MadeSlide], corners: Corners, mpps: Sequence[float], tiles: int, turns: int
    ) -> None:
        source = mission(slides)
        opened = [source.catalog.open_slide(row, None, Staging()) for row in range(len(slides))]
        theirs = OpenSlideTiles(source.paths)
        self._turns: dict[float, list[tuple[float, float, float]]] = {}
        for mpp in mpps:
            places = {
                kind: [(int(slide), int(x), int(y)) for slide, x, y in zip(specs.slide, specs.x, specs.y, strict=True)]
                for kind in ("anywhere", corners)
                for specs in [source.plan(kind, [mpp]).specs(np.arange(tiles))]
            }
            ours = [partial(read_into, opened[slide], x, y, mpp) for slide, x, y in places[corners]]
            they = [partial(theirs, slide, x, y, mpp) for slide, x, y in places["anywhere"]]
            same = [partial(theirs, slide, x, y, mpp) for slide, x, y in places[corners]] if corners == "blocks" else []
            cpu_ms(ours)
            self._turns[mpp] = [(cpu_ms(ours), cpu_ms(they), cpu_ms(same) if same else 0.0) for _ in range(turns)]

    def of(self, mpp: float, *, same: bool = False) -> tuple[list[float], list[float]]:
        """Our and their milliseconds of each turn; same: theirs of the very tiles that we read."""
        turns = self._turns[mpp]
        return [turn[0] for turn in turns], [turn[2 if same else 1] for turn in turns]

    def mean(self, *, same: bool = False) -> tuple[list[float], list[float]]:
        """The means over all magnifications of each turn."""
        each = np.mean([self.of(mpp, same=same) for mpp in self._turns], axis=0)
        return list(each[0]), list(each[1])
