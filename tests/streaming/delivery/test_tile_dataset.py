"""The stream as PyTorch's dataset: the stream's batches, at any step, and one Ray for the ranks of a machine."""

import itertools
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from streaming import Catalog, TilePlan, cluster, torch_dataset
from streaming.delivery.stream import BatchShape, TileStream
from streaming.delivery.tile_dataset import TileDataset
from streaming.errors import ConfigError
from tests.e2e.told_tiles import digest
from tests.pages import ROOT
from tests.processes import free_ports, wait_for

BATCH = 8


def dataset(catalog: str, *, seed: int = 0, batch: int = BATCH, **options: object) -> TileDataset:
    loaded = Catalog.load(catalog)
    return torch_dataset(loaded, TilePlan(loaded, seed, mpp={0.5: 1}, size=32), batch=batch, **options)


def wanted(catalog: str, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Whole steps, read without Ray."""
    loaded = Catalog.load(catalog)
    stream = TileStream(loaded, TilePlan(loaded, mpp={0.5: 1}, size=32), BatchShape(BATCH))
    return (batch["tile"] for batch in stream.local_batches(start, stop))


def test_senseless_ranks_steps_and_states_are_refused(catalog: str) -> None:
    for options, told in (
        ({"rank": 0}, "ranks None; give both"),
        ({"rank": 2, "ranks": 2}, "rank 2 of 2"),
        ({"rank": 0, "ranks": 3}, "take 6 or 9"),
        ({"start": 3, "stop": 3}, "steps 3:3"),
        ({"stop": 0}, "steps 0:0"),
        ({"readers": (2, 1)}, "readers"),
    ):
        with pytest.raises(ConfigError, match=told):
            dataset(catalog, **options)
    state = dataset(catalog, start=5).state_dict()
    for other in (dataset(catalog, batch=2 * BATCH), dataset(catalog, seed=1)):
        with pytest.raises(ConfigError, match=r"a state of step 5 with .* its steps are other tiles"):
            other.load_state_dict(state)


def test_the_place_among_ranks_is_what_torchrun_tells(catalog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="rank 5 of 3"):
        dataset(catalog)


def test_a_worker_of_a_loader_is_refused_with_the_remedy(catalog: str) -> None:
    with pytest.raises(ConfigError, match=r"num_workers=0 and batch_size=None.*readers="):
        next(iter(DataLoader(dataset(catalog), batch_size=None, num_workers=1)))


@pytest.mark.slow
def test_ranks_get_the_stream_s_batches_and_go_on_at_any_step_with_other_ranks(catalog: str) -> None:
    cluster.connect(8)
    loaders = [DataLoader(dataset(catalog, rank=rank, ranks=2, stop=5), batch_size=None) for rank in range(2)]
    steps = [torch.cat(parts) for parts in itertools.islice(zip(*loaders, strict=True), 3)]
    assert all(map(torch.equal, steps, wanted(catalog, 0, 3)))
    # The iterators were left: these go on. What they give may be written to.
    steps += [torch.cat([part.add_(0) for part in parts]) for parts in zip(*loaders, strict=True)]
    assert len(steps) == 5
    assert all(map(torch.equal, steps[3:], wanted(catalog, 3, 5)))

    assert list(loaders[0]) == [], "the last step was given"

    states = [loader.dataset.state_dict() for loader in loaders]
    assert states[0] == states[1]
    assert states[0]["step"] == 5
    alone = dataset(catalog, rank=0, ranks=1)
    alone.load_state_dict({**states[0], "step": 4})
    assert all(map(torch.equal, itertools.islice(alone, 3), wanted(catalog, 4, 7)))
    assert alone.state_dict()["step"] == 7
    assert alone.budget.tiles == 3 * BATCH


_RANK = """
import signal, sys, time
import ray
from streaming.delivery import node_ray
node_ray.join(2)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def short_path() -> Iterator[str]:
    """A folder whose name leaves room for those of Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.long
def test_ranks_of_a_machine_share_a_ray_that_ends_with_the_last_one_however_it_ends(short_path: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_ports(1)[0]), "TMPDIR": short_path}
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK], env=env, stdin=pipe, stdout=pipe, text=True) for _ in range(3)
    ]
    first, *others = [rank.stdout.readline().strip() for rank in ranks]
    assert first
    assert others == [first, first]
    keeper = next(p for p in psutil.process_iter(["cmdline"]) if short_path in " ".join(p.info["cmdline"] or ()))
    running = [keeper, *keeper.children(recursive=True)]
    assert len(running) > 3
    keeper.send_signal(signal.SIGTERM)  # as SLURM does
    ranks[0].communicate("")  # the one that may have started it
    ranks[1].kill()
    assert ranks[2].poll() is None
    assert keeper.is_running()
    ranks[2].kill()
    wait_for(
        lambda: not any(process.is_running() and process.status() != "zombie" for process in running), timeout_s=120
    )
    for rank in ranks:
        rank.communicate()


@pytest.mark.long
@pytest.mark.parametrize("whose", ["lightly", "dinov2"])
def test_the_published_loops_of_others_train_on_the_stream_s_tiles(catalog: str, whose: str) -> None:
    needed = {"lightly": ("lightly",), "dinov2": ("fvcore", "iopath", "omegaconf")}[whose]
    if absent := [name for name in needed if not find_spec(name)]:
        pytest.skip(f"{', '.join(absent)} is not installed: no dependency of ours")
    clone = os.environ.get("TILESTREAM_DINOV2")
    if whose == "dinov2" and not clone:
        pytest.skip("TILESTREAM_DINOV2 names no clone of the reference DINOv2")
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / f"tests/e2e/{whose}_loop.py"), *([str(clone)] if whose == "dinov2" else []), catalog]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    got = {(int(step), int(rank)): mark for what, step, rank, mark in (line for line in told if line[0] == "tiles")}
    loaded = Catalog.load(catalog)
    stream = TileStream(loaded, TilePlan(loaded, mpp={0.5: 1}), BatchShape(BATCH, 2))
    assert got == {
        (step, rank): digest(batch["tile"])
        for rank in range(2)
        for step, batch in enumerate(stream.local_batches(0, 3, rank), start=1)
    }
    losses = [float(line[2]) for line in told if line[0] == "loss"]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
