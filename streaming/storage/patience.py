"""How long a storage is asked again for what it could not answer: the one place that waits for outages.

Five minutes from the first failure on, with growing pauses. So long, because a tile that is given up while storage
hangs would make a run another one. A command that has yet to reach its storage waits for some seconds only: most likely
the address or the network is wrong, and whoever typed it is waiting.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

from streaming.errors import TilestreamError
from streaming.storage import trouble
from streaming.storage.brake import Brake

P = ParamSpec("P")
T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_OUTAGE_S, _FIRST_CONTACT_S = 300.0, 10.0
_TOLD_AFTER_S = 20.0
_first_contact_s = _OUTAGE_S


def answer_soon() -> None:
    """Has this process give up within seconds on a storage that it has not reached yet, as a command should.

    Readers and ranks wait: they start where others have reached the storage before.
    """
    global _first_contact_s
    _first_contact_s = _FIRST_CONTACT_S


class Tries(NamedTuple):
    """What an answer took besides its request."""

    retries: int = 0
    """how often that was sent again"""
    throttled: int = 0
    """how often of these because the storage throttled"""
    held_s: float = 0.0
    """seconds that the brake held it back"""


class Patience:
    """That of a process with one storage. Safe to use from several threads."""

    def __init__(self, brake: Brake | None = None) -> None:
        """With a brake, a storage that throttles is asked more slowly by all of the node."""
        self._brake = brake
        self.reached = False
        """whether it has answered anything yet"""

    def ask(
        self, uri: str, call: Callable[[], T], mend: Callable[[BaseException], bool] = lambda _: False
    ) -> tuple[T, Tries]:
        """What a call brings, and how often it was made again because the storage failed in a way that passes.

        `mend` is told each error; where it says that it has done something about it, the call is made again at once.

        Raises:
            StorageError: it can't be had, an UnreachableError if not within five minutes.
        """
        num_failed, num_throttled, held_s = 0, 0, 0.0
        first_failed_at, mended, told = 0.0, False, False
        while True:
            held_s += self._brake.wait() if self._brake else 0.0
            sent_at = time.monotonic()
            try:
                result = call()
            except TilestreamError:
                raise
            except Exception as error:
                now = time.monotonic()
                # What the brake held back was not asked for.
                first_failed_at = first_failed_at or now - held_s
                self.reached = self.reached or trouble.answered(error)
                waited = now - first_failed_at - held_s
                if self._brake and trouble.throttles(error):
                    num_throttled += 1
                    self._brake.throttled(sent_at)
                if not mended and mend(error):
                    mended, pause = True, 0.0
                elif trouble.passes(error) and waited < (_OUTAGE_S if self.reached else _first_contact_s):
                    # Full jitter: readers that failed together do not come again together (AWS's advice).
                    mended, pause = False, random.uniform(0.0, min(15.0, 0.1 * 2 ** min(num_failed, 8)))
                else:
                    with trouble.storage_errors(uri):
                        raise
                if waited > _TOLD_AFTER_S and not told:
                    told = True
                    _LOG.warning("%s (asked again until %.0f s have passed)", trouble.as_told(uri, error), _OUTAGE_S)
                num_failed += 1
                time.sleep(pause)
            else:
                self.reached = True
                if self._brake:
                    self._brake.answered()
                return result, Tries(num_failed, num_throttled, held_s)
