"""The memory of ranks' hosts while a run begins, by real processes (gloo), against the file it begins with."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.processes import free_ports
from trainer.recipe.network import build_backbone
from trainer.run import checkpoints
from trainer.run.config import Config, read_config
from trainer.run.first_weights import fill
from trainer.run.fit import bare_module, make_module
from trainer.run.strategy import ranks_mesh

RANKS = 3
Case = tuple[Path, str]
# 154 MB of backbone and small heads: what they take beside it is to count for little, as with large models.
MEDIUM = [
    *("--model.backbone", "vit_medium_patch16_clip_224", "--augment.global_size", "64", "--augment.local_size", "32"),
    *("--model.num_prototypes", "128", "--model.head_hidden", "64", "--train.batch", "12", "--mask.group_size", "2"),
    *("--train.ranks", str(RANKS)),
]


def configuration(init: Path | None, strategy: str) -> Config:
    given = ["--model.init", str(init)] if init else []
    return read_config("debug", [*MEDIUM, "--train.strategy", strategy, *given])


def begin(rank: int, port: int, folder: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=RANKS)
    dist.all_reduce(torch.zeros(2**20))  # what the group keeps for itself
    for name, (init, strategy) in enumerate(cases):
        config = configuration(init, strategy)
        module = bare_module(
            config, fill=lambda module, c=config, n=name: measured(folder / f"{n}-{rank}.txt", c, module)
        )
        module._device_mesh = ranks_mesh(config.train, "cpu") if strategy == "fsdp" else None
        module.configure_model()
        whole = {name: full(weight) for name, weight in module.state_dict().items()}
        if rank == RANKS - 1:
            torch.save(whole, folder / f"{name}.pt")
    dist.destroy_process_group()


def full(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def measured(told_in: Path, config: Config, module: torch.nn.Module) -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the case before has left
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = told("VmRSS")
    fill(config, torch.device("cpu"), module)
    held = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in module.state_dict().values()]
    told_in.write_text(str(told("VmHWM") - before - sum(weight.nbytes for weight in held)))


def told(name: str) -> int:
    """A line of the kernel's on this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A published backbone in two layouts, and a run of ours whose moments are half of its checkpoint."""
    folder, config = tmp_path_factory.mktemp("sources"), configuration(None, "ddp")
    vit = build_backbone(config.model, 64).vit
    save_file(vit.state_dict(), folder / "vit.safetensors")
    torch.save({"model": vit.state_dict()}, folder / "vit.pth")
    module = make_module(config)
    with torch.no_grad():
        module.teacher.backbone.mask_token.fill_(3.0)
    weights = module.state_dict()
    moments = {
        name: {"exp_avg": weight, "exp_avg_sq": weight + 0} for name, weight in module.student.named_parameters()
    }
    moments = {name: {key: one.detach() + 0 for key, one in both.items()} for name, both in moments.items()}
    state = {"global_step": 3, "state_dict": weights, "optimizer_states": [{"state": moments}]}
    run = folder / "run"
    checkpoints.write(checkpoints.checkpoint_uri(str(run), 3), state, config, "c0ffee")
    return {"run": run, **{suffix: folder / f"vit.{suffix}" for suffix in ("safetensors", "pth")}}


@pytest.mark.slow
def test_one_rank_reads_what_a_run_begins_with_and_no_other_host_holds_the_whole(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    cases = [(sources["safetensors"], "fsdp"), (sources["pth"], "ddp"), (sources["run"], "fsdp")]
    mp.spawn(begin, (port, tmp_path, cases), nprocs=RANKS)
    for name, (source, strategy) in enumerate(cases):
        nbytes = sum(file.stat().st_size for file in [source, *source.rglob("*")] if file.is_file())
        reader, *others = (int((tmp_path / f"{name}-{rank}.txt").read_text()) / nbytes for rank in range(RANKS))
        assert reader < 1.2
        assert max(others) < 0.2
        alone, found = make_module(configuration(source, strategy)).state_dict(), torch.load(tmp_path / f"{name}.pt")
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], weight) for name, weight in alone.items())
