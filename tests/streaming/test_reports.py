"""What a user is told: errors across Ray, the failure budget, progress."""

import pickle
import re

import numpy as np
import pytest
import ray.exceptions
from rich.console import Console

from streaming import errors, progress
from streaming.delivery.failures import FailureBudget
from streaming.errors import ConfigError, SlideError, StorageError, StreamError, TilestreamError, root_cause
from streaming.progress import Pace, ProgressLine
from streaming.reading.batch import pack_replaced
from streaming.reading.filters import HSV


def batch(n: int, failures: list[tuple[str, str]] = [], filtered: int = 0) -> dict:  # noqa: B006 never changed
    column = [[failure] for failure in failures] + [[]] * (n - len(failures))
    return {"index": np.arange(n), "filtered": np.full(n, filtered), **pack_replaced(column, [[HSV] * filtered] * n)}


def test_every_error_of_the_family_pickles_and_stands_in_the_tree() -> None:
    family = TilestreamError.__subclasses__()
    assert len(family) == 9
    for kind in family:
        copy = pickle.loads(pickle.dumps(kind("s3://b/a.svs: broken; mend it")))
        assert (type(copy), str(copy)) == (kind, "s3://b/a.svs: broken; mend it")
        assert kind.__name__ in errors.__doc__
    assert issubclass(ConfigError, ValueError)


def test_the_root_cause_is_found_behind_causes_contexts_and_ray_s_wrappers() -> None:
    inner = SlideError("a.svs: broken")
    handling = KeyError("while handling")
    handling.__context__ = inner
    assert root_cause(handling) is inner
    wrapped = ray.exceptions.RayTaskError("read", "traceback", StorageError("s3://b: denied"))
    outer = RuntimeError("job failed")
    outer.__cause__ = wrapped
    assert str(root_cause(outer)) == "s3://b: denied"
    both = wrapped.as_instanceof_cause()
    assert isinstance(both, StorageError)
    assert str(root_cause(both)) == "s3://b: denied", "though Ray's error is one of the family too"
    alone = RuntimeError("nobody's")
    alone.__cause__ = alone
    assert root_cause(alone) is alone
    ours = ray.exceptions.RayTaskError("read", "a long traceback", KeyError("shape")).as_instanceof_cause()
    assert repr(root_cause(ours)) == "KeyError('shape')"


def test_the_budget_names_the_slide_that_fails_most() -> None:
    budget = FailureBudget(max_share=0.1)
    budget.add(batch(64, [("b.svs", "cut off")] * 3 + [("a.svs", "denied")], filtered=1))
    assert (budget.tiles, budget.failed, budget.filtered) == (64, 4, 64)
    assert budget.summary() == [
        "64 of 128 tiles (50%) turned down by the HSV rule (data.hsv_rule) and replaced; up to a tenth is usual",
        "3 tiles replaced: b.svs: cut off",
        "1 tiles replaced: a.svs: denied",
    ]
    with pytest.raises(StreamError, match=r"most of b\.svs \(cut off\).*raise data\.max_failed_share"):
        budget.add(batch(64, [("b.svs", "cut off")] * 40))


def test_chance_at_the_allowed_share_does_not_stop_a_long_run_and_twice_the_share_does() -> None:
    random = np.random.default_rng(0)
    allowed, doubled = FailureBudget(max_share=0.02), FailureBudget(max_share=0.02)
    for _ in range(500):
        allowed.add(batch(64, [("a.svs", "x")] * int(random.binomial(64, 0.02))))
    batches = [batch(64, [("a.svs", "x")] * int(random.binomial(64, 0.04))) for _ in range(500)]
    with pytest.raises(StreamError):
        list(map(doubled.add, batches))
    assert doubled.tiles < 64 * 500


def test_no_budget_at_all_stops_at_the_first_failure() -> None:
    with pytest.raises(StreamError):
        FailureBudget(max_share=0.0).add(batch(64, [("a.svs", "x")]))


def test_in_a_log_progress_is_plain_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressLine("catalog", "slides", total=2000) as line:
        for done in range(1, 26):
            now[0] = float(done)
            line.update(done, f"{done // 10} rejected")
    assert capsys.readouterr().err.splitlines() == [
        "catalog: 10/2,000 slides  1 rejected  33:10 left",
        "catalog: 20/2,000 slides  2 rejected  33:00 left",
        "catalog: 25/2,000 slides  2 rejected",
    ]


def test_a_pace_leaves_out_the_start_and_what_comes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pace = [100.0], Pace()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    found = []
    for at, done in ((105.0, 0), (160.0, 64), (160.001, 128), (162.0, 128), (163.0, 364)):
        now[0] = at
        found.append(pace.at(done))
    assert found == [None, None, None, 32.0, 100.0]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_on_a_terminal_count_and_unit_stay_and_the_rest_is_cut(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True, width=width, color_system=None)
    )
    with ProgressLine("train", "steps", total=400) as line:
        line.update(123, "88 tiles/s  data wait 3%  loss 11.234  dino 5.123  ibot 6.001  koleo 0.12  lr 2.0e-04")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    last = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()][-1]
    assert "123/400 steps" in last
    assert len(last) <= width
