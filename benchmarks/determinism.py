"""One training curve three times, undisturbed and killed twice and resumed: `tilestream bench determinism`.

Real command lines train on slides made on the spot. Two of the three runs are killed twice, by SIGKILL to all their
processes between two checkpoints, and started again each time: one on other numbers of readers, one on other numbers of
ranks and readers. What comes before the first kill is done once for both. Promised is (else the exit status is 1):

- Other readers: all numbers of the metrics and all tensors of the last checkpoint are the same to the bit.
- Other ranks: the tiles of every step are the same to the bit. Losses and gradients are sums over the ranks, whose
  rounding depends on how many there are: they differ in their last bits, and training carries that on. No step's loss
  differs by more than `MOST`.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import keystr, tree_flatten_with_path

from benchmarks.common import made_catalog
from benchmarks.table import machine
from streaming import cluster, storage
from streaming.delivery.stream import BatchShape, step_digest
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from tests.processes import TILESTREAM, kill_tree
from trainer.run import checkpoints
from trainer.run.config import Config
from trainer.run.data import load_catalog, make_stream
from trainer.run.metrics_log import METRICS

MOST = 1e-4
"""Largest relative difference of a step's loss on other numbers of ranks."""
# What depends on the machine's speed and memory, and counts that begin with the process.
_NOT_TRAINED = {"time", "tiles_per_s", "data_wait_share", "peak_memory_gb", "filtered", "failed"}
_TILES = ("step", "first_index", "next_index")
# Stochastic depth draws by rank: with it, another number of ranks would be another training, not another rounding.
RECIPE = ("--model.backbone", "test_vit", "--model.drop_path", "0", "--data.mpp", "{0.5: 1, 1.0: 1}")

Row = Mapping[str, float]


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    ranks: int
    readers: int
    kill_after: float | None = None
    """share of the run's steps after which all its processes are killed; none: it trains to its end"""

    def __str__(self) -> str:
        return f"{self.ranks} × {self.readers}"


UNDISTURBED, READERS, RANKS = "undisturbed", "other readers", "other ranks and readers"
WHOLE, BEGUN = Start(2, 1), Start(2, 1, 0.45)
# How the two go on after a first start that they have in common.
GONE_ON = {READERS: (Start(2, 3, 0.8), Start(2, 2)), RANKS: (Start(1, 3, 0.8), Start(4, 2))}


@dataclass(frozen=True)
class Run:
    """A run that has come to its end."""

    out: str
    starts: Sequence[Start]
    killed: Sequence[int]
    """last step that the progress showed before each kill"""
    resumed: Sequence[int]
    """step of the checkpoint that each later start went on from"""

    def rows(self) -> list[Row]:
        """Its metrics, a row a step."""
        return storage.read_table(storage.join(self.out, METRICS)).to_pylist()


@dataclass(frozen=True)
class Comparison:
    """How the metrics of a run differ from those of the undisturbed one."""

    same_steps: bool
    """whether both have the same steps, each of the same sample indices"""
    differing: tuple[int, ...]
    """steps of which any number that is trained differs, be it in the last bit"""
    loss: tuple[float, ...]
    """difference of each step's loss, relative to the undisturbed one"""


def compare(undisturbed: Sequence[Row], other: Sequence[Row]) -> Comparison:
    """Compares the metrics of two runs, row by row; what depends on the machine's speed is left out."""
    pairs = list(zip(undisturbed, other, strict=False))
    indices = [[tuple(row[name] for name in _TILES) for row in rows] for rows in (undisturbed, other)]
    trained = [tuple({name: row[name] for name in row.keys() - _NOT_TRAINED} for row in pair) for pair in pairs]
    return Comparison(
        same_steps=indices[0] == indices[1],
        differing=tuple(int(one["step"]) for one, two in trained if one != two),
        loss=tuple(abs(two["loss"] - one["loss"]) / abs(one["loss"]) for one, two in pairs),
    )


def different_tensors(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[int, int]:
    """Of the weights and moments of two checkpoints: how many differ in any bit, and how many there are."""
    first, second = _tensors(one), _tensors(two)
    if first.keys() != second.keys():
        raise SystemExit("the two checkpoints hold different tensors")
    return sum(tensor != second[name] for name, tensor in first.items()), len(first)


def _tensors(state: Mapping[str, Any]) -> dict[str, bytes]:
    """The content of each tensor by its place; dictionaries come back from a checkpoint in another order."""
    trained = {part: state[part] for part in ("state_dict", "optimizer_states")}
    leaves = tree_flatten_with_path(trained)[0]
    return {keystr(path): leaf.numpy().tobytes() for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def run_start(arguments: Sequence[str], steps: int, kill_after: int | None) -> int:
    """Runs a training to its end, or kills all its processes once it shows that step; the last step it showed."""
    # On a terminal the progress is shown at once; in a log, every ten seconds.
    terminal, its_end = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "PYTHONWARNINGS": "ignore"}
    running = subprocess.Popen([*TILESTREAM, *arguments], stdout=its_end, stderr=its_end, env=environment)
    os.close(its_end)
    said, step = "", 0
    try:
        while running.poll() is None and (kill_after is None or step < kill_after):
            if not select.select([terminal], [], [], 0.2)[0]:
                continue
            try:
                told = os.read(terminal, 1 << 16).decode(errors="replace")
            except OSError:  # Linux says so where nobody holds the other end any more
                running.wait()
                break
            said = (said + _plain(told))[-4000:]
            step = max([step, *(int(shown) for shown in re.findall(rf"(\d+)/{steps} steps", said))])
        if (ended := running.poll()) not in (None, 0) or (ended == 0 and kill_after is not None):
            raise SystemExit(f"the training ended with status {ended} after step {step}:\n{said}")
    finally:
        kill_tree(running)
        os.close(terminal)
    return step


def _plain(said: str) -> str:
    """What a terminal was told, without colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said)


def train(catalog: str, out: str, starts: Sequence[Start], steps: int, begun: Run | None = None) -> Run:
    """Trains by so many starts, each killed or to the last step; one that has begun is gone on with in a copy."""
    killed, resumed = list[int](), list[int]()
    if begun is not None:
        shutil.copytree(begun.out, out)
        killed, resumed = [*begun.killed], [*begun.resumed]
    arguments = ["train", "debug", "--data.catalog", catalog, "--run.out", out, *RECIPE, "--train.log_every", "1"]
    arguments += ["--train.steps", str(steps), "--train.checkpoint_every", str(steps // 3)]
    for start in starts:
        began = time.perf_counter()
        own = ["--train.ranks", str(start.ranks), "--data.readers", f"[{start.readers},{start.readers}]"]
        kill_after = None if start.kill_after is None else round(start.kill_after * steps)
        step = run_start([*arguments, *own], steps, kill_after)
        how = "trained"
        if kill_after is not None:
            killed.append(step)
            resumed.append((checkpoints.steps_of(out) or [0])[-1])
            how = f"killed, to go on from step {resumed[-1]},"
        took_s = time.perf_counter() - began
        sys.stderr.write(f"{Path(out).name}, ranks × readers {start}: {how} after step {step} ({took_s:.0f} s)\n")
    return Run(out, [*(begun.starts if begun is not None else ()), *starts], killed, resumed)


def digests(config: Config, starts: Sequence[Start], resumed: Sequence[int]) -> list[str]:
    """SHA-256 of the tiles of each step, streamed by the starts' own ranks and readers from where each began."""
    catalog, found = load_catalog(config.data), list[str]()
    ends = [*resumed, config.train.steps]
    for start, first, last in zip(starts, [0, *resumed], ends, strict=True):
        data = replace(config.data, readers=(start.readers, start.readers))
        stream = make_stream(data, config.run.seed, BatchShape(config.train.batch, start.ranks), catalog)
        found += [step_digest(batches) for batches in stream.steps(first, last)]
    return found


@dataclass(frozen=True)
class Finding:
    """How a run that was killed compares with the undisturbed one."""

    metrics: Comparison
    tensors: tuple[int, int]
    """of the last checkpoint: how many differ, of how many"""
    same_tiles: bool
    """whether its ranks and readers stream the same tiles in every step"""

    def holds(self, *, to_the_bit: bool) -> bool:
        """Whether all is as promised."""
        if not (self.metrics.same_steps and self.same_tiles):
            return False
        if to_the_bit:
            return not self.metrics.differing and not self.tensors[0]
        return max(self.metrics.loss) <= MOST


def find(runs: Mapping[str, Run]) -> dict[str, Finding]:
    """Compares each other run with the undisturbed one."""
    undisturbed = runs[UNDISTURBED]
    last = checkpoints.find(undisturbed.out)
    config, state, rows = checkpoints.read_config(last), checkpoints.load(last), undisturbed.rows()
    cluster.connect(8)
    wanted = digests(config, undisturbed.starts, undisturbed.resumed)
    return {
        name: Finding(
            compare(rows, one.rows()),
            different_tensors(state, checkpoints.load(checkpoints.find(one.out))),
            digests(config, one.starts, one.resumed) == wanted,
        )
        for name, one in runs.items()
        if name != UNDISTURBED
    }


LOOKS = {UNDISTURBED: ("#c3cedd", 8, "-"), READERS: ("#1c5d99", 2.5, "-"), RANKS: ("#e8590c", 2.5, (0, (2, 2)))}
"""Colour, width and dashes of each run's line."""


def draw(path: Path, runs: Mapping[str, Run]) -> None:
    """The runs' losses over one another, with the kills, and below how far they lie from the undisturbed ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(12, 6), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    losses = {name: np.array([row["loss"] for row in one.rows()]) for name, one in runs.items()}
    _draw_losses(above, runs, losses)
    _draw_differences(below, losses)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_losses(axes: Any, runs: Mapping[str, Run], losses: Mapping[str, NDArray[np.float64]]) -> None:
    low, high = losses[UNDISTURBED].min(), losses[UNDISTURBED].max()
    for place, (name, one) in enumerate(runs.items()):
        colour, width, dashes = LOOKS[name]
        label = f"{name} ({', then '.join(map(str, one.starts))})"
        axes.plot(np.arange(len(losses[name])) + 1, losses[name], ls=dashes, color=colour, lw=width, label=label)
        height = low - (0.05 + 0.06 * place) * (high - low)
        for step, back in zip(one.killed, one.resumed, strict=True):
            axes.plot([back, step], [height, height], color=colour, lw=5, solid_capstyle="butt", alpha=0.45)
            axes.plot([step], [height], "X", color=colour, ms=11, mec="white", zorder=5)
    axes.plot([], [], "X-", color="#777777", ms=10, lw=4, label="killed (SIGKILL), and the steps that it lost")
    axes.set(ylabel="loss", title="One training, undisturbed and killed twice and resumed (ranks × readers)")
    axes.legend(frameon=False)


def _draw_differences(axes: Any, losses: Mapping[str, NDArray[np.float64]]) -> None:
    wanted = losses[UNDISTURBED]
    for name in (READERS, RANKS):
        colour, width, dashes = LOOKS[name]
        apart = np.abs(losses[name] - wanted)
        told = f"at most {apart.max():.1e}" if apart.any() else "0 in every step"
        axes.plot(np.arange(len(apart)) + 1, apart, ls=dashes, color=colour, lw=width, label=f"{name}: {told}")
    last_bit = float(np.spacing(np.float32(wanted.max())))
    axes.set_yscale("symlog", linthresh=last_bit)
    axes.set_yticks([0, *(10.0**power for power in range(-6, 0))])
    axes.axhline(last_bit, color="#999999", lw=1, ls=(0, (5, 4)))
    axes.text(1, last_bit * 0.9, "last bit of a float32", color="#777777", va="top")
    axes.set(xlabel="step", ylabel="|difference| of the loss", ylim=(-0.2 * last_bit, 1e3 * last_bit))
    axes.legend(frameon=False, loc="upper left")


def print_table(runs: Mapping[str, Run], found: Mapping[str, Finding]) -> None:
    """A line a run."""
    print(
        f"{'':<24} {'ranks × readers':<20} {'killed after':<13} {'went on from':<13} "
        f"{'tiles':<6} {'steps that differ':>17} {'loss, at most':>14} {'tensors':>12}"
    )
    for name, one in runs.items():
        starts, killed, resumed = (", ".join(map(str, each)) for each in (one.starts, one.killed, one.resumed))
        told = f"{name:<24} {starts:<20} {killed:<13} {resumed:<13}"
        if name in found:
            finding = found[name]
            metrics = finding.metrics
            tiles = "same" if finding.same_tiles and metrics.same_steps else "OTHER"
            verdict = "" if finding.holds(to_the_bit=name == READERS) else "  DOES NOT HOLD"
            differing = f"{len(metrics.differing)} of {len(metrics.loss)}"
            tensors = "{} of {}".format(*finding.tensors)
            told += f" {tiles:<6} {differing:>17} {max(metrics.loss):>14.1e} {tensors:>12}{verdict}"
        print(told.rstrip())


def write_slides(folder: Path) -> str:
    """A catalog of three slides that are made once."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"patient{patient}.svs" for patient in range(3)]
    for patient, path in enumerate(paths):
        if not path.exists():
            write_slide(SyntheticSlide(width=4096, height=3072, patient=patient, downsamples=(1, 4)), path)
    return made_catalog([str(path) for path in paths], out=str(folder / "catalog")).uri


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, draws the picture and prints the table; exit status 1 where something promised does not hold."""
    parser = argparse.ArgumentParser(prog="tilestream bench determinism", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of each run, with a checkpoint after each third (60)")
    parser.add_argument("--picture", type=Path, help="where the picture goes (determinism.png in --folder)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    default = Path(tempfile.gettempdir(), "tilestream-bench")
    parser.add_argument("--folder", type=Path, default=default, help="where slides and picture are kept")
    args = parser.parse_args(argv)
    catalog, began = write_slides(args.folder / "determinism"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = {UNDISTURBED: train(catalog, f"{folder}/{UNDISTURBED}", [WHOLE], args.steps)}
        begun = train(catalog, f"{folder}/begun", [BEGUN], args.steps)
        for name, starts in GONE_ON.items():
            runs[name] = train(catalog, f"{folder}/{name.replace(' ', '-')}", starts, args.steps, begun)
        found = find(runs)
        facts = {"machine": machine(), "steps": args.steps, "seconds": round(time.perf_counter() - began)}
        if args.json:
            print(json.dumps(facts | {name: asdict(finding) for name, finding in found.items()}))
        else:
            print("; ".join(f"{key}: {fact}" for key, fact in facts.items()) + "\n")
            print_table(runs, found)
        draw(args.picture or args.folder / "determinism.png", runs)
    return 0 if all(finding.holds(to_the_bit=name == READERS) for name, finding in found.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
