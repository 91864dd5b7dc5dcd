"""The proof that a killed run trains the same: what counts as the same, and the whole of it in small."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.determinism import MOST, Comparison, Finding, compare, different_tensors, main


def rows(**changed: float) -> list[dict[str, float]]:
    """The metrics of three steps; what is changed is so in the second one."""
    losses = np.float32([9.3, 8.7, 8.1]).tolist()
    made = [
        {
            "step": k,
            "first_index": 8 * k - 8,
            "next_index": 8 * k,
            "loss": loss,
            "ibot": loss / 2,
            "lr": k / 10,
            "time": k,
        }
        for k, loss in enumerate(losses, start=1)
    ]
    made[1] |= changed
    return made


def test_runs_that_differ_in_speed_alone_are_the_same_to_the_bit() -> None:
    assert compare(rows(), rows(time=7.0, tiles_per_s=3.0)) == Comparison(True, (), (0.0, 0.0, 0.0))


@pytest.mark.parametrize("name", ["loss", "ibot"])
def test_a_last_bit_of_a_term_is_a_difference(name: str) -> None:
    value = rows()[1][name]
    found = compare(rows(), rows(**{name: float(np.nextafter(np.float32(value), np.float32(np.inf)))}))
    assert found.same_steps
    assert found.differing == (2,)
    assert (0 < found.loss[1] < 2e-7) == (name == "loss")
    assert found.loss[0] == found.loss[2] == 0


def test_a_number_that_one_run_alone_has_is_a_difference() -> None:
    assert compare(rows(), rows(koleo=0.5)).differing == (2,)


def test_other_indices_and_missing_steps_are_other_steps() -> None:
    assert not compare(rows(), rows(next_index=17)).same_steps
    assert not compare(rows(), rows()[:2]).same_steps
    assert not compare(rows()[:2], rows()).same_steps


def test_a_last_bit_of_a_weight_or_moment_is_a_different_tensor() -> None:
    def state(weight: float, moment: float) -> dict[str, object]:
        moments = [{"state": {"weight": {"exp_avg": torch.tensor([0.0, moment])}}}]
        return {"state_dict": {"weight": torch.tensor([weight])}, "optimizer_states": moments, "epoch": 3}

    one = float(np.nextafter(np.float32(1), np.float32(2)))
    assert different_tensors(state(1, 1), dict(reversed({**state(1, 1), "epoch": 4}.items()))) == (0, 2)
    assert different_tensors(state(1, 1), state(one, 1)) == (1, 2)
    assert different_tensors(state(1, 1), state(one, one)) == (2, 2)


def test_what_is_promised_for_other_readers_is_more_than_for_other_ranks() -> None:
    last_bit = Comparison(True, (2,), (0.0, 1e-7, 0.0))
    assert Finding(last_bit, (3, 9), True).holds(to_the_bit=False)
    assert not Finding(last_bit, (0, 9), True).holds(to_the_bit=True)
    same = Comparison(True, (), (0.0, 0.0, 0.0))
    assert Finding(same, (0, 9), True).holds(to_the_bit=True)
    assert not Finding(same, (1, 9), True).holds(to_the_bit=True)
    for broken in (
        Finding(same, (0, 9), same_tiles=False),
        Finding(Comparison(False, (), (0.0,)), (0, 9), True),
        Finding(Comparison(True, (2,), (0.0, 2 * MOST, 0.0)), (3, 9), True),
    ):
        assert not broken.holds(to_the_bit=False)


@pytest.mark.slow
@pytest.mark.long
def test_runs_that_are_killed_and_resumed_on_other_ranks_and_readers_train_the_same(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    assert main(["--steps", "30", "--folder", str(tmp_path), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
