"""Every value of every option of a training that has a list of values: each trains, or is refused before it begins."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from streaming.errors import ConfigError
from tests.trainer.run.test_train import SMALL
from trainer.run import checkpoints
from trainer.run.config import leaves, read_config
from trainer.run.train import train

REFUSED = {("train.precision", "bf16-true"): "weights and teacher would hardly move; take bf16-mixed"}
for package in ("wandb", "mlflow"):
    if find_spec(package) is None:
        REFUSED["run.loggers", f"[{package}]"] = f"{package}, which is not installed; pip install {package}"


def listed(kind: Any) -> Iterator[str]:
    """The values of a type, and of those that it is made of."""
    for part in get_args(kind):
        yield from [str(part)] if get_origin(kind) is Literal else listed(part)


def offered() -> Iterator[tuple[str, str]]:
    for leaf in leaves():
        in_brackets = get_origin(leaf.kind) is tuple
        yield from ((leaf.key, f"[{value}]" if in_brackets else value) for value in listed(leaf.kind))


def test_the_options_that_have_a_list_of_values_are_found() -> None:
    names = {name for name, _ in offered()}
    assert names >= {"train.precision", "train.strategy", "run.loggers", "model.ffn", "data.corners", "loss.patch"}


@pytest.mark.long
@pytest.mark.parametrize(("name", "value"), list(offered()))
def test_each_value_trains_or_is_refused_at_once(name: str, value: str, catalog: str, tmp_path: Path) -> None:
    options = [f"--{name}", value, "--data.catalog", catalog, "--run.out", str(tmp_path), "--train.steps", "1"]
    config = read_config("debug", [*SMALL, "--optim.warmup_steps", "1", *options])
    if told := REFUSED.get((name, value)):
        with pytest.raises(ConfigError, match=told):
            train(config, debug=True)
        assert not checkpoints.steps_of(str(tmp_path))
        return
    assert train(config, debug=True).start == 0
    assert checkpoints.steps_of(str(tmp_path)) == [1]
    weights = checkpoints.load(checkpoints.checkpoint_uri(str(tmp_path), 1))["state_dict"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())
