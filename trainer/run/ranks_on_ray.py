"""All ranks: Ray Train starts them where the cluster has room, and Ray Data feeds them."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import ray.util.queue
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.actor import ActorHandle
from ray.train.lightning import RayLightningEnvironment
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

from streaming import cluster, storage
from streaming.catalog import Catalog
from streaming.delivery.chain import start_chain
from streaming.delivery.rank_batches import rank_batches
from streaming.delivery.segments import Source, groups_of
from streaming.delivery.stream import torch_batches
from streaming.errors import StreamError, TilestreamError
from streaming.storage import fsspec_view
from trainer.run.after_step import ProbeKind
from trainer.run.agreement import longest_wait_s
from trainer.run.background_checkpoints import FolderCheckpointIO
from trainer.run.config import Config
from trainer.run.execution import TrainConfig
from trainer.run.fit import Place, fit
from trainer.run.messages import Failed, Ranks
from trainer.run.metrics_log import MetricsLog
from trainer.run.placement import lacking, watched
from trainer.run.profiling import profiles
from trainer.run.restarts import ElasticRanks, RanksTrainer, Restarts, StartedAgain, put_in
from trainer.run.resuming import resume_point
from trainer.run.slide_sources import SlideSource, slide_sources
from trainer.run.step_batches import StepBatches
from trainer.run.stop_signals import Signals, Wanted, asking, passing_on, start_orders, terminated

RANK_ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # crops of two sizes tear the GPU's memory into pieces
    "THP_MEM_ALLOC_ENABLE": "1",  # the first touch of small pages takes a fifth of the augmentation's time on a CPU
}
"""What torch reads from the environment of a rank."""


@dataclass(frozen=True)
class _Loop:
    """What each rank is given."""

    config: Config
    catalog: str
    """its fingerprint"""
    source: Source
    messages: ray.util.queue.Queue
    """of rank 0 to the driver"""
    orders: ActorHandle[Any]
    """of the driver and Ray's controller to rank 0: `Orders`"""
    probe: ProbeKind | None
    trained_on: list[SlideSource]
    profile_steps: int


def _worker(loop: _Loop) -> None:
    """One rank of Ray Train, of as many as there are this time."""
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    config = loop.config.on(num_ranks)
    if rank == 0:
        loop.messages.put(Ranks(run=True))
    # One looks where the run stands, so that no two can see different checkpoints; the driver has compared recipes.
    found = (*resume_point(loop.config, loop.catalog, force=True), uuid.uuid4().hex) if rank == 0 else None
    start, resume, generation = cast(
        "tuple[int, str | None, str]", ray.train.collective.broadcast_from_rank_zero(found)
    )
    source = loop.source.over(num_ranks, config.train.shape.micro).part(_group(config.train))
    # On the node of the first one that asks, whose end ends it: ranks that are started again have chains of their own.
    chain = start_chain(f"chain-{generation}-{source.group.start}")
    read = partial(torch_batches, micro=config.train.shape.micro)
    tiles = rank_batches(chain, source, rank, (start, config.train.steps), read)
    batches = StepBatches(tiles, start, config, lambda failures: loop.messages.put(Failed(generation, failures)))
    wanted = asking(loop.orders) if rank == 0 else Wanted
    signals = Signals(
        stop=lambda: wanted().stop,
        more=lambda: wanted().ranks > num_ranks,
        leaving=lambda: ray.train.get_preemption_info() is not None,
    )
    place = Place(ray.train.torch.get_device(), RayLightningEnvironment())
    # A checkpoint is of the run, not of the number of ranks that there happen to be.
    to_storage = FolderCheckpointIO(loop.config, loop.catalog, loop.trained_on)
    report = loop.messages.put
    also = profiles(config, start, loop.profile_steps, report)
    if fit(config, to_storage, batches, resume, report, signals, place, loop.probe, also):
        raise StartedAgain(f"{num_ranks} ranks have saved and left, to be started again")


def _group(train: TrainConfig) -> range:
    """The ranks that share a dataset with this one."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if train.ranks_per_stream is None:
        first = rank - context.get_local_rank()  # Ray Train numbers them node by node
        return range(first, first + context.get_local_world_size())
    return next(group for group in groups_of(train.most_ranks, train.ranks_per_stream) if rank in group)


def fit_on_ray(
    config: Config,
    catalog: Catalog,
    log: MetricsLog,
    probe: ProbeKind | None = None,
    *,
    verbose: bool = False,
    profile_steps: int = 0,
) -> None:
    """Trains from the run's newest checkpoint to its last step, on this machine's Ray or the cluster of RAY_ADDRESS.

    Raises:
        TilestreamError: what ended a rank for good.
    """
    train, data, options = config.train, config.data, config.data.storage_options
    least, most = train.ranks_range
    slots = round(most * train.rank_cpus + data.readers[1] * data.reader_cpus) + 1
    cluster.connect(slots, verbose=verbose, ignore_sigterm=True)
    if why := lacking(ray.nodes(), train):
        sys.stderr.write(f"train: waiting for nodes: {why}\n")
    stream = config.stream(catalog)
    source, trained_on = stream.source, slide_sources(catalog, stream.plan)
    # A message that its actor holds when it dies is lost, as a row of the metrics may be; the run is not.
    lasting = {"max_restarts": -1, "max_task_retries": -1}
    messages, orders = ray.util.queue.Queue(actor_options=cluster.beside_this() | lasting), start_orders()
    # Ray Train keeps its own notes in the run's storage, which all nodes reach.
    notes = storage.join(config.run.out, f".ray-{uuid.uuid4().hex[:8]}")
    fs, path = fsspec_view.filesystem(notes, options)
    handler = cast(Any, FSSpecHandler)(fs)  # its stubs call it abstract
    scaling = ray.train.ScalingConfig(
        num_workers=train.ranks,
        use_gpu=train.gpu,
        resources_per_worker={"CPU": train.rank_cpus, **train.rank_resources},
        label_selector=train.rank_labels or None,
    )
    lost = ray.put(Ranks(run=False))
    failures = ray.train.FailureConfig(max_failures=train.max_restarts)
    if least < most:
        # What is counted is there already; where it has gone, fewer ranks are to be tried soon.
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, "20")
    told = config, config.identity(catalog), source, messages, orders, probe, trained_on, profile_steps
    trainer = RanksTrainer(
        # Not as train_loop_config, which the controller would unpickle, importing all this, too.
        partial(_worker, _Loop(*told)),
        scaling=scaling,
        restarts=Restarts(failures, config.run.out, options, partial(put_in, messages.actor, lost)),
        ranks=ElasticRanks(scaling, config.possible_ranks, orders) if least < most else None,
        timeout_s=longest_wait_s(train.collective_minutes, starting=True),
        run=ray.train.RunConfig(
            name="train",
            worker_runtime_env={"env_vars": RANK_ENVIRONMENT},
            storage_path=path,
            storage_filesystem=PyFileSystem(handler),
            failure_config=failures,
        ),
    )
    try:
        # Not earlier: when Ray starts, it takes SIGTERM to itself.
        with (
            log.listening(messages),
            watched(log.placement, train, data.stall_s),
            terminated() as stop,
            passing_on(stop, orders),
        ):
            trainer.fit()
    except (KeyboardInterrupt, Exception) as error:
        if log.placement.trouble:  # whatever Ray makes of the interrupt
            raise StreamError(log.placement.trouble) from error
        raise
    finally:
        with contextlib.suppress(TilestreamError):
            storage.remove(notes, options)
