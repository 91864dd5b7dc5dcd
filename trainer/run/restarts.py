"""When Ray Train starts a run's ranks again, and how many: its own policies, with what this project knows beside them.

Ray's controller takes them over, so nothing here imports the trainer before it is needed: that takes ten seconds.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2.api.exceptions import TrainingFailedError

from streaming.errors import NodeError, TilestreamError, root_cause

# How often the controller looks whether there is room for more ranks.
_LOOK_EVERY_S = 5.0
# For so long, a number of ranks that did not find the room that was counted is not tried again.
_IN_VAIN_S = 600.0
_ANSWER_S = 30.0
# What the controller needs at most to end the ranks; past that it is ended, and they with it.
_ABORT_S = 15.0


class StartedAgain(NodeError):
    """All ranks have saved and left, to be started as more or on other nodes: no failure, and not counted as one."""


class Restarts(DefaultFailurePolicy):
    """Starts ranks again unless they failed by bad input, so often from one checkpoint as the configuration says."""

    def __init__(
        self, config: FailureConfig, run: str, options: dict[str, Any], tell: Callable[[], Any] = lambda: None
    ) -> None:
        """Tell is called when ranks are to be started again."""
        super().__init__(config)
        self._run, self._options, self._tell = run, options, tell
        self._newest = -1

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Ray Train asks this when ranks have failed."""
        decision = self._decided(training_failed_error)
        if decision == FailureDecision.RETRY:
            self._tell()
        return decision

    def _decided(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        cause = root_cause(training_failed_error)
        if isinstance(cause, StartedAgain):
            return FailureDecision.RETRY
        if isinstance(cause, TilestreamError):
            return FailureDecision.RAISE  # they would meet it again
        with contextlib.suppress(TilestreamError):
            if (newest := self._newest_checkpoint()) != self._newest:
                self._newest, self._worker_group_failures = newest, 0
        return super().make_decision(training_failed_error)

    def _newest_checkpoint(self) -> int:
        from trainer.run.checkpoints import steps_of

        return max(steps_of(self._run, self._options), default=0)


def put_in(queue: Any, item: ray.ObjectRef[Any]) -> None:
    """Puts something in a queue's actor without waiting for it."""
    queue.put_nowait.remote(item)


class ElasticRanks(ElasticScalingPolicy):
    """As many ranks as find room, of the numbers that divide the batch; more of them from a checkpoint on.

    Ray's own policy would start the ranks again as soon as a node joins, and lose the steps since the last checkpoint:
    this one tells them (`Orders`), and they leave when they have saved.
    """

    def __init__(self, config: ScalingConfig, possible: tuple[int, ...], orders: ActorHandle[Any]) -> None:
        super().__init__(config)
        self._possible, self._orders = possible, orders
        self._looked_at = float("-inf")
        self._in_vain, self._until = 0, float("-inf")
        self._counted_on, self._in_vain_on = frozenset[str](), frozenset[str]()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        self._counted_on = frozenset(reserved_resources)
        # On the same nodes: one that was just lost is counted once more, and another one may join.
        same = self._counted_on == self._in_vain_on and time.monotonic() < self._until
        if same and room >= self._in_vain:
            room = max(self._in_vain - 1, self._possible[0])
        return max((number for number in self._possible if number <= room), default=0)

    def _get_reserved_resources(self) -> Any:
        # Counted anew: Ray's own look at the nodes may be 20 s old, and a node that was just lost be among them.
        coordinator: Any = self._autoscaling_coordinator
        asked = coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        with contextlib.suppress(RayError):
            return ray.get(asked, timeout=_ANSWER_S)
        return None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Ray Train asks this before it starts ranks, again and again until there is room."""
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(1)  # it would ask at once
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Ray Train asks this while ranks run."""
        del worker_group_state, worker_group_status
        self._maybe_send_resource_request()
        if time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            if (reserved := self._get_reserved_resources()) is not None:
                cast(Any, self._orders).room_for.remote(self._count_possible_workers(reserved))
        return NoopDecision()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Notes that so many ranks found no room: others hold it, or the nodes lack their label."""
        if type(previous_state) is not type(current_state) and isinstance(current_state, ReschedulingState):
            error = getattr(current_state.training_failed_error, "controller_failure", None)
            if isinstance(error, WorkerGroupStartupTimeoutError):
                self._in_vain_on = self._counted_on
                self._in_vain, self._until = error.num_workers, time.monotonic() + _IN_VAIN_S


class RanksTrainer(TorchTrainer):
    """Ray's trainer with these policies, for which it has no argument."""

    def __init__(
        self,
        worker: Callable[[], None],
        *,
        run: RunConfig,
        scaling: ScalingConfig,
        restarts: Restarts,
        ranks: ElasticRanks | None,
        timeout_s: float,
    ) -> None:
        """timeout_s is what ranks wait for one another while they start."""
        config = TorchConfig(timeout_s=round(timeout_s))
        super().__init__(worker, torch_config=config, scaling_config=scaling, run_config=run)
        self._policies = {"failure_policy": restarts} | ({"scaling_policy": ranks} if ranks else {})

    def _register_sigint_handler(self, controller: ActorHandle[Any]) -> None:
        """Ends a run at Ctrl-C.

        Ray's own handler (2.60) asks the controller and waits, for ever where there is no room for ranks: the
        controller tries to start them, again and again, without a look at what it is asked.
        """

        def end(*_: Any) -> NoReturn:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one does not wait
            with contextlib.suppress(RayError):  # it ends without an answer
                ray.get(cast(Any, controller).abort.remote(), timeout=_ABORT_S)
            ray.kill(controller)
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, end)

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        return super()._initialize_and_run_controller(**parts | self._policies)
