"""A rank's micro-batches on their way from the stream to the step, each timed, counted and checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from streaming.delivery.exported_metrics import export_wait
from streaming.delivery.failures import FailureBudget
from streaming.errors import StreamError
from streaming.reading.batch import Failure, failures_of
from trainer.run.config import Config


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
