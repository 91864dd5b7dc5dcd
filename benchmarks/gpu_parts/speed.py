"""How fast a GPU trains, by its own clock: tiles/s, memory, and how long it stood still between two steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.common import made_catalog
from benchmarks.gpu_parts.runs import constant, settled, trained
from streaming import cluster
from streaming.catalog import Catalog
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from trainer.run.config import Config
from trainer.run.pace import card_of, peak_flops, tile_flops
from trainer.run.profiling import Profile

WARM_UP, MEASURED, TRACED = 5, 15, 3
PRESETS = {"ViT-S/14": "vits14", "ViT-L/14": "kaiko-2024"}
BATCHES = {"ViT-S/14": (64, 128, 256), "ViT-L/14": (16, 32, 64)}
# Tiles for the stream: a reader for each core but two, which train.
_READERS = 14


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and on which tiles."""

    model: str
    batch: int
    source: str = "constant"
    """constant tiles, or stream: of made slides, through Ray"""
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured of a setting."""

    model: str
    batch: int
    source: str
    compiled: bool
    tiles_per_s: float | None = None
    memory_gb: float | None = None
    """of the GPU's tensors at most, GiB"""
    idle_share: float | None = None
    """of the time: between the end of a step on the GPU and the begin of the next one, mostly for want of tiles"""
    flops_utilisation: float | None = None
    """of the card's peak in bfloat16; none: the peak is not known"""
    note: str = ""
    """why it was not measured"""


def settings() -> list[Setting]:
    """What is measured, the most telling first."""
    found: list[Setting] = []
    for model, batches in BATCHES.items():
        middle = sorted(batches)[1]
        found += [
            Setting(model=model, batch=middle),
            Setting(model=model, batch=middle, compiled=True),
            Setting(model=model, batch=middle, source="stream", compiled=True),
        ]
    return found + [
        Setting(model=model, batch=batch)
        for model, batches in BATCHES.items()
        for batch in batches
        if batch != sorted(batches)[1]
    ]


class Clock(Callback):
    """Marks when steps begin and end on the GPU; on a CPU, when they begin and end."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._marks: list[tuple[Any, Any]] = []
        self._begun: Any = None

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, one: Any, two: Any) -> float:
        return one.elapsed_time(two) / 1e3 if self._gpu else two - one

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Marks the begin, behind the wait for the input."""
        self._begun = self._now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Marks the end."""
        self._marks.append((self._begun, self._now()))

    def seconds(self, skip: int) -> tuple[float, float]:
        """Seconds of the steps after the first ones, without the last one's, and how many of them lay between steps.

        From the end of the last step that is skipped to the end of the last but one, which is followed by what ends a
        run.
        """
        if self._gpu:
            torch.cuda.synchronize()
        kept = self._marks[skip - 1 : -1]
        idle = sum(self._between(one[1], two[0]) for one, two in pairwise(kept))
        return self._between(kept[0][1], kept[-1][1]), idle


def config_of(setting: Setting, gpu: bool, steps: int, *more: str) -> Config:
    """The preset of a setting."""
    return settled(
        PRESETS[setting.model],
        *("--train.batch", str(setting.batch), "--train.steps", str(steps), "--train.log_every", str(steps)),
        *("--train.compile", str(setting.compiled).lower(), "--train.gpu", str(gpu).lower()),
        *("--train.few_kernels", "true", "--data.readers", f"[2,{_READERS}]", *more),
    )


def small_slide(folder: Path) -> Path:
    """A slide that is made in a second."""
    path = folder / "small.svs"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_slide(SyntheticSlide(width=6144, height=6144, patient=0, downsamples=(1, 4)), path)
    return path


def streamed(catalog: Catalog, config: Config) -> Iterable[dict[str, Any]]:
    """The stream's tiles, through Ray Data on this machine."""
    stream = config.stream(catalog)
    cluster.connect(stream.slots)
    return stream.rank_batches(0, 0, config.train.steps)


def measure(setting: Setting, slides: Sequence[Path], *more: str, gpu: bool, measured: int = MEASURED) -> Speed:
    """Trains some steps, the stream's on tiles of the slides; what does not fit into the GPU's memory is noted so."""
    result = Speed(model=setting.model, batch=setting.batch, source=setting.source, compiled=setting.compiled)
    config, clock = config_of(setting, gpu, WARM_UP + measured + 1, *more), Clock(gpu)
    batches = constant
    if setting.source == "stream":
        batches = partial(streamed, made_catalog(list(map(str, slides))))
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        (row,) = trained(config, batches, also=[clock])
    except torch.OutOfMemoryError:
        return replace(result, note="does not fit into the GPU's memory")
    took, idle = clock.seconds(WARM_UP)
    rate = measured * setting.batch / took
    peak = peak_flops(card_of(torch.device("cuda", 0) if gpu else torch.device("cpu")), config.train.precision)
    return replace(
        result,
        tiles_per_s=rate,
        memory_gb=row["peak_memory_gb"],
        idle_share=idle / took,
        flops_utilisation=peak and rate * tile_flops(config) / peak,
    )


def trace(setting: Setting, out: Path, *more: str, gpu: bool) -> Path:
    """Traces some steps; returns the file."""
    name = setting.model.replace("/", "-").lower()
    config = config_of(setting, gpu, WARM_UP + TRACED, "--run.out", str(out / name), *more)
    trained(config, also=[Profile(config, 0, TRACED, lambda _: None)])
    (path,) = (out / name / "profile").iterdir()
    return path


def speed_lines(speeds: Iterable[Speed]) -> list[str]:
    """A table."""
    lines = [f"{'model':9} {'batch':>5} {'tiles':8} {'blocks':8} {'tiles/s':>8} {'GiB':>6} {'idle':>5} {'of peak':>7}"]
    for speed in speeds:
        head = f"{speed.model:9} {speed.batch:>5} {speed.source:8} {'compiled' if speed.compiled else 'plain':8}"
        if speed.tiles_per_s is None:
            lines.append(f"{head} {speed.note}")
            continue
        share = f"{speed.flops_utilisation:.0%}" if speed.flops_utilisation else "–"
        lines.append(f"{head} {speed.tiles_per_s:8,.1f} {speed.memory_gb:6.2f} {speed.idle_share:5.0%} {share:>7}")
    return lines
