"""Watching a run: batches timed and checked, metrics of each step, checkpoints when due, a progress line."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pyarrow as pa
import ray.util.queue
import torch
from lightning.pytorch.callbacks import Callback

from streaming import storage
from streaming.errors import StreamError, TilestreamError
from streaming.failures import Failure, FailureLog, failures_of
from streaming.progress import ProgressLine
from streaming.stats import FailureBudget
from streaming.stream import check_step
from trainer import checkpoint
from trainer.config import Config
from trainer.module import DinoModule

METRICS = "metrics.parquet"
Row = dict[str, float]


@dataclass(frozen=True)
class Failed:
    """Tiles that a rank could not get, and the generation of ranks (`streaming.chain`) that it is one of."""

    generation: str
    failures: list[Failure]


Report = Callable[["Row | Failed"], None]


class StepBatches:
    """A rank's micro-batches, timed, counted and checked against the step they belong to."""

    def __init__(
        self,
        source: Iterable[dict[str, Any]],
        start: int,
        config: Config,
        failed: Callable[[list[Failure]], None] | None = None,
    ) -> None:
        """`failed` is told of each batch's tiles that could not be read, where there are any."""
        self._source, self.start, self._config, self._failed = source, start, config, failed
        self.budget = FailureBudget(config.data.max_failed_share)
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of `tile` and `index`.

        Raises:
            StreamError: the stream gives other indices than the step's, or too many tiles failed.
        """
        shape, rounds = self._config.train.shape, 0
        batches = iter(self._source)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - asked
            if batch is None:
                return
            if self._failed and (failures := failures_of(batch)):
                self._failed(failures)
            self.budget.add(batch)
            step = self.start + rounds // shape.accumulate
            rounds += 1
            low, high = int(batch["index"].min()), int(batch["index"].max())
            if len(batch["index"]) != shape.micro or low < step * shape.batch or high >= (step + 1) * shape.batch:
                raise StreamError(
                    f"step {step} was given {len(batch['index'])} indices from {low} to {high}, "
                    f"not {shape.micro} of {step * shape.batch} to {(step + 1) * shape.batch - 1}; please report this"
                )
            yield {"tile": batch["tile"], "index": batch["index"]}


class Watch(Callback):
    """After each step: its metrics to whoever listens, and a checkpoint when one is due."""

    def __init__(self, config: Config, batches: StepBatches, report: Report) -> None:
        self._config, self._batches, self._report = config, batches, report
        self._index: list[torch.Tensor] = []
        # The first row counts from here: it shows what the cold start cost.
        self._since, self._waited_s, self._logged_step = time.perf_counter(), 0.0, batches.start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks whether the micro-batch ended a step."""
        self._index.append(batch["index"])
        train, step = self._config.train, trainer.global_step
        if len(self._index) < train.accumulate:
            return
        index, self._index = torch.cat(self._index), []
        if step % train.log_every == 0 or step == train.steps:
            self._log(trainer, pl_module, step, index)
        if step % train.checkpoint_every == 0 or step == train.steps:
            trainer.save_checkpoint(checkpoint.checkpoint_uri(self._config.run.out, step), weights_only=False)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, index: torch.Tensor) -> None:
        batch = self._config.train.batch
        seen = _of_all_ranks(pl_module, index).flatten().cpu().numpy()
        check_step(step - 1, batch, seen)
        assert isinstance(pl_module, DinoModule)
        own = {name: float(value) for name, value in pl_module.step_metrics.items()}
        budget = self._batches.budget
        # Counts of this rank stand beside the mean of the others: all are summed or averaged in one exchange.
        values = torch.tensor([*own.values(), budget.filtered, budget.failed, self._batches.waited_s])
        mean = _of_all_ranks(pl_module, values.to(pl_module.device)).view(-1, len(values)).mean(dim=0).tolist()
        now = time.perf_counter()
        elapsed, steps = now - self._since, step - self._logged_step
        row: Row = dict(zip(own, mean, strict=False)) | {
            "step": step,
            "first_index": int(seen.min()),
            "next_index": int(seen.max()) + 1,
            "tiles_per_s": steps * batch / elapsed,
            "data_wait_share": (mean[-1] - self._waited_s) / elapsed,
            "filtered": round(mean[-3] * trainer.world_size),
            "failed": round(mean[-2] * trainer.world_size),
            "time": time.time(),
        }
        self._since, self._waited_s, self._logged_step = now, mean[-1], step
        if trainer.is_global_zero:
            self._report(row)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells of replaced tiles."""
        if trainer.is_global_zero and (lines := self._batches.budget.summary()):
            self._report({f"summary:{line}": 0.0 for line in lines})


def _of_all_ranks(pl_module: pl.LightningModule, values: torch.Tensor) -> torch.Tensor:
    gathered = pl_module.all_gather(values)
    assert isinstance(gathered, torch.Tensor), "a tensor goes in, a tensor comes out"
    return gathered


class MetricsLog:
    """The metrics of a run: a progress line now, `metrics.parquet` of the run at every checkpoint and at the end.

    So it is with `failures.parquet`, the tiles that could not be read.
    """

    def __init__(self, config: Config, start: int) -> None:
        self._config, self._options = config, config.data.storage_options
        self._uri = storage.join(config.run.out, METRICS)
        self._rows: list[Row] = []
        self.summary: list[str] = []
        if start and storage.exists(self._uri, self._options):
            earlier: list[Row] = storage.read_table(self._uri, self._options).to_pylist()
            self._rows = [row for row in earlier if row["step"] <= start]
        self._failures = FailureLog(config.run.out, self._options, start * config.train.batch)
        self._generation = ""
        self._progress = ProgressLine("train", "steps", total=config.train.steps)

    def __enter__(self) -> MetricsLog:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        with contextlib.suppress(TilestreamError):
            self._save()

    def add(self, row: Row | Failed) -> None:
        """Takes the row of a step, lines of the summary, or failures."""
        if isinstance(row, Failed):
            if row.generation != self._generation:
                self._failures.rewind()
                self._generation = row.generation
            self._failures.add(row.failures)
            return
        if "step" not in row:
            self.summary += [name.removeprefix("summary:") for name in row]
            return
        # After a restart of the workers, steps since the last checkpoint come again.
        self._rows = [kept for kept in self._rows if kept["step"] < row["step"]] if self._is_repeat(row) else self._rows
        self._rows.append(row)
        terms = "  ".join(f"{name} {row[name]:.3f}" for name in ("loss", "dino_global", "dino_local", "ibot", "koleo"))
        speed = f"{row['tiles_per_s']:.0f} tiles/s  waited {row['data_wait_share']:.0%}"
        self._progress.update(int(row["step"]), f"{speed}  {terms}")
        if row["step"] % self._config.train.checkpoint_every == 0:
            self._failures.settle()
            self._save()

    def _is_repeat(self, row: Row) -> bool:
        return bool(self._rows) and self._rows[-1]["step"] >= row["step"]

    def _save(self) -> None:
        if self._rows:
            storage.write_table(self._uri, pa.Table.from_pylist(self._rows), self._options)
        self._failures.save()

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
