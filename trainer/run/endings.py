"""What is left in a run's folder when a training fails: why, and whether it may simply be started again.

A lost machine is mended by starting the same command again, and what starts it again (KubeRay, SLURM, a loop) can't
tell that from a training that broke down, which would only break down once more. So that one leaves a mark.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Generator
from datetime import UTC, datetime

from streaming import storage
from streaming.errors import TilestreamError, TrainingError, root_cause
from trainer.run.config import Config

STOPPED = "STOPPED"


@contextlib.contextmanager
def told_in_its_folder(config: Config) -> Generator[None]:
    """Writes `logs/failed-….log`, with all tracebacks, if the block raises; and `STOPPED` if it is a TrainingError."""
    try:
        yield
    except Exception as error:
        files = {f"logs/failed-{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}.log": "".join(traceback.format_exception(error))}
        cause = root_cause(error)
        if isinstance(cause, TrainingError):
            files[STOPPED] = f"{cause}\n"
        for name, text in files.items():
            # What is told is why the training failed, not why this could not be written.
            with contextlib.suppress(TilestreamError):
                storage.write_bytes(storage.join(config.run.out, name), text.encode(), config.data.storage_options)
        raise


def check_not_stopped(config: Config, *, force: bool) -> None:
    """Refuses to go on with a training that broke down; with `force`, takes its mark away.

    Raises:
        TrainingError: it has one.
    """
    uri, options = storage.join(config.run.out, STOPPED), config.data.storage_options
    if not storage.exists(uri, options):
        return
    if not force:
        why = storage.read_bytes(uri, options).decode(errors="replace").strip()
        raise TrainingError(f"{uri}: it would only break down again; mend it, then go on with --force. It was: {why}")
    storage.remove(uri, options)
