"""Watching a run: batches timed and checked, metrics of each step, checkpoints when due, an end when it broke down."""

from __future__ import annotations

import contextlib
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import lightning.pytorch as pl
import pyarrow as pa
import ray.util.queue
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from streaming import storage
from streaming.delivery.exported_metrics import export_step, export_wait
from streaming.delivery.failures import Failure, FailureBudget, FailureLog, failures_of
from streaming.delivery.stream import check_step
from streaming.errors import StorageError, StreamError, TrainingError
from streaming.progress import ProgressLine
from trainer.recipe.diagnostics import Guard
from trainer.recipe.module import DinoModule
from trainer.run import checkpoints
from trainer.run.background_checkpoints import FolderCheckpointIO
from trainer.run.config import Config
from trainer.run.trackers import Trackers

if TYPE_CHECKING:
    from trainer.evaluate.knn_watch import KnnWatch

METRICS = "metrics.parquet"
_TERMS = ("loss", "dino_global", "dino_local", "ibot", "koleo", "kde", "knn_accuracy")
Row = dict[str, float]


@dataclass(frozen=True)
class Failed:
    """Tiles that a rank could not get, and the generation of ranks (`streaming.delivery.chain`) that it is one of."""

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
            waited = time.perf_counter() - asked
            self.waited_s += waited
            if batch is None:
                return
            export_wait(waited)
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


class Wishes(NamedTuple):
    """What some rank asks all ranks to do after a step."""

    stop: bool = False
    """Save and leave: the run was told to end."""
    save: bool = False
    """Save: the time has come."""
    look: bool = False
    """Look together whether a machine is about to go."""


class _Agreement:
    """Tells every rank what any rank wished for a step ago: nobody waits for it, and all hear of it at one step."""

    def __init__(self, num_ranks: int) -> None:
        # A group of its own on the host: with NCCL's, each step would wait for the device.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if num_ranks > 1 else None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, wishes: Wishes) -> Wishes:
        if self._group is None:
            return wishes
        before, flags = self._asked, torch.tensor(wishes, dtype=torch.uint8)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "asynchronous collectives return their work"
        self._asked = (flags, work)
        if before is None:
            return Wishes()
        before[1].wait()
        return Wishes(*(bool(flag) for flag in before[0]))

    def end(self) -> None:
        if self._asked is not None:
            self._asked[1].wait()


@dataclass(frozen=True)
class Signals:
    """What reaches a rank from outside."""

    stop: Callable[[], bool] = lambda: False
    """Whether this rank was told to save and leave."""
    leaving: Callable[[], bool] = lambda: False
    """Whether a machine of the run is about to go; asked of all ranks at once."""
    begin: Callable[[], None] = lambda: None
    """Called when training begins: Lightning has set handlers of its own by then, which would end it without saving."""


_LOOK_EVERY_S = 10.0


class Watch(Callback):
    """After each step: its metrics to whoever listens, a checkpoint when one is due, an end when the run broke down."""

    def __init__(
        self,
        config: Config,
        batches: StepBatches,
        report: Report,
        storage_io: FolderCheckpointIO,
        signals: Signals,
    ) -> None:
        self._config, self._batches, self._report = config, batches, report
        self._io, self._signals = storage_io, signals
        self._guard = Guard(config.watch, config.model.num_prototypes)
        self._index: list[torch.Tensor] = []
        self._finite: torch.Tensor | None = None
        # The first row counts from here: it shows what the cold start cost.
        self._since, self._waited_s, self._logged_step = time.perf_counter(), 0.0, batches.start
        self._saved = [batches.start] if batches.start else []
        self._saved_at = self._looked_at = time.monotonic()
        self._has_left = False
        self._knn: KnnWatch | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the ranks' way to agree, and listens to signals."""
        self._signals.begin()
        self._agreement = _Agreement(trainer.world_size)
        if self._config.watch.knn_dataset:
            from trainer.evaluate.knn_watch import KnnWatch  # scikit-learn: two seconds that other runs need not wait

            self._knn = KnnWatch(self._config, trainer.global_rank, trainer.world_size)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks whether the micro-batch ended a step.

        Raises:
            TrainingError: loss, gradients, embeddings or targets broke down.
            StorageError: the last checkpoint could not be written.
        """
        assert isinstance(pl_module, DinoModule)
        self._index.append(batch["index"])
        train, step = self._config.train, trainer.global_step
        if len(self._index) < train.accumulate:
            return
        index, self._index = torch.cat(self._index), []
        self._io.check()
        self._note_finite(pl_module)
        if pl_module.is_logged(step):
            self._log(trainer, pl_module, step, index)
        wishes = self._agreement.exchange(self._wishes())
        if wishes.look:
            self._looked_at = time.monotonic()
            leaving = not self._has_left and self._signals.leaving()
            self._has_left |= leaving
            wishes = wishes._replace(save=wishes.save or leaving)
        if wishes.save or wishes.stop or step % train.checkpoint_every == 0 or step == train.steps:
            self._save(trainer, pl_module, step)
        trainer.should_stop |= wishes.stop

    def _wishes(self) -> Wishes:
        now, minutes = time.monotonic(), self._config.train.checkpoint_minutes
        return Wishes(
            stop=self._signals.stop(),
            save=minutes is not None and now - self._saved_at >= minutes * 60,
            look=now - self._looked_at >= _LOOK_EVERY_S,
        )

    def _note_finite(self, pl_module: DinoModule) -> None:
        """Remembers on the device whether all was finite since the last look: looking would wait for the device."""
        values = [torch.as_tensor(value, device=pl_module.device) for value in pl_module.step_metrics.values()]
        now = torch.stack([value.float() for value in values]).isfinite().all()
        self._finite = now if self._finite is None else self._finite & now

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        assert self._finite is not None
        if not bool(_of_all_ranks(pl_module, self._finite).all()):
            self._break_down(step, f"loss or gradients not finite after step {self._logged_step}", step)
        if step in self._saved:
            return
        if trainer.is_global_zero:
            self._report({"saving": float(step)})
        trainer.save_checkpoint(checkpoints.checkpoint_uri(self._config.run.out, step), weights_only=False)
        self._saved.append(step)
        self._saved_at = time.monotonic()

    def _break_down(self, step: int, trouble: str, until: int) -> NoReturn:
        """Ends the run and names the last checkpoint that was written until then."""
        self._io.wait()
        kept = self._saved[-self._config.train.keep_checkpoints :]
        good = max((saved for saved in kept if saved <= until), default=None)
        where = checkpoints.checkpoint_uri(self._config.run.out, good) if good is not None else "none yet"
        raise TrainingError(
            f"{self._config.run.out}: step {step}: {trouble}; the run was stopped. Last good checkpoint: {where}; "
            "remove later ones, lower optim.base_lr and start again (watch.* says what counts as broken)"
        )

    def _log(self, trainer: pl.Trainer, pl_module: DinoModule, step: int, index: torch.Tensor) -> None:
        batch = self._config.train.batch
        seen = _of_all_ranks(pl_module, index).flatten().cpu().numpy()
        check_step(step - 1, batch, seen)
        own = {name: float(value) for name, value in pl_module.step_metrics.items()}
        budget = self._batches.budget
        # Counts of this rank stand beside the mean of the others: all are summed or averaged in one exchange.
        counts = [budget.filtered, budget.failed, _peak_memory_gb(pl_module.device), self._batches.waited_s]
        values = torch.tensor([*own.values(), *counts])
        rows = _of_all_ranks(pl_module, values.to(pl_module.device)).view(-1, len(values))
        mean = rows.mean(dim=0).tolist()
        now = time.perf_counter()
        elapsed, steps = now - self._since, step - self._logged_step
        row: Row = dict(zip(own, mean, strict=False)) | {
            "step": step,
            "first_index": int(seen.min()),
            "next_index": int(seen.max()) + 1,
            "tiles_seen": step * batch,
            "tiles_per_s": steps * batch / elapsed,
            "data_wait_share": (mean[-1] - self._waited_s) / elapsed,
            "filtered": round(mean[-4] * trainer.world_size),
            "failed": round(mean[-3] * trainer.world_size),
            "peak_memory_gb": float(rows[:, -2].max()),
            "time": time.time(),
        }
        if self._knn and (step % self._config.watch.knn_every == 0 or step == self._config.train.steps):
            with trainer.precision_plugin.forward_context():
                row["knn_accuracy"] = self._knn.accuracy(pl_module, partial(_of_all_ranks, pl_module))
        if trainer.is_global_zero:
            export_step(step, row["loss"])
            self._report(row)
        # Every rank has the same row, so all stop at once.
        if trouble := self._guard.trouble(row):
            # What was saved has been looked at: infinite values are in none of it, a collapse may be.
            self._break_down(step, trouble, self._guard.well_until if "collapsed" in trouble else step)
        self._since, self._waited_s, self._logged_step = now, mean[-1], step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits for the last checkpoint, and tells of replaced tiles."""
        self._agreement.end()
        self._io.wait()
        trainer.strategy.barrier("checkpoint")
        if trainer.is_global_zero and (lines := self._batches.budget.summary()):
            self._report({f"summary:{line}": 0.0 for line in lines})


def _peak_memory_gb(device: torch.device) -> float:
    """Highest memory so far in GiB: of the GPU's tensors, or of this process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


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
        self._trackers = Trackers(config.run.loggers, config.run.out, start)
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
        self._trackers.close()
        self._save()

    def add(self, row: Row | Failed) -> None:
        """Takes the row of a step, lines of the summary, or failures."""
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
                storage.PATIENT(storage.write_table, self._uri, pa.table(columns), self._options)
            storage.PATIENT(self._failures.save)
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
