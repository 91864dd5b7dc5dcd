"""Every value of every option of a training that has a list of values: each trains, or is refused before it begins."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch

from streaming.errors import ConfigError
from tests.trainer.run.test_train import SMALL
from trainer.run import checkpoints
from trainer.run.config import Config, read_config
from trainer.run.train import train

REFUSED = {("train.precision", "bf16-true"): "weights and teacher would hardly move; take bf16-mixed"}


def offered(section: type[Any] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    kinds = get_type_hints(section)
    for field in fields(section):
        kind = kinds[field.name]
        if is_dataclass(kind):
            yield from offered(kind, f"{prefix}{field.name}.")
            continue
        inside = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        for one in inside:
            if get_origin(one) is Literal:
                yield from ((prefix + field.name, str(value)) for value in get_args(one))


def test_the_options_that_have_a_list_of_values_are_found() -> None:
    names = {name for name, _ in offered()}
    assert {"train.precision", "train.strategy"} <= names
    assert len(names) >= 6, names


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
