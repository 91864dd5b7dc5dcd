"""Whether a GPU does what a CPU does: each check trains, crops or embeds on both and compares.

On a CPU in place of the GPU they compare its form of a step, of few large kernels, with a CPU's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from benchmarks.gpu_parts.runs import settled, smooth_tiles, trained
from trainer.embed.model import model_of
from trainer.embed.passes import Passes
from trainer.recipe.network import build_backbone
from trainer.run.config import Config
from trainer.run.metrics_log import Row

STEPS = 10
_QUIET_FROM = 3  # steps until constants are sent, memory is found and states are made
TERMS = ("loss", "dino_global", "dino_local", "ibot", "grad_norm_backbone")


@dataclass(frozen=True)
class Check:
    """What was compared."""

    what: str
    holds: bool
    found: str
    """the numbers, in a few words"""


# A small training whose stochastic depth, stains and blocks are those of the large ones, and a smaller one for CPUs.
_TRAINING = (
    *("--train.steps", str(STEPS), "--train.batch", "8", "--optim.base_lr", "1e-3"),
    *("--model.drop_path", "0.4", "--augment.hed_prob", "0.5", "--train.few_kernels", "true"),
)
_SMALLER = ("--model.backbone", "test_vit", "--train.batch", "4")


def _config(gpu: bool, *more: str) -> Config:
    return settled("debug", *_TRAINING, *(() if gpu else _SMALLER), "--train.gpu", str(gpu).lower(), *more)


@lru_cache
def _rows(gpu: bool, *more: str, with_group: bool = False) -> list[Row]:
    return trained(_config(gpu, *more), with_group=with_group)


def _distance(rows: list[Row], others: list[Row]) -> float:
    """The largest relative distance of a loss term or gradient norm over all steps."""
    assert len(rows) == len(others) == STEPS
    pairs = [(row[term], other[term]) for row, other in zip(rows, others, strict=True) for term in TERMS]
    return max(abs(one - two) / abs(two) for one, two in pairs)


def _on_cpu(gpu: bool) -> list[Row]:
    """The same training in a CPU's form, on one."""
    return _rows(gpu, "--train.gpu", "false", "--train.few_kernels", "false")


def compared(what: str, rows: list[Row], others: list[Row], most: float) -> Check:
    """Whether two trainings have the same losses and gradient norms, in each step, but for a relative distance."""
    found = _distance(rows, others)
    return Check(what, found <= most, f"at most {found:.1e} apart, {most:g} allowed")


def crops(gpu: bool) -> Check:
    """The crops of `vits14`, with stains, against those of a CPU."""
    recipe = settled("vits14", "--augment.hed_prob", "0.5", "--augment.reinhard_prob", "0.2").recipe.augment
    tiles, index = smooth_tiles(8, 256), torch.arange(8)
    device = torch.device("cuda" if gpu else "cpu")
    ours = recipe.multi_crop(tiles.to(device), index.to(device), 0, few_kernels=True)
    wanted = recipe.multi_crop(tiles, index, 0)
    away = torch.cat([(one.cpu() - two).abs().flatten() for one, two in zip(ours, wanted, strict=True)])
    share = float((away > 1e-3).float().mean())
    return Check("crops as a CPU's", share < 1e-4, f"{share:.1e} of the values over 1e-3 apart, 1e-4 allowed")


def waits(gpu: bool) -> Check:
    """Ten steps during which whatever waits for the GPU is an error."""
    what, steps = "ten steps never wait for the GPU", _QUIET_FROM + STEPS + 1
    done = 0

    def stepped() -> bool:
        nonlocal done
        done += 1
        if gpu and done in (_QUIET_FROM, _QUIET_FROM + STEPS):
            torch.cuda.set_sync_debug_mode("error" if done == _QUIET_FROM else "default")
        return False

    try:
        trained(_config(gpu, "--train.steps", str(steps), "--train.log_every", str(steps)), stop=stepped)
    except RuntimeError as error:
        if "called a synchronizing" not in str(error):
            raise
        return Check(what, False, f"step {done + 1}: {str(error).splitlines()[0]}")
    finally:
        if gpu:
            torch.cuda.set_sync_debug_mode("default")
    return Check(what, done == steps, f"{done} steps" + ("" if gpu else "; on a CPU nothing can wait"))


def losses(gpu: bool) -> Check:
    """Ten steps in float32 against a CPU's."""
    return compared("losses of ten steps as a CPU's, float32", _rows(gpu), _on_cpu(gpu), 1e-3)


def bfloat16(gpu: bool) -> Check:
    """Ten steps in bfloat16 against a CPU's in float32."""
    rows = _rows(gpu, "--train.precision", "bf16-mixed")
    return compared("losses of ten steps near a CPU's, bfloat16", rows, _on_cpu(gpu), 0.05)


def compiled(gpu: bool) -> Check:
    """Ten steps of compiled blocks against the same of plain ones."""
    rows = _rows(gpu, "--train.compile", "true")
    return compared("compiled blocks train as plain ones", rows, _rows(gpu), 1e-3)


def shards(gpu: bool) -> Check:
    """Ten steps of one rank of FSDP against the same without."""
    rows = _rows(gpu, "--train.strategy", "fsdp", with_group=True)
    return compared("one rank of FSDP trains as none", rows, _rows(gpu), 1e-3)


def embeddings(gpu: bool) -> Check:
    """Embeddings against a CPU's, in float32 and in bfloat16."""
    config = settled("debug")
    torch.manual_seed(0)
    wanted = model_of("made", config.augment, build_backbone(config.model, config.augment.global_size))
    tiles = smooth_tiles(8, 64).numpy()
    expected = wanted.embed(tiles)
    model = wanted.on(torch.device("cuda" if gpu else "cpu"))
    passes = [Passes(replace(model, precision=precision), patches=False) for precision in ("32", "bf16")]
    # Three batches, so that one is on its way while another is computed.
    whole, half = (np.concatenate([made.embeddings for made in one.through(np.split(tiles, (3, 6)))]) for one in passes)
    away, cosine = float(np.abs(whole - expected).max()), _cosine(half, expected)
    return Check(
        "embeddings as a CPU's", away < 1e-3 and cosine > 0.999, f"{away:.1e} apart; bfloat16: cosine {cosine:.5f}"
    )


def _cosine(one: np.ndarray, two: np.ndarray) -> float:
    """The least cosine of two rows."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    return float(((one * two).sum(axis=1) / norms).min())


CHECKS: dict[str, Callable[[bool], Check]] = {
    check.__name__: check for check in (crops, waits, losses, bfloat16, compiled, shards, embeddings)
}


def run_check(name: str, gpu: bool) -> Check:
    """A check's finding; of one that could not be made, why."""
    try:
        return CHECKS[name](gpu)
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
