"""Whether a GPU does what a CPU does, and how fast it trains: `tilestream bench gpu`.

Six minutes on one GPU, with nothing but this checkout and its environment. First what must hold: crops, losses,
compiled blocks, shards and embeddings beside a CPU's, and ten steps that never wait for the GPU. Then tiles/s, memory
and the GPU's idle time of ViT-S/14 and ViT-L/14 at several batches, on constant tiles and on the stream's, and a trace.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import made_slides
from benchmarks.gpu_parts.checks import CHECKS, Check, run_check
from benchmarks.gpu_parts.speed import (
    MEASURED,
    PRESETS,
    Setting,
    Speed,
    measure,
    settings,
    small_slide,
    speed_lines,
    trace,
)
from benchmarks.table import machine

# What makes all of it small enough for a CPU, to see that it runs.
SMALL = (
    *("--model.backbone", "test_vit", "--model.patch_size", "8", "--augment.global_size", "32"),
    *("--augment.local_size", "16", "--model.num_prototypes", "64", "--model.head_hidden", "16"),
    *("--model.head_bottleneck", "8", "--train.precision", "32-true", "--data.readers", "[1,1]"),
)
_SMALL_SEPARATE = ("--model.ibot_bottleneck", "8", "--model.num_registers", "0")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what was found; exit status 1 where a check does not hold."""
    parser = argparse.ArgumentParser(prog="tilestream bench gpu", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which nothing more is begun (6)")
    parser.add_argument("--small", action="store_true", help="tiny networks, on a CPU where there is no GPU")
    parser.add_argument("--only", choices=("checks", "speed"), help="one part of it")
    parser.add_argument("--out", type=Path, default=Path("gpu-traces"), help="folder of the traces (gpu-traces)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir(), "tilestream-bench"),
        help="where slides are kept",
    )
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    gpu = torch.cuda.is_available()
    if not gpu and not args.small:
        none = "no GPU here: PyTorch sees none, and nothing was measured; --small runs the same code on the CPU"
        print(json.dumps({"machine": machine(), "gpu": None}) if args.json else none)
        return 0
    card, until = torch.cuda.get_device_name(0) if gpu else None, time.monotonic() + 60 * args.minutes
    if not args.json:
        print(f"{machine()}; {card or 'no GPU: the CPU in its place'}; torch {torch.__version__}\n")
    checks = [] if args.only == "speed" else _check(gpu, until, quiet=args.json)
    speeds, traces = ([], []) if args.only == "checks" else _measure(args, gpu, until)
    if args.json:
        found = {"checks": list(map(asdict, checks)), "speeds": list(map(asdict, speeds)), "traces": traces}
        print(json.dumps({"machine": machine(), "gpu": card, "torch": torch.__version__, **found}))
    return 0 if all(check.holds for check in checks) else 1


def _check(gpu: bool, until: float, *, quiet: bool) -> list[Check]:
    checks: list[Check] = []
    for name in CHECKS:
        check = run_check(name, gpu) if time.monotonic() < until else Check(name, False, "no time was left")
        checks.append(check)
        if not quiet:
            print(f"{'holds' if check.holds else 'FAILS'}  {check.what}: {check.found}", flush=True)
    return checks


def _measure(args: argparse.Namespace, gpu: bool, until: float) -> tuple[list[Speed], list[str]]:
    todo, more, measured = settings(), tuple[str, ...](), MEASURED
    if args.small:
        more, measured = SMALL, 2
        todo = [Setting(model=model, batch=8) for model in PRESETS]
        todo.append(Setting(model="ViT-S/14", batch=8, source="stream"))
    slides = [small_slide(args.folder)] if args.small else made_slides(args.folder, 2)
    speeds, traces = list[Speed](), list[str]()
    for number, setting in enumerate(todo):
        if time.monotonic() > until:
            speeds.append(Speed(**asdict(setting), note="no time was left"))
        else:
            speeds.append(measure(setting, slides, *more, *_own(setting, args), gpu=gpu, measured=measured))
        if not args.json:
            print("\n" + "\n".join(speed_lines(speeds)) if not number else speed_lines(speeds)[-1], flush=True)
    for model in PRESETS:
        if time.monotonic() < until:
            first = next(setting for setting in todo if setting.model == model)
            traces.append(str(trace(first, args.out, *more, *_own(first, args), gpu=gpu)))
    if not args.json:
        print("\n" + "\n".join(f"trace: {path}" for path in traces))
    return speeds, traces


def _own(setting: Setting, args: argparse.Namespace) -> tuple[str, ...]:
    return _SMALL_SEPARATE if args.small and setting.model == "ViT-L/14" else ()


if __name__ == "__main__":
    sys.exit(main())
