"""Two ranks on the CPU (gloo), without Ray: replicas and shards, against each other and against one rank."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from streaming.catalog import Catalog
from tests.processes import free_ports, wait_for
from trainer.evaluate.knn_watch import KnnWatch
from trainer.run import checkpoints
from trainer.run.background_checkpoints import FolderCheckpointIO
from trainer.run.config import Config, read_config
from trainer.run.fit import Place, fit
from trainer.run.replay import LocalRank
from trainer.run.state_files import named_tensors
from trainer.run.step_batches import StepBatches
from trainer.run.stop_signals import Signals

# No drop path and no KoLeo: both look at a rank's own batch, as in the reference.
TINY = [
    *("--train.batch", "8", "--train.log_every", "1", "--optim.warmup_steps", "1", "--data.tile_size", "64"),
    *("--data.mpp", "{1.0: 1}", "--augment.global_size", "32", "--augment.local_size", "16"),
    *("--augment.num_local", "2", "--model.num_prototypes", "32", "--model.head_hidden", "16"),
    *("--model.head_bottleneck", "8", "--model.separate_heads", "true", "--mask.group_size", "2"),
    *("--model.drop_path", "0", "--loss.koleo_weight", "0", "--train.checkpoint_every", "2"),
    *("--model.backbone", "test_vit"),  # timm's own, of 6 narrow blocks
    *("--watch.knn_every", "2", "--watch.knn_k", "3", "--watch.validation_slides", "0.34"),
    *("--watch.validation_every", "2", "--watch.validation_tiles", "16"),
]
Run = tuple[str, tuple[str, ...]]
DDP, FSDP, RANKS = ("--train.strategy", "ddp"), ("--train.strategy", "fsdp"), ("--train.ranks", "2")
TWO, FOUR = ("--train.steps", "2"), ("--train.steps", "4")
FEW = ("--train.few_kernels", "true")  # as a GPU has it
# Schedules end with the run, so all runs that are compared plan four steps; those that stop at two are told to.
RUNS: list[Run] = [
    ("ddp", (*RANKS, *DDP)),
    ("fsdp", (*RANKS, *FSDP)),
    ("fsdp_accumulated", (*RANKS, *FSDP, "--train.accumulate", "2")),
    ("fsdp_gathered", (*RANKS, *FSDP, "--train.shard_ranks", "2")),
    ("fsdp_gathered_accumulated", (*RANKS, *FSDP, "--train.shard_ranks", "2", "--train.accumulate", "2")),
    ("ddp_accumulated", (*RANKS, *DDP, "--train.accumulate", "2")),
    ("fsdp_checkpointing", (*RANKS, *FSDP, "--train.activation_checkpointing", "true")),
    ("fsdp_bf16", (*RANKS, *FSDP, "--train.precision", "bf16-mixed")),
    ("ddp_bf16", (*RANKS, *DDP, "--train.precision", "bf16-mixed")),
    ("ddp_few_kernels", (*RANKS, *DDP, *FEW)),
    ("fsdp_few_kernels", (*RANKS, *FSDP, *FEW)),
    ("one_then_fsdp", (*RANKS, *FSDP)),
    ("one_then_ddp", (*RANKS, *DDP)),
    ("one_then_replicas", (*RANKS, *FSDP, "--train.shard_ranks", "1")),
    ("fsdp_again", (*RANKS, *FSDP)),
    ("ddp_again", (*RANKS, *DDP)),
]


def configuration(catalog: str, folder: Path, name: str, overrides: tuple[str, ...]) -> Config:
    where = ["--data.catalog", catalog, "--run.out", str(folder / name), "--watch.knn_dataset", str(folder / "images")]
    return read_config("debug", [*TINY, *FOUR, *where, *overrides])


def run_rank(rank: int, catalog: str, folder: Path, port: int, runs: list[Run]) -> None:
    torch.set_num_threads(1)
    for name, overrides in runs:
        config = configuration(catalog, folder, name, overrides)
        if name.endswith("_again"):
            if rank == 0:
                copy(folder, name.removesuffix("_again"), f"{name}.partly")
                (folder / f"{name}.partly").rename(folder / name)
            wait_for(lambda out=config.run.out: checkpoints.latest(out))
        place = Place(torch.device("cpu"), LocalRank(rank, config.train.ranks, port))
        run(config, rank, place)


def run(config: Config, rank: int, place: Place | None, stop: Callable[[], bool] = lambda: False) -> None:
    catalog = Catalog.load(config.data.catalog or "")
    resume = checkpoints.latest(config.run.out)
    start = checkpoints.read_meta(resume).step if resume else 0
    stream = config.stream(catalog)
    batches = StepBatches(stream.local_batches(start, config.train.steps, rank), start, config)

    def report(row: dict[str, float]) -> None:
        with open(f"{config.run.out}.jsonl", "a") as rows:
            rows.write(json.dumps(row) + "\n")

    to_storage = FolderCheckpointIO(config, catalog.fingerprint)
    fit(config, to_storage, batches, resume, report, Signals(stop=stop), place, KnnWatch)


@pytest.fixture(scope="module")
def trained(catalog: str, coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all runs, trained to step 4, and `one` and `..._then_one` on a single rank."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "images").symlink_to(coloured)
    run(configuration(catalog, folder, "one", ()), 0, None)
    for name in ("one_then_fsdp", "one_then_ddp", "one_then_replicas"):
        copy(folder, "one", name)
    make_first_version(checkpoints.checkpoint_uri(str(folder / "one_then_fsdp"), 2))
    (port,) = free_ports(1)
    mp.spawn(run_rank, (catalog, folder, port, RUNS), nprocs=2)
    copy(folder, "fsdp", "fsdp_then_one")
    run(configuration(catalog, folder, "fsdp_then_one", ()), 0, None)
    return folder


def copy(folder: Path, source: str, target: str) -> None:
    """Gives a run the second step of another."""
    two = Path(checkpoints.checkpoint_uri(str(folder / target), 2))
    two.parent.mkdir(parents=True)
    for file in Path(checkpoints.checkpoint_uri(str(folder / source), 2)).iterdir():
        two.mkdir(exist_ok=True)
        os.link(file, two / file.name)


def make_first_version(uri: str) -> None:
    """Makes of a checkpoint what this project wrote before: one file with all tensors."""
    state, meta = checkpoints.load(uri), json.loads(Path(uri, checkpoints.META).read_text())
    for file in Path(uri).iterdir():
        if file.name != checkpoints.CONFIG:
            file.unlink()
    torch.save(state, Path(uri, checkpoints.STATE))
    content = Path(uri, checkpoints.STATE).read_bytes()
    meta |= {"version": 1, "nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    Path(uri, checkpoints.META).write_text(json.dumps(meta))
    checkpoints.verify(uri)


def end(folder: Path, name: str) -> dict[str, Any]:
    return checkpoints.load(checkpoints.checkpoint_uri(str(folder / name), 4))


def assert_close(folder: Path, one: str, two: str, tolerance: float) -> None:
    first, second = end(folder, one), end(folder, two)
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for key, weight in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][key], weight, rtol=0, atol=tolerance, msg=key)
    states = [state["optimizer_states"][0]["state"] for state in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        assert state["step"].item() == states[1][name]["step"].item() == 4


pytestmark = pytest.mark.slow
# AdamW's first steps are of the learning rate's size whatever the gradient: one that is nearly 0 may differ in sign.
LOOSE = 2e-4


@pytest.mark.parametrize(
    "name",
    [
        *(
            "ddp",
            "fsdp",
            "fsdp_gathered",
            "ddp_few_kernels",
            "fsdp_few_kernels",
            "fsdp_checkpointing",
        ),
        *("one_then_fsdp", "one_then_ddp", "one_then_replicas", "fsdp_then_one"),
    ],
)
def test_ranks_shards_forms_and_changes_of_them_train_as_one_rank_does(trained: Path, name: str) -> None:
    assert_close(trained, "one", name, LOOSE)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_ranks_that_go_on_from_a_checkpoint_train_to_the_bit_what_they_would_have(trained: Path, name: str) -> None:
    undisturbed, resumed = (named_tensors(end(trained, run)) for run in (name, f"{name}_again"))
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in undisturbed.items())


def test_each_rank_saves_its_shards_and_of_replicas_one_saves(trained: Path) -> None:
    def files(name: str) -> list[str]:
        return sorted(file.name for file in Path(checkpoints.checkpoint_uri(str(trained / name), 4)).glob("*.bin"))

    assert files("fsdp") == ["state-00000.bin", "state-00001.bin"]
    assert files("ddp") == files("one_then_replicas") == files("one") == ["state-00000.bin"]


def test_accumulation_counts_optimiser_steps_and_shards_accumulate_as_replicas_do(trained: Path) -> None:
    assert_close(trained, "ddp_accumulated", "fsdp_accumulated", LOOSE)
    assert_close(trained, "ddp_accumulated", "fsdp_gathered_accumulated", LOOSE)
    groups = [end(trained, name)["optimizer_states"][0]["param_groups"] for name in ("one", "fsdp_accumulated")]
    rates = [[(group["name"], group["lr"], group["weight_decay"]) for group in part] for part in groups]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("name", ["ddp_bf16", "fsdp_bf16"])
def test_bfloat16_keeps_float32_weights_and_trains_near_float32(trained: Path, name: str) -> None:
    weights = end(trained, name)["state_dict"]
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    reference = end(trained, "one")["state_dict"]
    key = "student.backbone.vit.blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[key], reference[key])
    moved = (reference[key] - end(trained, "one")["state_dict"][key.replace("student", "teacher")]).norm()
    assert (weights[key] - reference[key]).norm() < 0.5 * moved


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_bf16"])
def test_ranks_that_embed_a_share_each_see_the_accuracy_that_one_rank_sees(trained: Path, name: str) -> None:
    def accuracies(run: str) -> dict[int, float]:
        rows = [json.loads(line) for line in (trained / f"{run}.jsonl").read_text().splitlines()]
        return {row["step"]: row["knn_accuracy"] for row in rows if "knn_accuracy" in row}

    # Two colours are told apart by any network, if each embedding stands beside its own label.
    assert accuracies(name) == accuracies("one") == {2: 1.0, 4: 1.0}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_ranks_that_look_at_a_share_each_see_the_loss_on_patients_held_out_that_one_rank_sees(
    trained: Path, name: str
) -> None:
    def losses(run: str) -> dict[int, float]:
        rows = [json.loads(line) for line in (trained / f"{run}.jsonl").read_text().splitlines()]
        return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}

    assert losses("one").keys() == {2, 4}
    assert losses(name) == pytest.approx(losses("one"), rel=1e-4)
