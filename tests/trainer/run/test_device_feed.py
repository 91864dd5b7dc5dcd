from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from trainer.recipe.module import DinoModule
from trainer.recipe.step_input import StepInput
from trainer.run.config import read_config
from trainer.run.device_feed import Batch, DeviceFeed
from trainer.run.fit import make_module

TINY = ["--train.batch", "4", "--data.tile_size", "64", "--augment.num_local", "2", "--model.backbone", "test_vit"]
both_forms = pytest.mark.parametrize("beside", [False, True])


def batches(taken: list[int], num: int) -> Iterator[Batch]:
    for i in range(num):
        taken.append(i)
        yield {"index": torch.arange(4 * i, 4 * i + 4), "tile": torch.full((4, 64, 64, 3), i, dtype=torch.uint8)}


@pytest.fixture(scope="module")
def module() -> DinoModule:
    return make_module(read_config("debug", TINY))


def feed(module: DinoModule, source: Any, *, beside: bool, device: str = "cpu") -> DeviceFeed:
    return DeviceFeed(source, module.drawn, module.step_input, torch.device(device), beside=beside)


def assert_equal_inputs(one: StepInput, two: StepInput) -> None:
    first, second = tree_leaves(one), tree_leaves(two)
    assert len(first) == len(second) > 6
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b.cpu())


@both_forms
def test_inputs_come_once_in_order_and_whole(module: DinoModule, beside: bool) -> None:
    found = list(feed(module, batches([], 5), beside=beside))
    assert len(found) == 5
    for one, batch in zip(found, batches([], 5), strict=True):
        assert_equal_inputs(module.step_input(module.drawn(batch)), one)
    assert list(feed(module, batches([], 0), beside=beside)) == []


@both_forms
def test_the_next_batch_is_on_its_way_while_the_present_one_is_used(module: DinoModule, beside: bool) -> None:
    taken, asked = list[int](), list[float]()
    source = DeviceFeed(
        batches(taken, 4), module.drawn, module.step_input, torch.device("cpu"), asked.append, beside=beside
    )
    inputs = iter(source)
    first, second = next(inputs), next(inputs)
    assert (int(first.sample_index[0]), int(second.sample_index[0])) == (0, 4)
    assert taken[:2] == [0, 1]
    assert len(taken) <= 3 + beside, "and no more than that: its crops, and beside them the next tiles"
    assert len(list(inputs)) == 2
    assert len(asked) == 4


@both_forms
def test_an_error_of_the_source_reaches_the_one_who_waits(module: DinoModule, beside: bool) -> None:
    def breaking() -> Iterator[Batch]:
        yield from batches([], 2)
        raise OSError("the stream broke")

    inputs = iter(feed(module, breaking(), beside=beside))
    with pytest.raises(OSError, match="the stream broke"):
        list(inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_inputs_arrive_whole_on_a_gpu(module: DinoModule) -> None:
    for one, batch in zip(feed(module, batches([], 6), beside=True, device="cuda"), batches([], 6), strict=True):
        assert one.crops.global_.device.type == "cuda"
        assert_equal_inputs(module.step_input(module.drawn(batch)), one)
