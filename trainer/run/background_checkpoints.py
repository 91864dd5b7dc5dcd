"""Lightning's checkpoints, written while steps go on.

Apart from `checkpoint`, since those who do not train need no Lightning, whose import takes five seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from streaming import storage
from trainer.run import checkpoints, state_files
from trainer.run.config import Config
from trainer.run.state_files import Index, named_tensors


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

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: dist.ProcessGroup | None = None
    ) -> None:
        """Starts to write, once the one before is done; with the other ranks of a group, of which each has its part.

        Raises:
            StorageError: the one before could not be written.
        """
        self.wait()
        self._under_way = self._thread.submit(self._save, checkpoint, str(path), storage_options)

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

    def _save(self, state: dict[str, Any], uri: str, group: dist.ProcessGroup | None) -> None:
        """Writes a checkpoint, then removes what is too old."""
        checkpoints.write(uri, state, self._config, self._catalog, self._sources, group)
        if group is None or dist.get_rank(group) == 0:
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

    def read_index(self, uri: str) -> Index:
        """What a checkpoint has but for its tensors' values."""
        return checkpoints.read_index(uri, self._options)

    def read_parts(self, uri: str, index: Index, into: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
        """Fills tensors, or this rank's parts of them, together with the other ranks of a group."""
        state_files.load(uri, index, into, self._options, group)

    def read_whole(self, uri: str) -> dict[str, Tensor]:
        """All tensors by name."""
        return named_tensors(self.load_checkpoint(uri))

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint's folder."""
        storage.remove(str(path), self._options)


class NoNewCheckpoints(FolderCheckpointIO):
    """Reads checkpoints, and writes none."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Does nothing."""
