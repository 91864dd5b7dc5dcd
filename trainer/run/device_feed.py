"""The way from a rank's host to its device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from trainer.recipe.step_input import StepInput

Batch = dict[str, Tensor]
T = TypeVar("T")
_ALIGNED = 64  # bytes: where a tensor may begin within a piece of memory


class DeviceFeed:
    """What steps need, on the device, in order; the next one is on its way while the present one is trained on.

    Args:
        source: micro-batches on the host.
        make: makes of one what a step needs, on the host.
        device: where to.
        waited: is told the seconds that each wait for the source took.
        beside: whether a thread of its own asks the source, makes and sends; each input then goes as one piece, on a
            GPU through pinned memory and on a stream of its own, so that none of it takes time of the step's. A CPU's
            cores have the step to do: there, it is done between two steps.
    """

    def __init__(
        self,
        source: Iterable[Batch],
        make: Callable[[Batch], StepInput],
        device: torch.device,
        waited: Callable[[float], None] = lambda _: None,
        *,
        beside: bool = False,
    ) -> None:
        self._source, self._make, self._device = source, make, device
        self._waited, self._beside = waited, beside
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[StepInput]:
        """Inputs on the device."""
        if not self._beside:
            return _one_ahead(self._sent(batch) for batch in self._timed(iter(self._source)))
        made = self._timed(_in_thread(self._packed(self._make(batch)) for batch in self._source))
        return (self._arrived(*one) for one in made)

    def _timed(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            if item is None:
                return
            self._waited(time.perf_counter() - asked)
            yield item

    def _sent(self, batch: Batch) -> StepInput:
        tensors, structure = tree_flatten(self._make(batch))
        return tree_unflatten([tensor.to(self._device) for tensor in tensors], structure)

    def _packed(self, made: StepInput) -> tuple[Tensor, list[Tensor], Any]:
        """All of it in one piece of memory on the device, or on its way there; its tensors; and how they make it up."""
        tensors, structure = tree_flatten(made)
        starts, end = list[int](), 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        piece = torch.empty(end, dtype=torch.uint8, pin_memory=self._stream is not None)
        for tensor, part in zip(tensors, _parts(piece, starts, tensors), strict=True):
            part.copy_(tensor)
        with torch.cuda.stream(self._stream):
            piece = piece.to(self._device, non_blocking=True)
        return piece, _parts(piece, starts, tensors), structure

    def _arrived(self, piece: Tensor, tensors: list[Tensor], structure: Any) -> StepInput:
        if self._stream is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            piece.record_stream(here)
        return tree_unflatten(tensors, structure)


def _parts(piece: Tensor, starts: list[int], like: list[Tensor]) -> list[Tensor]:
    """Views of a piece of memory, uint8, from some bytes on, with the types and shapes of other tensors."""
    return [
        piece[start : start + one.nbytes].view(one.dtype).view(one.shape)
        for start, one in zip(starts, like, strict=True)
    ]


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Items, each given when the next one is there, too."""
    coming: T | None = None
    for item in items:
        if coming is not None:
            yield coming
        coming = item
    if coming is not None:
        yield coming


def _in_thread(items: Iterator[T]) -> Iterator[T]:
    """Items, the next one made in a thread while the present one is used."""
    asked: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()

    def make() -> None:
        while asked.get():
            try:
                made.put((next(items),))
            except StopIteration:
                made.put(None)
            except BaseException as error:  # whatever it is, the one who waits is to know
                made.put(error)

    # A daemon: a source that never answers must not keep a process that has been interrupted.
    threading.Thread(target=make, name="feed", daemon=True).start()
    try:
        asked.put(True)
        while (one := made.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            asked.put(True)
            yield one[0]
    finally:
        asked.put(False)
