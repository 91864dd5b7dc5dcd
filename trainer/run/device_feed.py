"""The way from a rank's host to its device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class DeviceFeed:
    """Batches on the device, in order; the next one is copied while the present one is trained on.

    On a GPU, a batch goes through pinned memory on a stream of its own, so that the copy takes no time of the step's.
    """

    def __init__(self, source: Iterable[Batch], device: torch.device) -> None:
        self._source, self._device = source, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch]:
        """Batches of tensors on the device."""
        coming: Batch | None = None
        for batch in self._source:
            started = self._start(batch)
            if coming is not None:
                yield self._arrived(coming)
            coming = started
        if coming is not None:
            yield self._arrived(coming)

    def _start(self, batch: Batch) -> Batch:
        if self._stream is None:
            return {name: tensor.to(self._device) for name, tensor in batch.items()}
        with torch.cuda.stream(self._stream):
            return {name: tensor.pin_memory().to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _arrived(self, batch: Batch) -> Batch:
        if self._stream is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            for tensor in batch.values():
                tensor.record_stream(here)
        return batch
