"""Compiled blocks; `-m long`, because a compiler runs."""

from pathlib import Path

import pytest
import torch

from tests.trainer.run.test_resume import tiny
from trainer.run import checkpoints
from trainer.run.train import train

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_train_as_plain_ones_do_and_keep_their_names(catalog: str, tmp_path: Path) -> None:
    short = ("--train.steps", "2", "--optim.warmup_steps", "1", "--model.drop_path", "0")
    for name in ("false", "true"):
        train(tiny(catalog, tmp_path / name, *short, "--train.compile", name), debug=True)
    plain, compiled = (
        checkpoints.load(checkpoints.checkpoint_uri(str(tmp_path / name), 2))["state_dict"]
        for name in ("false", "true")
    )
    assert plain.keys() == compiled.keys()
    for key, weight in plain.items():
        torch.testing.assert_close(compiled[key], weight, rtol=0, atol=2e-4, msg=key)
