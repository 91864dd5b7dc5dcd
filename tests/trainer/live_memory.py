"""What lies in memory at most while operations run, also on tensors that have none."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all that operations make, as long as something refers to it."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = self.peak = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, memory: torch.UntypedStorage) -> None:
        key, nbytes = memory._cdata, memory.nbytes()
        if key in self._held:
            return

        def gone(_: Any) -> None:
            self.nbytes -= nbytes
            del self._held[key]

        self._held[key] = weakref.ref(memory, gone)
        self.nbytes += nbytes
        self.peak = max(self.peak, self.nbytes)
