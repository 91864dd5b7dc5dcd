"""The memory of a step, on tensors that have none, against what `--dry-run` and the losses say of it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.trainer.fake_step import fake_step
from tests.trainer.live_memory import LiveMemory
from trainer.recipe.losses import LOSS_NBYTES, sinkhorn, soft_cross_entropy
from trainer.run.config import read_config
from trainer.run.dry_run import memory, model_size

ROWS, PROTOTYPES = 3400, 131072
SIZE = ROWS * PROTOTYPES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sinkhorn_makes_its_targets_and_no_other_tensor_of_their_size(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        logits = torch.empty(ROWS, PROTOTYPES, dtype=dtype)
        with LiveMemory() as seen:
            targets = sinkhorn(logits, 0.05)
    assert targets.dtype == torch.float32
    assert seen.peak < 4 * SIZE * 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_entropy_keeps_its_input_and_makes_its_gradient_and_little_else(dtype: torch.dtype) -> None:
    with FakeTensorMode(), LiveMemory() as seen:
        logits = torch.empty(ROWS, PROTOTYPES, dtype=dtype, requires_grad=True)
        targets = torch.empty(ROWS, PROTOTYPES)
        given = seen.nbytes
        loss = soft_cross_entropy(logits, targets, 0.1).mean()
        assert seen.nbytes - given < SIZE / 100
        loss.backward()
    assert given == (dtype.itemsize + 4) * SIZE
    assert dtype.itemsize * SIZE < seen.peak - given < dtype.itemsize * SIZE + 2 * LOSS_NBYTES + SIZE / 100


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("drop_path", ["0", "0.4"])
def test_the_estimate_of_activations_is_what_a_step_has_alive_at_most(precision: str, drop_path: str) -> None:
    given = ["--train.batch", "64", "--train.gpu", "false", "--train.precision", precision]
    config = read_config("vits14", [*given, "--model.drop_path", drop_path])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true")
    with fake_step("cpu", config) as (module, sent), LiveMemory() as seen, autocast:
        module.training_step(module.step_input(sent), 0).backward()
    estimate = memory(config, model_size(config))
    wanted = sum(estimate[name][0] for name in ("activations of blocks", "activations of heads"))
    assert wanted == pytest.approx(seen.peak, rel=0.15)
