import math

import pytest
import torch

from trainer.recipe.diagnostics import prototype_use, rankme, teacher_metrics
from trainer.run.guard import Guard, WatchConfig


def test_the_effective_rank_of_parallel_rows_is_one_and_of_orthogonal_ones_their_number() -> None:
    assert rankme(torch.ones(8, 5)).item() == pytest.approx(1, abs=1e-3)
    assert rankme(torch.eye(6)).item() == pytest.approx(6, rel=1e-5)


def test_the_effective_rank_follows_its_formula() -> None:
    values = torch.tensor([4.0, 2.0, 1.0])
    shares = values / values.sum()
    wanted = math.exp(-sum(p * math.log(p) for p in shares.tolist()))
    assert rankme(torch.diag(values)).item() == pytest.approx(wanted, rel=1e-5)


def test_prototype_use_counts_those_that_some_row_takes_and_how_evenly() -> None:
    rows = torch.eye(4)[[0, 0, 1, 1]]
    use = prototype_use(rows)
    assert use["prototypes_used"].item() == 0.5
    assert use["prototype_perplexity"].item() == pytest.approx(0.5)
    assert prototype_use(torch.full((3, 4), 0.25))["prototype_perplexity"].item() == pytest.approx(1)


def test_the_teacher_s_metrics_are_finite_for_a_single_row() -> None:
    metrics = teacher_metrics(torch.eye(4)[:1], torch.ones(1, 3))
    assert all(math.isfinite(value) for value in metrics.values())


WELL = {"rankme": 5.0, "teacher_entropy": 2.0}


def rows(values: list[float], first: int = 1) -> list[dict[str, float]]:
    return [{"step": step, **WELL, "rankme": value} for step, value in enumerate(values, first)]


def test_a_collapse_counts_after_the_grace_and_only_when_it_lasts() -> None:
    guard = Guard(WatchConfig(min_rankme=1.5, grace_steps=2, patience=3), 64)
    told = [guard.trouble(row) for row in rows([1, 1, 1, 1, 9, 1, 1, 1])]
    assert told[:7] == [None] * 7
    assert told[7] is not None
    assert "rankme 1, not above 1.5" in told[7]
    assert guard.well_until == 5


def test_an_infinite_value_counts_at_once() -> None:
    guard = Guard(WatchConfig(grace_steps=100), 64)
    assert guard.trouble({"step": 1, **WELL, "loss": 3.0}) is None
    assert guard.trouble({"step": 2, **WELL, "loss": math.nan, "koleo": math.inf}) == "loss, koleo not finite"


def test_floors_can_be_switched_off() -> None:
    config = WatchConfig(min_rankme=None, min_teacher_entropy=None, min_prototypes=None, grace_steps=0, patience=1)
    row = {"step": 1, "rankme": 1.0, "teacher_entropy": 0.0, "prototype_perplexity": 1 / 64}
    assert Guard(config, 64).trouble(row) is None


def test_targets_all_on_one_prototype_count_as_collapsed() -> None:
    use = [prototype_use(torch.eye(64)[chosen]) for chosen in ([5] * 4 + [7] * 4, [5] * 8)]
    rows = [{"step": 1, **WELL, "prototype_perplexity": one["prototype_perplexity"].item()} for one in use]
    guard = Guard(WatchConfig(grace_steps=0, patience=1), 64)
    assert guard.trouble(rows[0]) is None  # two of 64 are few, and no collapse yet
    assert "prototype_perplexity 0.0156, not above 0.0234" in (guard.trouble(rows[1]) or "")


def test_the_effective_rank_of_what_is_not_finite_is_not_a_number() -> None:
    assert math.isnan(rankme(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))
