"""A rank's micro-batches on their way from the stream to the step, each counted and checked, and the waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from streaming.delivery.exported_metrics import export_wait
from streaming.delivery.failures import FailureBudget
from streaming.errors import StreamError
from streaming.reading.batch import Failure, failures_of, tile_columns
from trainer.recipe.augment import Augmentation
from trainer.run.config import Config


def for_step(batch: Mapping[str, Any], augment: Augmentation) -> dict[str, Any]:
    """What a step takes of a batch: `index`, the `tile` of the view that global crops are cut from, and `local_tile`.

    The last one is of the view that local crops are cut from, where that is another one.
    """
    names = tile_columns(batch)
    of_global, of_local = (names[view] for view in augment.cut_from(len(names)))
    other = {} if of_local == of_global else {"local_tile": batch[of_local]}
    return {"tile": batch[of_global], **other, "index": batch["index"]}


class StepBatches:
    """A rank's micro-batches, counted and checked against the step they belong to."""

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
        """Seconds that steps have waited for batches."""

    def note_wait(self, seconds: float) -> None:
        """Takes what a step has waited for its batch."""
        self.waited_s += seconds
        export_wait(seconds)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of what a step takes.

        Raises:
            StreamError: the stream gives other indices than the step's, or too many tiles failed.
        """
        shape = self._config.train.shape
        for rounds, batch in enumerate(self._source):
            if self._failed and (failures := failures_of(batch)):
                self._failed(failures)
            self.budget.add(batch)
            step = self.start + rounds // shape.accumulate
            low, high = int(batch["index"].min()), int(batch["index"].max())
            if len(batch["index"]) != shape.micro or low < step * shape.batch or high >= (step + 1) * shape.batch:
                raise StreamError(
                    f"step {step} was given {len(batch['index'])} indices from {low} to {high}, "
                    f"not {shape.micro} of {step * shape.batch} to {(step + 1) * shape.batch - 1}; please report this"
                )
            yield for_step(batch, self._config.augment)
