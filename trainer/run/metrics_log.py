"""The metrics of a run, on the driver: a line of progress, `metrics.parquet`, `failures.parquet` and the trackers."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Generator
from typing import Any

import pyarrow as pa
import ray.util.queue

from streaming import storage
from streaming.delivery.failures import FailureLog
from streaming.errors import StorageError
from streaming.progress import ProgressLine
from trainer.run.config import Config
from trainer.run.messages import Failed, Ranks, Row
from trainer.run.placement import Placement
from trainer.run.trackers import Trackers

METRICS = "metrics.parquet"

_TERMS = ("loss", "dino_global", "dino_local", "ibot", "regression", "koleo", "kde", "knn_accuracy", "validation_loss")


class MetricsLog:
    """The metrics of a run: a progress line now, `metrics.parquet` of the run at every checkpoint and at the end.

    So it is with `failures.parquet`, the tiles that could not be read.
    """

    def __init__(self, config: Config, start: int) -> None:
        self._config, self._options = config, config.data.storage_options
        self._uri = storage.join(config.run.out, METRICS)
        self._rows: list[Row] = []
        self.summary: list[str] = []
        self._trackers = Trackers(config.run.loggers, config.run.out, start)
        if start and storage.exists(self._uri, self._options):
            earlier: list[Row] = storage.read_table(self._uri, self._options).to_pylist()
            self._rows = [row for row in earlier if row["step"] <= start]
        self._failures = FailureLog(config.run.out, self._options, start * config.train.batch)
        self._generation = ""
        self._progress = ProgressLine("train", "steps", total=config.train.steps)
        self.placement = Placement()

    def __enter__(self) -> MetricsLog:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        self._trackers.close()
        self._save()

    def add(self, row: Row | Failed | Ranks) -> None:
        """Takes the row of a step, lines of the summary, failures, or whether the ranks run."""
        if isinstance(row, Ranks):
            (self.placement.found.set if row.run else self.placement.found.clear)()
            return
        if isinstance(row, Failed):
            if row.generation != self._generation:
                self._failures.rewind()
                self._generation = row.generation
            self._failures.add(row.failures)
            return
        if "saving" in row:
            self._failures.settle()
            self._save()  # before the checkpoint is whole, so that none is without the rows that lead to it
            return
        if "step" not in row:
            self.summary += [name.removeprefix("summary:") for name in row]
            return
        # After a restart of the workers, steps since the last checkpoint come again.
        self._rows = [kept for kept in self._rows if kept["step"] < row["step"]] if self._is_repeat(row) else self._rows
        before, ranks = (self._rows[-1].get("ranks") if self._rows else None), row.get("ranks")
        if before and ranks and before != ranks:
            sys.stderr.write(f"train: from step {row['step']:,.0f} on with {ranks:.0f} ranks, before {before:.0f}\n")
        self._rows.append(row)
        self._trackers.add(row)
        terms = "  ".join(f"{name} {row[name]:.3f}" for name in _TERMS if name in row)
        speed = f"{row['tiles_per_s']:.0f} tiles/s  waited {row['data_wait_share']:.0%}"
        self._progress.update(int(row["step"]), f"{speed}  {terms}")

    def _is_repeat(self, row: Row) -> bool:
        return bool(self._rows) and self._rows[-1]["step"] >= row["step"]

    def _save(self) -> None:
        """Writes all rows; where the storage does not take them, the next time is another chance, so a run goes on."""
        self._trackers.save()
        try:
            if self._rows:
                # Some columns are not in every row, and pyarrow looks at the first one's alone.
                names = list(dict.fromkeys(name for row in self._rows for name in row))
                columns = {name: [row.get(name) for row in self._rows] for name in names}
                storage.write_table(self._uri, pa.table(columns), self._options)
            self._failures.save()
        except StorageError as error:
            sys.stderr.write(f"train: metrics are not saved: {error}\n")

    @contextlib.contextmanager
    def listening(self, messages: ray.util.queue.Queue) -> Generator[None]:
        """Takes what rank 0 sends while the block runs."""
        done = threading.Event()

        def listen() -> None:
            while not done.is_set():
                with contextlib.suppress(queue.Empty):
                    self.add(messages.get(timeout=0.5))

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            yield
        finally:
            done.set()
            listener.join()
            with contextlib.suppress(Exception):  # Ray may be gone by now
                for row in messages.get_nowait_batch(messages.size()):
                    self.add(row)
