"""What Lightning calls after each step: metrics, a checkpoint when one is due, an end when the run broke down."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from streaming.delivery.exported_metrics import export_step
from streaming.delivery.stream import check_step
from streaming.errors import TrainingError
from trainer.recipe.module import DinoModule
from trainer.recipe.step_input import StepInput
from trainer.run import checkpoints
from trainer.run.agreement import Agreement, Wishes, limit_waits, longest_wait_s
from trainer.run.background_checkpoints import FolderCheckpointIO
from trainer.run.config import Config
from trainer.run.guard import Guard
from trainer.run.messages import Report, Row
from trainer.run.pace import card_of, peak_flops, tile_flops
from trainer.run.step_batches import StepBatches
from trainer.run.stop_signals import Signals
from trainer.run.strategy import uncompiled
from trainer.run.validation import Validation

_LOOK_EVERY_S = 10.0
_COLLECT_EVERY = 150  # steps, as DINOv3 does


@contextmanager
def garbage_left_to_steps() -> Generator[None]:
    """Leaves it to `AfterStep` to look for garbage: a rank that does so by itself, makes all others wait for it."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Probe(Protocol):
    """A rank's part in scoring the teacher while it trains."""

    def accuracy(self, module: DinoModule, gather: Callable[[Tensor], Tensor]) -> float:
        """The score, the same on all ranks; `gather` gives all ranks' tensors in a new first dimension."""
        ...


class ProbeKind(Protocol):
    """How the teacher of a run is scored by `watch.knn_dataset`: `trainer.evaluate.knn_watch.KnnWatch`."""

    def __call__(self, config: Config, rank: int, num_ranks: int) -> Probe:
        """A rank's part."""
        ...

    def check(self, config: Config) -> int:
        """How many tiles are followed; raises what is wrong with them."""
        ...


class AfterStep(Callback):
    """After each step: its metrics to whoever listens, a checkpoint when one is due, an end when the run broke down."""

    def __init__(
        self,
        config: Config,
        batches: StepBatches,
        report: Report,
        storage_io: FolderCheckpointIO,
        signals: Signals,
        probe: ProbeKind | None = None,
    ) -> None:
        self._config, self._batches, self._report = config, batches, report
        self._io, self._signals, self._probe_kind = storage_io, signals, probe
        self._guard = Guard(config.watch, config.model.num_prototypes)
        self._index: list[torch.Tensor] = []
        self._finite: torch.Tensor | None = None
        # The first row counts from here: it shows what the cold start cost.
        self._since, self._waited_s, self._logged_step = time.perf_counter(), 0.0, batches.start
        self._saved = [batches.start] if batches.start else []
        self._saved_at = self._looked_at = time.monotonic()
        self._has_stepped = False
        self.leaves_to_return = False
        """whether training has ended so that it can go on at once: with more ranks, or on other machines"""
        self._peak_tiles_per_s: float | None = None
        self._probe: Probe | None = None
        self._validation: Validation | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the ranks' way to agree, and listens to signals."""
        self._signals.begin()
        self._agreement = Agreement(trainer.world_size)
        limit_waits(longest_wait_s(self._config.train.collective_minutes, starting=True))
        if peak := peak_flops(card_of(trainer.strategy.root_device), self._config.train.precision):
            self._peak_tiles_per_s = trainer.world_size * peak / tile_flops(self._config)
        if self._config.watch.knn_dataset and self._probe_kind is not None:
            self._probe = self._probe_kind(self._config, trainer.global_rank, trainer.world_size)
        if self._config.watch.validation_slides:
            self._validation = Validation(self._config, trainer.global_rank)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: StepInput, batch_idx: int
    ) -> None:
        """Looks whether the micro-batch ended a step.

        Raises:
            TrainingError: loss, gradients, embeddings or targets broke down.
            StorageError: the last checkpoint could not be written.
        """
        assert isinstance(pl_module, DinoModule)
        self._index.append(batch.sample_index)
        train, step = self._config.train, trainer.global_step
        if len(self._index) < train.accumulate:
            return
        if not self._has_stepped:
            self._has_stepped = True
            limit_waits(longest_wait_s(train.collective_minutes, starting=False))
        index, self._index = torch.cat(self._index), []
        if step % _COLLECT_EVERY == 0:
            gc.collect()
        self._io.check()
        self._note_finite(pl_module)
        if pl_module.is_logged(step):
            self._log(trainer, pl_module, step, index)
        wishes, leaving = self._agreement.exchange(self._wishes()), False
        if wishes.look:
            self._looked_at = time.monotonic()
            # At once: what is trained after this checkpoint would be lost with the machine, where nothing new, such as
            # the next segment's dataset, can be started any more.
            leaving = self._signals.leaving()
        if wishes.save or wishes.stop or leaving or step % train.checkpoint_every == 0 or step == train.steps:
            self._save(trainer, pl_module, step)
            self.leaves_to_return = (wishes.more or leaving) and not wishes.stop and step < train.steps
        trainer.should_stop |= wishes.stop or self.leaves_to_return

    def _wishes(self) -> Wishes:
        now, minutes = time.monotonic(), self._config.train.checkpoint_minutes
        return Wishes(
            stop=self._signals.stop(),
            save=minutes is not None and now - self._saved_at >= minutes * 60,
            look=now - self._looked_at >= _LOOK_EVERY_S,
            more=self._signals.more(),
        )

    def _note_finite(self, pl_module: DinoModule) -> None:
        """Remembers on the device whether all was finite since the last look: looking would wait for the device.

        What is a number on the host, by the schedules, is finite.
        """
        values = [value for value in pl_module.step_metrics.values() if isinstance(value, torch.Tensor)]
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
            f"{self._config.run.out}: step {step}: {trouble}; the run was stopped. What it was trained on: "
            f"`tilestream replay {self._config.run.out} --step {step}`. Last good checkpoint: {where}; "
            "remove later ones, lower optim.base_lr and go on with --force (watch.* says what counts as broken)"
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
            "ranks": trainer.world_size,
            "tiles_per_s": steps * batch / elapsed,
            "data_wait_share": (mean[-1] - self._waited_s) / elapsed,
            "filtered": round(mean[-4] * trainer.world_size),
            "failed": round(mean[-3] * trainer.world_size),
            "peak_memory_gb": float(rows[:, -2].max()),
            "time": time.time(),
        }
        if self._peak_tiles_per_s is not None:
            row["flops_utilisation"] = row["tiles_per_s"] / self._peak_tiles_per_s
        watch, is_last, gather = self._config.watch, step == self._config.train.steps, partial(_of_all_ranks, pl_module)
        if self._probe and (step % watch.knn_every == 0 or is_last):
            with uncompiled(), trainer.precision_plugin.forward_context():
                row["knn_accuracy"] = self._probe.accuracy(pl_module, gather)
        if self._validation and (step % watch.validation_every == 0 or is_last):
            with uncompiled(), trainer.precision_plugin.forward_context():
                row |= self._validation.terms(pl_module, gather)
        if trainer.is_global_zero:
            export_step(step, row["loss"], row.get("validation_loss"))
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
