"""`tilestream train --profile N`: what the host and the GPU do in N steps of rank 0, as a trace to look at."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from streaming import storage
from trainer.run.config import Config
from trainer.run.messages import Report

_BEFORE = 5  # steps that compile, fill caches and find their memory


def trace_uri(run: str, first: int, last: int) -> str:
    """Where a run keeps the trace of some steps, counted from 1."""
    return storage.join(run, "profile", f"steps-{first:08d}-to-{last:08d}.json.gz")


class Profile(Callback):
    """Writes a trace of some steps of rank 0 in Chrome's format, which https://ui.perfetto.dev draws, too.

    Args:
        config: where the run lies, and how long it is.
        start: the steps that were done before.
        num_steps: steps to trace, after the first five of this start; of a shorter run, its last ones.
        report: is told where the trace is.
    """

    def __init__(self, config: Config, start: int, num_steps: int, report: Report) -> None:
        self._config, self._report = config, report
        steps = config.train.steps
        self._before = max(start, min(start + _BEFORE, steps - num_steps))
        self._last = min(self._before + num_steps, steps)
        self._profile: profile | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins before the first round of the first step."""
        if trainer.is_global_zero and trainer.global_step == self._before and self._profile is None:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends after the last step, and writes the trace.

        Raises:
            StorageError: it can't be written.
        """
        if self._profile is not None and trainer.global_step == self._last:
            self._end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes what there is of a run that was told to stop earlier."""
        if self._profile is not None:
            self._last = trainer.global_step
            self._end()

    def _end(self) -> None:
        done, self._profile, self._before = self._profile, None, self._before + 1
        assert done is not None, "it was begun"
        done.stop()
        uri = trace_uri(self._config.run.out, self._before, self._last)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json.gz")
            done.export_chrome_trace(str(path))
            storage.write_bytes(uri, path.read_bytes(), self._config.data.storage_options)
        self._report({f"summary:trace of steps {self._before} to {self._last}: {uri}": 0.0})


def profiles(config: Config, start: int, num_steps: int, report: Report) -> list[Profile]:
    """The trace that was asked for, if one was; as `Profile` takes them."""
    return [Profile(config, start, num_steps, report)] if num_steps else []
