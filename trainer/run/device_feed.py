"""The way from a rank's host to its device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from trainer.recipe.step_input import Drawn, StepInput

Batch = dict[str, Tensor]
T = TypeVar("T")
_ALIGNED = 64  # bytes: where a tensor may begin within a piece of memory


class DeviceFeed:
    """What steps need, on the device, in order.

    Args:
        source: micro-batches on the host.
        draw: draws all for one, on the host.
        make: makes of it, on the device, what a step needs.
        device: where to.
        waited: is told the seconds that each wait for the source took.
        beside: whether a thread of its own asks the source, draws and sends. What it sends goes as one piece, on a GPU
            through pinned memory, and the GPU makes an input on a stream of its own while the one before is trained on,
            so that none of it takes time of the step's. A CPU's cores have the step to do: there, it is done between
            two steps.
    """

    def __init__(
        self,
        source: Iterable[Batch],
        draw: Callable[[Batch], Drawn],
        make: Callable[[Drawn], StepInput],
        device: torch.device,
        waited: Callable[[float], None] = lambda _: None,
        *,
        beside: bool = False,
    ) -> None:
        self._source, self._draw, self._make, self._device = source, draw, make, device
        self._waited, self._beside = waited, beside
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[StepInput]:
        """Inputs on the device."""
        if not self._beside:
            sent = (self._sent(self._draw(batch)) for batch in self._timed(iter(self._source)))
            return (self._arrived(*self._made(drawn)) for drawn in sent)
        sent = self._timed(_in_thread(self._packed(self._draw(batch)) for batch in self._source))
        # In this thread: another one would take turns with the step's at giving the GPU its work.
        made = _one_ahead(self._made(drawn) for drawn in sent)
        return (self._arrived(*one) for one in made)

    def _timed(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            if item is None:
                return
            self._waited(time.perf_counter() - asked)
            yield item

    def _sent(self, drawn: Drawn) -> Drawn:
        with torch.cuda.stream(self._stream):
            return tree_map_only(Tensor, lambda tensor: tensor.to(self._device), drawn)

    def _packed(self, drawn: Drawn) -> Drawn:
        """The same, all in one piece of memory on the device, or on its way there."""
        tensors, structure = tree_flatten(drawn)
        starts, end = list[int](), 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        piece = torch.empty(end, dtype=torch.uint8, pin_memory=self._stream is not None)
        for tensor, part in zip(tensors, _parts(piece, starts, tensors), strict=True):
            part.copy_(tensor)
        with torch.cuda.stream(self._stream):
            piece = piece.to(self._device, non_blocking=True)
        return tree_unflatten(_parts(piece, starts, tensors), structure)

    def _made(self, drawn: Drawn) -> tuple[StepInput, torch.Event | None]:
        """A step's input, or what will be that once the event has come."""
        with torch.cuda.stream(self._stream):
            made = self._make(drawn)
        return made, self._stream.record_event() if self._stream is not None else None

    def _arrived(self, made: StepInput, event: torch.Event | None) -> StepInput:
        if event is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(event)
            for tensor in tree_leaves(made):
                tensor.record_stream(here)
        return made


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
