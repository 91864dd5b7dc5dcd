import csv
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from streaming.errors import ConfigError
from trainer.run.config import read_config
from trainer.run.metrics_log import MetricsLog
from trainer.run.trackers import Trackers, check_installed

ROWS = [{"step": float(step), "loss": 10.0 - step, "data_wait_share": 0.01 * step} for step in range(1, 5)]


def test_rows_come_to_the_loggers_with_the_data_wait_beside_the_loss(tmp_path: Path) -> None:
    trackers = Trackers(("csv", "tensorboard"), str(tmp_path), 0)
    for row in ROWS:
        trackers.add(row)
    trackers.close()
    with (tmp_path / "logs/csv/from-step-0/metrics.csv").open() as file:
        read = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert read == ROWS
    (events,) = (tmp_path / "logs/tensorboard/from-step-0").glob("events.out.*")
    assert b"data_wait_share" in events.read_bytes()


def test_an_attempt_that_starts_at_the_same_step_replaces_its_file_and_others_keep_theirs(tmp_path: Path) -> None:
    for start, rows in ((0, ROWS[:2]), (2, ROWS[2:3]), (2, ROWS[2:])):
        trackers = Trackers(("csv",), str(tmp_path), start)
        for row in rows:
            trackers.add(row)
        trackers.close()
    lines = {path.parent.name: path.read_text().splitlines() for path in tmp_path.glob("logs/csv/*/metrics.csv")}
    assert {name: len(text) - 1 for name, text in lines.items()} == {"from-step-0": 2, "from-step-2": 2}


def test_a_logger_that_fails_is_left_out_with_a_word_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = Trackers(("csv", "tensorboard"), str(tmp_path), 0)

    def gone(*_: object) -> None:
        raise ConnectionError("the service is gone")

    monkeypatch.setattr(trackers._loggers["tensorboard"], "log_metrics", gone)
    trackers.add(ROWS[0])
    assert capsys.readouterr().err == "train: tensorboard takes no more metrics: the service is gone\n"
    trackers.add(ROWS[1])
    trackers.close()
    assert len((tmp_path / "logs/csv/from-step-0/metrics.csv").read_text().splitlines()) == 3


def test_a_logger_that_is_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.trackers.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"names wandb, which is not installed; pip install wandb, or"):
        check_installed(("csv", "wandb"))


def test_metrics_that_storage_does_not_take_are_told_of_and_saved_the_next_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = read_config("debug", ["--run.loggers", "[]"])
    config = replace(base, run=replace(base.run, out=str(tmp_path)))
    in_the_way = tmp_path / "metrics.parquet"
    in_the_way.mkdir()
    with MetricsLog(config, 0) as log:
        for step in (1, 2):
            log.add({"step": step, "tiles_per_s": 9.0, "data_wait_share": 0.0})
            log.add({"saving": float(step)})
            told = "metrics are not saved" in capsys.readouterr().err
            assert told == (step == 1)
            if step == 1:
                in_the_way.rmdir()
        assert pq.read_table(in_the_way)["step"].to_pylist() == [1, 2]
