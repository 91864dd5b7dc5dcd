"""The log of replaced tiles: each failure once, however often a run goes back to its checkpoint."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming import storage
from streaming.delivery.failures import FAILURES, FailureLog
from streaming.reading.batch import Failure, failures_of, pack_failures


def test_the_failures_of_a_batch_are_those_of_its_indices() -> None:
    failures = [[], [("a.svs", "broken"), ("b.svs", "gone")], [("a.svs", "broken")]]
    batch = {"index": np.array([7, 8, 9]), "failures": pack_failures(failures)}
    assert failures_of(batch) == [
        Failure(8, "a.svs", "broken"),
        Failure(8, "b.svs", "gone"),
        Failure(9, "a.svs", "broken"),
    ]


@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from("ab"), st.sampled_from("xy")), max_size=30), st.data())
def test_what_a_run_reads_again_after_a_restart_is_counted_once(
    failed: list[tuple[int, str, str]], data: st.DataObject
) -> None:
    failed = sorted(set(failed))
    log = FailureLog("memory://run")
    saved = data.draw(st.integers(0, 99))
    log.add(Failure(*entry) for entry in failed if entry[0] < saved)
    log.settle()
    reached = data.draw(st.integers(saved, 99))
    log.add(Failure(*entry) for entry in failed if saved <= entry[0] < reached)
    log.rewind()
    log.add(Failure(*entry) for entry in failed if saved <= entry[0])
    log.settle()
    rows = {(row["slide"], row["reason"]): (row["count"], row["first_index"]) for row in log.table().to_pylist()}
    wanted: dict[tuple[str, str], list[int]] = {}
    for index, slide, reason in failed:
        wanted.setdefault((slide, reason), []).append(index)
    assert rows == {key: (len(indices), min(indices)) for key, indices in wanted.items()}


def test_a_run_that_was_stopped_goes_on_with_what_lies_before_its_checkpoint(tmp_path: Path) -> None:
    log = FailureLog(str(tmp_path))
    log.save()
    assert not (tmp_path / FAILURES).exists()
    log.add([Failure(3, "a.svs", "broken")])
    log.settle()
    log.add([Failure(12, "a.svs", "broken"), Failure(13, "b.svs", "gone")])
    log.save()  # an error stopped it: what came since the checkpoint is told too
    table = storage.read_table(str(tmp_path / FAILURES))
    assert [row["count"] for row in table.to_pylist()] == [1, 1, 1]
    resumed = FailureLog(str(tmp_path), next_index=10)
    resumed.add([Failure(12, "a.svs", "broken"), Failure(13, "b.svs", "gone")])
    resumed.settle()
    assert resumed.table().to_pylist() == [
        {"slide": "a.svs", "reason": "broken", "count": 2, "first_index": 3},
        {"slide": "b.svs", "reason": "gone", "count": 1, "first_index": 13},
    ]


def test_a_slide_with_a_reason_for_each_tile_does_not_grow_the_log_without_end() -> None:
    log = FailureLog("memory://run")
    log.add(Failure(i, "a.svs", f"block {i}") for i in range(1000))
    rows = log.table().to_pylist()
    assert len(rows) <= 21
    assert sum(row["count"] for row in rows) == 1000
