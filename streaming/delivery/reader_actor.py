"""The actor of Ray that reads tiles on a CPU node, and tells the chain how it fares."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Generator
from typing import Any, cast

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data.block import BlockAccessor
from ray.exceptions import RayError

from streaming.catalog import Catalog
from streaming.delivery.exported_metrics import export_read
from streaming.delivery.pulses import PULSE_S, Pulse
from streaming.plan import TilePlan
from streaming.reading.batch import ARROW_TYPES, Batch
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.storage.connections import CONNECTIONS

_ANSWER_S = 60.0


class ReaderActor:
    """A TileReader behind the indices of Ray Data, which tells the chain how it fares.

    A batch whose process has died twice is read tile by tile in processes apart (`TileReader`), so that a tile that
    crashes its decoder is replaced. Only a process that was started again asks about that.
    """

    def __init__(
        self,
        plan: ray.ObjectRef[TilePlan],
        catalog: ray.ObjectRef[Catalog],
        options: ReaderOptions,
        chain: ActorHandle[Any] | None,
    ) -> None:
        context = ray.get_runtime_context()
        self._chain = chain
        self._again = chain is not None and context.was_current_actor_reconstructed
        self._busy: dict[int, float] = {}
        self._name, self._node = context.get_actor_id() or "", context.get_node_id()
        if chain is not None:
            threading.Thread(target=self._beat, args=(chain,), daemon=True, name="pulse").start()
        self._read = TileReader(plan, catalog, options)
        # Imported modules are never garbage: that the collector went through them again and again took a tenth of an
        # actor's time.
        gc.freeze()
        gc.set_threshold(50_000)

    def __call__(self, batch: Batch) -> pa.Table:
        """Reads a batch of indices; a row a tile, with `TileReader`'s columns."""
        with self._at_work(int(batch["index"][0])) as deaths:
            tiles = self._read(batch, isolated=deaths > 0)
        export_read(tiles)
        return block_of(tiles)

    @contextlib.contextmanager
    def _at_work(self, first: int) -> Generator[int]:
        """How many processes that were started again have died over the batch: the first one's death is not counted."""
        deaths, chain = 0, self._chain
        if chain is not None and self._again:
            with contextlib.suppress(RayError):
                answer: Any = ray.get(chain.begin.remote(first), timeout=_ANSWER_S)
                deaths = int(answer)
        self._busy[first] = time.monotonic()
        try:
            yield deaths
        finally:
            del self._busy[first]
        if chain is not None and self._again:
            chain.end.remote(first)

    def _beat(self, chain: ActorHandle[Any]) -> None:
        while True:
            now, busy, request = time.monotonic(), dict(self._busy), CONNECTIONS.oldest_request()
            index = min(busy, key=lambda first: busy[first]) if busy else None
            pulse = Pulse(
                self._node,
                index,
                now - busy[index] if index is not None else 0.0,
                request[0] if request else None,
                now - request[1] if request else 0.0,
            )
            with contextlib.suppress(RayError):
                chain.pulse.remote(self._name, pulse)
            time.sleep(PULSE_S)


def block_of(batch: Batch) -> pa.Table:
    """A batch as Ray Data's block, its columns of the same types in every block; Ray does not copy `tile`."""
    numbers = {name: column for name, column in batch.items() if name not in ARROW_TYPES}
    block = cast(pa.Table, BlockAccessor.batch_to_arrow_block(numbers))
    for name, kind in ARROW_TYPES.items():
        block = block.append_column(name, pa.array(batch[name], kind))
    return block
