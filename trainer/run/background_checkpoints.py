"""Lightning's checkpoints, written while steps go on.

Apart from `checkpoint`, since those who do not train need no Lightning, whose import takes five seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from streaming import storage
from trainer.run import checkpoints
from trainer.run.config import Config


class FolderCheckpointIO(CheckpointIO):
    """Lightning's way to storage, through this project's: `path` is a checkpoint's folder.

    Saving returns at once and goes on in a thread, so what is saved must not be changed afterwards; one is under way at
    most. Lightning's `AsyncCheckpointIO` queues without bound and tells of a failure one checkpoint late.
    """

    def __init__(self, config: Config, catalog: str, sources: Sequence[checkpoints.SlideSource] = ()) -> None:
        self._config, self._catalog, self._sources = config, catalog, sources
        self._options = config.data.storage_options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self.last_good: str | None = None
        """The newest checkpoint that this process has written to its end."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Starts to write, once the one before is done.

        Raises:
            StorageError: the one before could not be written.
        """
        self.wait()
        self._under_way = self._thread.submit(self._save, checkpoint, str(path))

    def check(self) -> None:
        """Raises what went wrong with a checkpoint that is done, without waiting for one that is not."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint under way, and raises what went wrong with it."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def teardown(self) -> None:
        """Lets the last checkpoint end."""
        self._thread.shutdown(wait=True)

    def _save(self, state: dict[str, Any], uri: str) -> None:
        """Writes a checkpoint, then removes what is too old."""
        checkpoints.write(uri, state, self._config, self._catalog, self._sources)
        self.last_good = uri
        self._remove_old(int(state["global_step"]))

    def _remove_old(self, step: int) -> None:
        run = self._config.run.out
        # Later steps are not this run's, or damaged: they must not count among those that are kept.
        until_now = [known for known in checkpoints.steps_of(run, self._options) if known <= step]
        for old in until_now[: -self._config.train.keep_checkpoints]:
            storage.remove(checkpoints.checkpoint_uri(run, old), self._options)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Reads the state; `weights_only` is always true."""
        return checkpoints.load(str(path), self._options)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint's folder."""
        storage.remove(str(path), self._options)


class NoNewCheckpoints(FolderCheckpointIO):
    """Reads checkpoints, and writes none."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Does nothing."""
