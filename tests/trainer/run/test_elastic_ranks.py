"""How many ranks a run may go on with, how often it is started again, and how long ranks wait for one another."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import ReschedulingState, SchedulingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from streaming.errors import StreamError
from tests.processes import free_ports
from trainer.run import checkpoints
from trainer.run.agreement import limit_waits
from trainer.run.config import read_config
from trainer.run.execution import TrainConfig
from trainer.run.restarts import ElasticRanks, Restarts, StartedAgain

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 32))
def test_fewer_ranks_take_the_same_batch_in_whole_groups_and_the_fewest_rounds_that_memory_allows(
    least: int, more: int, accumulate: int, group: int, groups: int
) -> None:
    most = least + more
    train = TrainConfig(ranks=(least, most), accumulate=accumulate, batch=most * accumulate * group * groups)
    most_tiles = train.shape.micro
    for ranks in range(least, most + 1):
        fits = [
            rounds
            for rounds in range(1, train.batch + 1)
            if train.batch % (ranks * rounds * group) == 0 and train.batch // (ranks * rounds) <= most_tiles
        ]
        assert train.rounds_on(ranks, group) == min(fits, default=None)
    assert train.rounds_on(most, group) == accumulate


def test_rounds_stay_where_a_rank_has_memory_for_more_tiles() -> None:
    options = ["--train.batch", "64", "--train.ranks", "[4,8]", "--mask.group_size", "4"]
    halved, whole = (read_config("debug", [*options, *more]) for more in ([], ["--train.max_micro_batch", "16"]))
    assert halved.possible_ranks == whole.possible_ranks == (4, 8)
    found = [(c.train.ranks, c.train.shape.micro, c.train.accumulate) for c in (halved.on(4), whole.on(4), whole.on(8))]
    assert found == [(4, 8, 2), (4, 16, 1), (8, 8, 1)]


def test_a_number_of_ranks_stays_what_it_was() -> None:
    config = read_config("debug", ["--train.ranks", "4", "--mask.group_size", "3"])
    assert config.on(4) == config
    assert config.possible_ranks == (4,)


def elastic(possible: tuple[int, ...], **needs: float) -> ElasticRanks:
    scaling = ScalingConfig(num_workers=(possible[0], possible[-1]), resources_per_worker=needs)
    nobody: Any = None
    return ElasticRanks(scaling, possible, nobody)


def test_as_many_ranks_are_started_as_find_room_and_divide_the_batch() -> None:
    policy = elastic((2, 4, 8), accelerator=1)
    room = [
        policy._count_possible_workers({"a": {"accelerator": number}, "b": {"accelerator": 1}}) for number in range(9)
    ]
    assert room == [0, 2, 2, 4, 4, 4, 4, 8, 8]


def test_ranks_that_found_no_room_where_it_was_counted_are_tried_as_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, nodes = elastic((2, 4, 8), accelerator=1), {"a": {"accelerator": 8}}
    scheduling: Any = SchedulingState(NoopDecision())

    def fail(ranks: int) -> None:
        error = ControllerError(WorkerGroupStartupTimeoutError(ranks))
        policy.after_controller_state_update(scheduling, ReschedulingState(error))

    found = [policy._count_possible_workers(nodes)]
    for _ in range(3):
        fail(found[-1])
        found.append(policy._count_possible_workers(nodes))
    assert found == [8, 4, 2, 2]
    assert policy._count_possible_workers({"a": {"accelerator": 4}, "b": {"accelerator": 4}}) == 8, "a node has joined"
    now = time.monotonic()
    monkeypatch.setattr("trainer.run.restarts.time", SimpleNamespace(monotonic=lambda: now + 3600))
    assert policy._count_possible_workers(nodes) == 8, "others may hold it no longer"


def test_restarts_are_counted_from_the_last_new_checkpoint_and_not_for_more_ranks_or_bad_input(tmp_path: Path) -> None:
    policy = Restarts(FailureConfig(max_failures=2), str(tmp_path), {})

    def decide(error: Exception) -> FailureDecision:
        return policy.make_decision(WorkerGroupError("ranks failed", {1: error}))

    def save(step: int) -> None:
        folder = Path(checkpoints.checkpoint_uri(str(tmp_path), step))
        folder.mkdir(parents=True)
        (folder / checkpoints.META).touch()

    lost = RuntimeError("connection reset by peer")
    assert [decide(lost), decide(lost)] == [RETRY, RETRY]
    save(10)
    assert [decide(lost), decide(StartedAgain("more")), decide(lost)] == [RETRY] * 3
    save(20)
    assert [decide(lost), decide(lost), decide(lost)] == [RETRY, RETRY, RAISE]
    save(30)
    assert decide(StreamError("too many tiles fail")) == RAISE


def wait_for_nobody(rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    other = dist.new_group(backend="gloo")
    limit_waits(1.0)
    for number, group in enumerate((None, other)):
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"(?i)timed out"):
                dist.all_reduce(torch.ones(1), group=group)
            (folder / str(number)).touch()
    while not (folder / "1").exists():  # who leaves would be noticed at once
        time.sleep(0.1)


@pytest.mark.slow
def test_a_rank_that_waits_too_long_for_another_one_fails_in_any_group(tmp_path: Path) -> None:
    mp.spawn(wait_for_nobody, (free_ports(1)[0], tmp_path), nprocs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
