from collections.abc import Iterator

import pytest
import torch

from trainer.run.device_feed import Batch, DeviceFeed


def batches(taken: list[int], num: int) -> Iterator[Batch]:
    for i in range(num):
        taken.append(i)
        yield {"index": torch.tensor([i]), "tile": torch.full((2,), i, dtype=torch.uint8)}


def test_batches_come_once_and_in_order() -> None:
    feed = DeviceFeed(batches([], 5), torch.device("cpu"))
    assert [(int(batch["index"]), batch["tile"].tolist()) for batch in feed] == [(i, [i, i]) for i in range(5)]
    assert list(DeviceFeed(batches([], 0), torch.device("cpu"))) == []


def test_the_next_batch_is_on_its_way_while_the_present_one_is_used() -> None:
    taken: list[int] = []
    feed = iter(DeviceFeed(batches(taken, 3), torch.device("cpu")))
    assert int(next(feed)["index"]) == 0
    assert taken == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_arrive_whole_on_a_gpu() -> None:
    source = [{"tile": torch.randint(0, 255, (8, 256, 256, 3), dtype=torch.uint8)} for _ in range(6)]
    for sent, got in zip(source, DeviceFeed(source, torch.device("cuda")), strict=True):
        assert got["tile"].device.type == "cuda"
        assert torch.equal(got["tile"].cpu(), sent["tile"])
