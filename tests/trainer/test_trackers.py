import csv
from pathlib import Path

import pytest

from streaming.errors import ConfigError
from trainer.config import parse_config
from trainer.trackers import Trackers

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


def test_a_logger_that_fails_is_left_out_with_a_warning_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers = Trackers(("csv", "tensorboard"), str(tmp_path), 0)

    def gone(*_: object) -> None:
        raise ConnectionError("the service is gone")

    monkeypatch.setattr(trackers._loggers["tensorboard"], "log_metrics", gone)
    with pytest.warns(UserWarning, match="tensorboard takes no more metrics: the service is gone"):
        trackers.add(ROWS[0])
    trackers.add(ROWS[1])
    trackers.close()
    assert len((tmp_path / "logs/csv/from-step-0/metrics.csv").read_text().splitlines()) == 3


def test_a_logger_that_is_unknown_or_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_config({}, []).run.loggers == ("csv",)
    with pytest.raises(ConfigError, match=r"loggers names 'tensorbord'; take csv, tensorboard, wandb or mlflow"):
        parse_config({"run": {"loggers": ["tensorbord"]}}, [])
    monkeypatch.setattr("trainer.trackers.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"names wandb, which is not installed; pip install 'tilestream\[wandb\]'"):
        Trackers(("csv", "wandb"), "runs/a", 0)
