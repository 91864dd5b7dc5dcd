"""Compiled blocks: that something is compiled, as little as there is, and that it trains as plain blocks do.

One rank with a process group of its own, so that replicas and shards are what several ranks have. The compiler's front
end and its autograd run; what it generates code with, only in the long test.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import Callback
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.distributed.tensor import DTensor

from streaming.catalog import Catalog
from tests.processes import free_ports
from tests.trainer.run.test_ranks import TINY
from tests.trainer.run.test_resume import tiny
from trainer.evaluate.knn_watch import KnnWatch
from trainer.run import checkpoints
from trainer.run.background_checkpoints import NoNewCheckpoints
from trainer.run.config import read_config
from trainer.run.fit import Place, fit
from trainer.run.replay import LocalRank
from trainer.run.step_batches import StepBatches
from trainer.run.stop_signals import Signals
from trainer.run.train import train

pytestmark = pytest.mark.slow

# More blocks than the compiler makes graphs of a function before it gives up: each must take the others' graph.
DEEP = ("--model.backbone", "vit_tiny_patch16_224", "--model.patch_size", "16", "--train.steps", "3")
FORMS = {
    f"{strategy}{'_checkpointing' * checkpointing}{'_drop_path' * drop_path}": (
        *("--train.strategy", strategy, "--train.activation_checkpointing", str(checkpointing).lower()),
        *("--model.drop_path", "0.4" if drop_path else "0", "--train.few_kernels", "true"),
        *("--train.precision", "bf16-mixed" if strategy == "fsdp" else "32-true"),
    )
    for strategy, checkpointing, drop_path in product(("ddp", "fsdp"), (False, True), (False, True))
}
# A CPU's form: crops of a size at a time, so that a student's block is one graph for each size.
FORMS["ddp_by_size"] = (*FORMS["ddp_drop_path"], "--train.few_kernels", "false", "--train.precision", "bf16-mixed")
USUAL = ("ddp_checkpointing_drop_path", "fsdp_checkpointing_drop_path", "ddp_by_size")


class Looks(Callback):
    """Keeps the first step's gradients, and what was compiled until each step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.compiled: list[dict[str, Any]] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.gradients:
            whole = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
            self.gradients = {
                name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
                for name, grad in whole.items()
                if grad is not None
            }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.compiled.append({"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])})


def run_all(_: int, names: tuple[str, ...], catalog: str, folder: Path, port: int) -> None:
    """Trains a step of all forms, and some of them compiled."""
    torch.set_num_threads(1)
    torch.compiler.set_default_backend("aot_eager")
    place = Place(torch.device("cpu"), LocalRank(0, 1, port))
    for name in names:
        where = ["--data.catalog", catalog, "--watch.knn_dataset", str(folder / "images"), "--run.out", str(folder)]
        config = read_config("debug", [*TINY, *DEEP, *where, "--watch.validation_slides", "0", *FORMS[name]])
        plain, compiled = Looks(), Looks()
        for looks, is_compiled in ((plain, False), (compiled, True)):
            torch._dynamo.reset()
            counters.clear()
            own = replace(config, train=replace(config.train, compile=is_compiled))
            tiles = own.stream(Catalog.load(catalog)).local_batches(0, own.train.steps)
            batches, to_storage = StepBatches(tiles, 0, own), NoNewCheckpoints(own, "")
            signals = Signals(stop=lambda is_compiled=is_compiled: not is_compiled)
            fit(
                own,
                to_storage,
                batches,
                None,
                lambda _: None,
                signals,
                place,
                KnnWatch if is_compiled else None,
                also=[looks],
            )
        torch.save((plain.gradients, compiled.gradients, compiled.compiled), folder / name)


OTHERS = tuple(name for name in FORMS if name not in USUAL)


@pytest.mark.parametrize("names", [USUAL, pytest.param(OTHERS, marks=pytest.mark.long)])
def test_student_and_teacher_have_one_graph_for_all_blocks_and_crops_have_one_with_the_gradients_of_plain_ones(
    names: tuple[str, ...], catalog: str, coloured: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").symlink_to(coloured)
    (port,) = free_ports(1)
    mp.spawn(run_all, (names, catalog, tmp_path, port), nprocs=1)
    for name in names:
        plain, compiled, by_step = torch.load(tmp_path / name)
        graphs = [found["graphs"] for found in by_step]
        # The third is that of the crops, or of blocks for local ones. Nothing is compiled after the first step, and
        # nothing to score kNN after the second one.
        assert graphs == [3] * 3, name
        assert by_step[-1]["breaks"] == {}, name
        assert plain.keys() == compiled.keys()
        assert len(plain) > 12 * 10
        for key, gradient in plain.items():
            torch.testing.assert_close(compiled[key], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_generated_code_trains_as_plain_blocks_do_and_keeps_their_names(
    checkpointing: str, catalog: str, tmp_path: Path
) -> None:
    short = ("--train.steps", "2", "--optim.warmup_steps", "1", "--model.drop_path", "0.4")
    short += ("--train.activation_checkpointing", checkpointing)
    for name in ("false", "true"):
        train(tiny(catalog, tmp_path / name, *short, "--train.compile", name), debug=True)
    plain, compiled = (
        checkpoints.load(checkpoints.checkpoint_uri(str(tmp_path / name), 2))["state_dict"]
        for name in ("false", "true")
    )
    assert plain.keys() == compiled.keys()
    for key, weight in plain.items():
        torch.testing.assert_close(compiled[key], weight, rtol=0, atol=2e-4, msg=key)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@torch._dynamo.config.patch(recompile_limit=2)  # a student's block and a teacher's
def test_runs_of_other_shapes_in_one_process_all_compile(catalog: str, tmp_path: Path) -> None:
    torch.compiler.set_default_backend("eager")
    short = ("--model.backbone", "test_vit", "--train.steps", "1", "--optim.warmup_steps", "0")
    short += ("--train.compile", "true", "--train.few_kernels", "true")
    try:
        ends = [train(tiny(catalog, tmp_path / n, *short, "--train.batch", n), debug=True).steps for n in ("4", "8")]
    finally:
        torch.compiler.set_default_backend(None)
    assert ends == [1, 1]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_generated_code_cuts_the_same_crops_with_fewer_than_250_loops() -> None:
    augment = read_config("vits14", ["--augment.hed_prob", "0.5"]).augment
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tiles = torch.nn.functional.interpolate(noise, size=256, mode="bilinear").mul(255).to(torch.uint8)
    torch._dynamo.reset()
    metrics.reset()
    compiled = torch.compile(augment.crops, fullgraph=True, dynamic=False)
    for index in (torch.arange(2), torch.arange(7, 9)):
        draws = augment.draws(index, 0, 256)
        for found, wanted in zip(compiled(tiles, draws, few_kernels=True), augment.crops(tiles, draws), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert 100 < metrics.generated_kernel_count < 250
