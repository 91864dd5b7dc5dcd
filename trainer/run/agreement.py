"""How ranks agree to do something at the same step: to save, to stop, to look around."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist


class Wishes(NamedTuple):
    """What some rank asks all ranks to do after a step."""

    stop: bool = False
    """save and leave: the run was told to end"""
    save: bool = False
    """save: the time has come"""
    look: bool = False
    """look together whether a machine is about to go"""
    more: bool = False
    """leave at the next checkpoint: there is room for more ranks"""


def longest_wait_s(minutes: float, *, starting: bool) -> float:
    """What ranks wait for one another: until their first step is done, some compile, fetch weights or lack tiles."""
    return minutes * 60 * (3 if starting else 1)


def limit_waits(seconds: float) -> None:
    """From now on, a rank that waits longer for the others fails, and Ray Train starts all of them again."""
    if dist.is_available() and dist.is_initialized():
        for group in cast(Any, dist.distributed_c10d)._world.pg_map:  # torch has no public list of them
            dist.set_timeout(timedelta(seconds=seconds), group)


class Agreement:
    """Tells every rank what any rank wished for a step ago: nobody waits for it, and all hear of it at one step."""

    def __init__(self, num_ranks: int) -> None:
        # A group of its own on the host: with NCCL's, each step would wait for the device.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if num_ranks > 1 else None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, wishes: Wishes) -> Wishes:
        """Tells the others what this rank wishes for; returns what any wished for a step ago."""
        if self._group is None:
            return wishes
        before, flags = self._asked, torch.tensor(wishes, dtype=torch.uint8)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "asynchronous collectives return their work"
        self._asked = (flags, work)
        if before is None:
            return Wishes()
        before[1].wait()
        return Wishes(*(bool(flag) for flag in before[0]))

    def end(self) -> None:
        """Waits for what is under way."""
        if self._asked is not None:
            self._asked[1].wait()
