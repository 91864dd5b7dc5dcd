"""`tilestream demo`: slides made on the spot, then the whole road, then a report."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from streaming import cluster, machine, storage
from streaming.catalog.build import build_catalog
from streaming.errors import ConfigError
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from trainer.embed.job import embed
from trainer.embed.options import EmbedOptions
from trainer.run.config import read_config
from trainer.run.metrics_log import METRICS
from trainer.run.train import train
from trainer.show.run_report import own_slides_commands, write_report

_MARKER = ".tilestream-demo"
_ORGANS = ("breast", "colon", "lung", "kidney")


def run_demo(out: str, *, steps: int = 60, slide_px: tuple[int, int] = (8192, 6144), num_slides: int = 4) -> str:
    """Makes slides, catalogs them, trains, embeds one slide and writes `report.html`; returns the report's path.

    Called again, it keeps the slides and trains anew.

    Raises:
        ConfigError: `out` holds something else, or the sizes make no sense.
    """
    if steps < 1 or num_slides < 1:
        raise ConfigError(f"steps {steps}, slides {num_slides}: both must be at least 1")
    folder = _own_folder(out)
    cluster.connect(num_cpus=8)  # once for all phases; the training needs the most slots
    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    slides = [SyntheticSlide(width=slide_px[0], height=slide_px[1], patient=p) for p in range(num_slides)]
    with _phase(console, f"{num_slides} slides of {slide_px[0]:,} × {slide_px[1]:,} px"):
        _write_slides(slides, folder / "slides")
    with _phase(console, "catalog: where their tissue lies"):
        _write_metadata(slides, folder / "patients.csv")
        build_catalog([str(folder / "slides")], str(folder / "catalog"), metadata_csv=str(folder / "patients.csv"))
    run = str(folder / "run")
    storage.remove(run)
    overrides = ["--data.catalog", str(folder / "catalog"), "--run.out", run, "--train.steps", str(steps)]
    config = read_config("debug", overrides)
    with _phase(console, f"training: {steps} steps of {config.train.batch} tiles, streamed from the slides"):
        result = train(config)
    with _phase(console, "embeddings of one slide's tissue tiles"):
        options = EmbedOptions(mpp=0.5, size=128)
        report = embed(run, [str(folder / "slides" / _name(slides[-1]))], str(folder / "embeddings"), options)
    with _phase(console, "report"):
        path = str(folder / "report.html")
        write_report(path, run, embeddings=report.files)
    for line in result.summary:
        console.print(line, style="dim")
    _say_where(console, folder, path, result.checkpoint, report.files[0], time.perf_counter() - started)
    return path


def _own_folder(out: str) -> Path:
    folder = Path(out).expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and ((folder / _MARKER).exists() or not os.listdir(folder))):
        raise ConfigError(f"{out}: exists and is not the demo's; name another folder by --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    return folder


@contextlib.contextmanager
def _phase(console: Console, title: str) -> Generator[None]:
    started = time.perf_counter()
    console.print(f"[bold]▸ {title}[/bold]")
    yield
    console.print(f"  done in {time.perf_counter() - started:.1f} s", style="dim")


def _name(slide: SyntheticSlide) -> str:
    return f"patient{slide.patient}.svs"


def _write_slides(slides: list[SyntheticSlide], folder: Path) -> None:
    """Writes those that are not there from an earlier call with the same sizes."""
    folder.mkdir(exist_ok=True)
    note = folder / "made.json"
    wanted = json.dumps([asdict(slide) for slide in slides])
    if note.exists() and note.read_text(encoding="utf-8") == wanted:
        return
    for path in folder.iterdir():
        path.unlink()
    with ProcessPoolExecutor(min(len(slides), machine.cpus().amount), mp_context=get_context("spawn")) as pool:
        list(pool.map(write_slide, slides, [folder / _name(slide) for slide in slides]))
    note.write_text(wanted, encoding="utf-8")


def _write_metadata(slides: list[SyntheticSlide], path: Path) -> None:
    lines = [f"{_name(s)},{s.patient},{_ORGANS[s.patient % len(_ORGANS)]},H&E" for s in slides]
    path.write_text("\n".join(["slide,patient,organ,stain", *lines]) + "\n", encoding="utf-8")


def _say_where(console: Console, folder: Path, report: str, checkpoint: str, embeddings: str, seconds: float) -> None:
    console.print(f"\n[bold]Done in {seconds:.0f} s.[/bold] Open the report in a browser; all results:")
    places = {
        "report": report,
        "slides": folder / "slides",
        "catalog": folder / "catalog" / "slides.parquet",
        "checkpoint": checkpoint,
        "metrics": folder / "run" / METRICS,
        "embeddings": embeddings,
    }
    for name, place in places.items():
        console.print(f"  {name:<11} {place}")
    console.print("\n[bold]Your own slides[/bold] (local or s3://…; first `. .venv/bin/activate`):")
    for command in own_slides_commands():
        console.print(f"  {command}")
