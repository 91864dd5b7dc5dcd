"""What ranks of FSDP send one another in a step, counted in one process that is one of many to torch."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.recipe.module import DinoModule
from trainer.run.config import Config, read_config
from trainer.run.strategy import Shards, prepare, ranks_mesh

SMALL = [
    *("--model.backbone", "test_vit", "--model.drop_path", "0.4", "--augment.global_size", "32"),
    *("--augment.local_size", "16", "--augment.num_local", "2", "--data.tile_size", "64", "--model.patch_size", "16"),
    *("--model.num_prototypes", "256", "--model.head_hidden", "64", "--model.head_bottleneck", "32"),
    *("--loss.regulariser", "none", "--train.strategy", "fsdp", "--train.precision", "bf16-mixed"),
    *("--train.accumulate", "2", "--mask.group_size", "1", "--train.few_kernels", "true"),
]
OPS = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0}


class Sent(TorchDispatchMode):
    """Counts collectives that carry whole parts of a network, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.num: dict[str, int] = defaultdict(int)
        self.nbytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            tensor = args[OPS[name]]
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            # Sinkhorn-Knopp adds up vectors of the prototypes' length and shorter ones, apart from the network.
            if name != "allreduce_" or self.counts_reductions:
                self.num[name] += 1
                self.nbytes[name] += tensor.nbytes
        return func(*args, **(kwargs or {}))

    counts_reductions = False


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def step(config: Config, *, look: bool = True) -> tuple[DinoModule, list[Sent]]:
    """A step of two rounds of one rank; what each of them sent, if one is to look, which nothing compiles beneath."""
    train = config.train
    module = DinoModule(config.recipe, 0, steps=9, batch=train.batch, few_kernels=True, prepare=partial(prepare, train))
    module._device_mesh = ranks_mesh(train, "cpu")
    module.configure_model()
    strategy = Shards(torch.device("cpu"), train)
    strategy._lightning_module = module
    micro, rounds = train.shape.micro, list[Sent]()
    tiles = torch.zeros(micro, 64, 64, 3, dtype=torch.uint8)

    def one(number: int) -> None:
        sent = module.step_input(module.drawn({"tile": tiles, "index": number * micro + torch.arange(micro)}))
        seen = Sent()
        with seen if look else nullcontext():
            loss = module.training_step(sent, number)
            seen.counts_reductions = True
            loss.backward()
        rounds.append(seen)

    with strategy.block_backward_sync():
        one(0)
    one(1)
    return module, rounds


@pytest.mark.filterwarnings("error:FSDP2-wrapped module")
@pytest.mark.parametrize("ranks", [32, 128], indirect=True)
@pytest.mark.parametrize("shard_ranks", [8, None])
def test_a_step_sends_what_first_principles_say(
    ranks: int, shard_ranks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DinoModule, "global_step", 3)
    monkeypatch.setattr(DinoModule, "is_logged", lambda self, step: False)
    given = ["--train.ranks", str(ranks), "--train.batch", str(4 * ranks), "--train.shard_ranks", str(shard_ranks)]
    module, (first, second) = step(read_config("debug", [*SMALL, *(given if shard_ranks else given[:4])]))
    num_parts = 6 + 1 + 1  # blocks, the head, the rest
    parameters = sum(parameter.numel() for parameter in module.teacher.parameters())
    shares = shard_ranks or ranks
    padded = 1 if shard_ranks else 3  # of 64 wide tensors among 128 ranks, half is nothing
    if shard_ranks:
        # A student that stays gathered is gathered once a step, and the teacher in each round.
        assert [first.num["_allgather_base_"], second.num["_allgather_base_"]] == [2 * num_parts, num_parts]
    else:
        # What was resharded is gathered for the backward pass again.
        assert [first.num["_allgather_base_"], second.num["_allgather_base_"]] == [3 * num_parts] * 2
    gathered = first.nbytes["_allgather_base_"] + second.nbytes["_allgather_base_"]
    networks = 3 if shard_ranks else 6
    assert networks * 2 * parameters <= gathered <= padded * 1.05 * networks * 2 * parameters
    # Gradients travel in the last round alone, in float32; between the replicas goes each one's own part.
    assert first.num["_reduce_scatter_base_"] == first.num["allreduce_"] == 0
    assert second.num["_reduce_scatter_base_"] == num_parts
    assert 4 * parameters <= second.nbytes["_reduce_scatter_base_"] <= padded * 1.05 * 4 * parameters
    assert second.num["allreduce_"] == (num_parts if ranks > shares else 0)
    if ranks > shares:
        assert second.nbytes["allreduce_"] == second.nbytes["_reduce_scatter_base_"] / shares


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at all that a tensor has
@pytest.mark.parametrize("ranks", [32], indirect=True)
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_blocks_of_replicas_of_shards_are_compiled_once_for_all_rounds(
    ranks: int, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DinoModule, "global_step", 3)
    monkeypatch.setattr(DinoModule, "is_logged", lambda self, step: False)
    given = ["--train.ranks", str(ranks), "--train.batch", str(4 * ranks), "--train.shard_ranks", "8"]
    given += ["--train.compile", "true", "--train.activation_checkpointing", checkpointing]
    torch._dynamo.reset()
    counters.clear()
    backend = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend("aot_eager")
    try:
        step(read_config("debug", [*SMALL, *given]), look=False)
        assert counters["stats"]["unique_graphs"] == 2, "the student's and the teacher's"
        assert counters["graph_break"] == {}
    finally:
        torch.compiler.set_default_backend(backend)
        torch._dynamo.reset()
