"""What the peers' scripts share: their task, a rate, the answer. Runs in the peer's environment."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from typing import Any

WARM, SECONDS = 4, 8.0


def task() -> dict[str, Any]:
    """What the benchmark wants measured."""
    return json.load(sys.stdin)


def tiles_per_s(batches: Iterable[Any], batch: int) -> float:
    """Tiles per second over some seconds, after the first batches; ends earlier where the batches do."""
    started = ended = time.perf_counter()
    num = 0
    for at, _ in enumerate(batches):
        ended = time.perf_counter()
        if at < WARM:
            started = ended
            continue
        num += batch
        if ended - started > SECONDS:
            break
    return num / (ended - started)


def answer(**measured: float) -> None:
    """Hands the numbers over."""
    print(json.dumps(measured))
