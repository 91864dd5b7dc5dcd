"""Where a rank trains."""

import pytest
import torch

from trainer.run.execution import TrainConfig
from trainer.run.fit import own_device


def test_a_process_that_trains_alone_names_its_gpu_by_number() -> None:
    device = own_device(TrainConfig(gpu=True))
    # What `torch.cuda.set_device`, which Lightning calls, makes of it; without a number it raises.
    assert torch.cuda._utils._get_device_index(device) == 0
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda._utils._get_device_index(torch.device("cuda"))
    assert own_device(TrainConfig()).type == "cpu"
