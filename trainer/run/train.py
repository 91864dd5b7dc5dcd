"""Training: Ray Train starts the ranks, Ray Data feeds them, Lightning turns the steps."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import ray
import ray.train
import ray.train.collective
import ray.train.torch
import ray.util.queue
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.actor import ActorHandle
from ray.train import UserCallback
from ray.train.lightning import RayLightningEnvironment
from ray.train.torch import TorchTrainer

from streaming import cluster, storage
from streaming.catalog import Catalog
from streaming.delivery.chain import Source, chained, start_chain
from streaming.delivery.stream import TileStream, torch_batches
from streaming.errors import CheckpointError, ConfigError, TilestreamError, root_cause
from streaming.plan import TilePlan
from streaming.reading.reader import ReaderOptions
from streaming.storage import clients
from streaming.storage.staging import Staging
from trainer.recipe.module import DinoModule
from trainer.run import checkpoints
from trainer.run.background_checkpoints import FolderCheckpointIO
from trainer.run.config import Config, DataConfig, TrainConfig, recipe_changes
from trainer.run.device_feed import DeviceFeed
from trainer.run.strategy import OneDevice, Replicas, Shards, autocast_precision
from trainer.run.watch import Failed, MetricsLog, Report, Signals, StepBatches, Watch

RANK_ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # crops of two sizes tear the GPU's memory into pieces
    "THP_MEM_ALLOC_ENABLE": "1",  # the first touch of small pages takes a fifth of the augmentation's time on a CPU
}
"""What torch reads from the environment of a rank."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended."""

    checkpoint: str
    start: int
    steps: int
    summary: list[str]


def staging(data: DataConfig) -> Staging:
    """Where a configuration puts copies of remote objects."""
    return Staging(folder=data.staging, max_bytes=int(data.staging_gb * 2**30))


def load_catalog(data: DataConfig) -> Catalog:
    """The catalog of a configuration.

    Raises:
        ConfigError: none is named.
        CatalogError: there is none, or one of another version.
    """
    if not data.catalog:
        raise ConfigError(
            "data.catalog is not set; give --data.catalog URI, made by `tilestream catalog SLIDES... --out URI`"
        )
    return Catalog.load(data.catalog, data.storage_options, staging(data))


def make_plan(config: Config, catalog: Catalog) -> TilePlan:
    """The plan of a configuration."""
    data = config.data
    return TilePlan(
        catalog,
        config.run.seed,
        data.mpp,
        data.tile_size,
        cohorts=data.cohorts,
        min_tissue=data.min_tissue,
        max_upsampling=data.max_upsampling,
        universe=data.universe,
    )


def make_stream(config: Config, catalog: Catalog) -> TileStream:
    """The stream of a configuration."""
    data = config.data
    reader = ReaderOptions(
        hsv_rule=data.hsv_rule,
        storage_options=data.storage_options,
        staging=staging(data),
        requests_in_flight=data.requests_in_flight,
    )
    return TileStream(
        catalog,
        make_plan(config, catalog),
        config.train.shape,
        reader=reader,
        readers=data.readers,
        reader_cpus=data.reader_cpus,
        reader_labels=data.reader_labels,
        segment_blocks=data.segment_blocks,
        stall_s=data.stall_s,
    )


def resume_point(config: Config, catalog: str, *, force: bool = False) -> tuple[int, str | None]:
    """The step to go on from and the checkpoint to load: the run's newest that is not damaged, if it has one.

    catalog is its fingerprint. With `force`, another recipe or catalog is taken as meant.

    Raises:
        CheckpointError: it is of another model, or was trained by another recipe, or on another catalog or batch, so
            that its next index would mean other tiles.
    """
    found = checkpoints.newest_good(config.run.out, config.data.storage_options)
    if found is None:
        return 0, None
    meta = checkpoints.read_meta(found, config.data.storage_options)
    before = checkpoints.read_config(found, config.data.storage_options)
    changed, fixed = recipe_changes(before, config)
    if fixed:
        raise CheckpointError(
            f"{found}: does not fit the configuration: {', '.join(fixed)}; set it back or set another run.out"
        )
    if meta.catalog != catalog:
        changed.append(f"the catalog's content {meta.catalog} (now {catalog})")
    if changed and not force:
        raise CheckpointError(
            f"{found}: trained by another recipe: {', '.join(changed)}; set it back, set another run.out, "
            "or go on all the same with --force"
        )
    return meta.step, found


def check_model(config: Config, *, resumed: bool = False) -> None:
    """Builds the model without memory for it, and compares names and shapes with `model.init` unless it is resumed.

    Raises:
        ConfigError: a model, crops or schedules that make no sense.
        CheckpointError: weights of `model.init` that don't fit.
        StorageError: there is no such file.
    """
    try:
        with torch.device("meta"):
            DinoModule(config, resumed=resumed)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def check_watch(config: Config) -> int:
    """Reads the table of `watch.knn_dataset`, and tells how many tiles are followed.

    Raises:
        TilestreamError: as `trainer.evaluate.knn_watch.watched`.
    """
    if config.watch.knn_dataset is None:
        return 0
    from trainer.evaluate.knn_watch import watched  # scikit-learn: two seconds that other runs need not wait

    return len(watched(config))


def check_gpus(train: TrainConfig, *, debug: bool = False) -> None:
    """Refuses to wait for GPUs that will never come; a cluster may bring them.

    Raises:
        ConfigError: this machine, which is to run all ranks, has too few.
    """
    if not train.gpu or (not debug and cluster.address()):
        return
    # A Ray that runs already was started here, or joined by hand: it knows of its GPUs.
    joined = not debug and ray.is_initialized()
    have = cluster.gpus() if joined else torch.cuda.device_count()
    needed = 1 if debug else train.ranks
    if have < needed:
        raise ConfigError(
            f"train.gpu: this machine has {have} of the {needed} GPUs that are needed; add --train.gpu false or lower "
            "train.ranks, or name a cluster by RAY_ADDRESS"
        )


@dataclass(frozen=True)
class Place:
    """Where a rank stands among the others."""

    device: torch.device
    environment: ClusterEnvironment


def fit(
    config: Config,
    catalog: str,
    batches: StepBatches,
    resume: str | None,
    report: Report,
    signals: Signals,
    place: Place | None = None,
) -> None:
    """Trains to the last step, or until told to stop, in this process: alone, or as a rank at its place."""
    # Its advice (more workers for the loader, a product to try) does not apply here.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    train, to_storage = config.train, FolderCheckpointIO(config, catalog)
    if place is None:
        strategy = OneDevice(torch.device("cuda" if train.gpu else "cpu"))
    else:
        strategy = (Shards if train.strategy == "fsdp" else Replicas)(place.device)
    trainer = pl.Trainer(
        strategy=strategy,
        # Lightning would look for one, and take a batch job of SLURM for ranks of its own.
        plugins=[LightningEnvironment() if place is None else place.environment, to_storage],
        devices=1 if place is None else "auto",
        accelerator="gpu" if train.gpu else "cpu",
        max_steps=train.steps,
        precision=autocast_precision(train),  # type: ignore[arg-type]
        accumulate_grad_batches=train.accumulate,
        callbacks=[Watch(config, batches, report, to_storage, signals)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = DinoModule(config, resumed=resume is not None)
    feed = DeviceFeed(batches, strategy.root_device)
    try:
        trainer.fit(module, train_dataloaders=feed, ckpt_path=resume, weights_only=True)
    finally:
        to_storage.teardown()


@dataclass(frozen=True)
class _Loop:
    """What each rank is given."""

    config: Config
    catalog: str
    """its fingerprint"""
    source: Source
    chain: ActorHandle[Any]
    messages: ray.util.queue.Queue
    """of rank 0 to the driver"""
    orders: ray.util.queue.Queue
    """of the driver to rank 0"""


def _worker(loop: _Loop) -> None:
    """One rank of Ray Train."""
    config = loop.config
    rank = ray.train.get_context().get_world_rank()
    # One looks where the run stands, so that no two can see different checkpoints; the driver has compared recipes.
    found = None
    if rank == 0:
        found = *storage.PATIENT(resume_point, config, loop.catalog, force=True), uuid.uuid4().hex
    start, resume, generation = cast(
        "tuple[int, str | None, str]", ray.train.collective.broadcast_from_rank_zero(found)
    )
    read = partial(torch_batches, micro=config.train.shape.micro)
    tiles = chained(loop.chain, loop.source, generation, rank, (start, config.train.steps), read)
    batches = StepBatches(tiles, start, config, lambda failures: loop.messages.put(Failed(generation, failures)))
    signals = Signals(
        stop=_order(loop.orders) if rank == 0 else lambda: False,
        leaving=lambda: ray.train.get_preemption_info() is not None,
    )
    place = Place(ray.train.torch.get_device(), RayLightningEnvironment())
    fit(config, loop.catalog, batches, resume, loop.messages.put, signals, place)


def _order(orders: ray.util.queue.Queue) -> Callable[[], bool]:
    """Whether the driver has put an order, asked without waiting."""
    order = cast(Any, orders.actor).get.remote()
    return lambda: bool(ray.wait([order], timeout=0)[0])


def _ending_for_good() -> UserCallback:
    """Ends a run at an error that starting the workers again would only meet again."""

    # A class of this function goes to Ray's controller by value: to import this module would cost it ten seconds.
    class EndForGood(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            """Ray Train calls this before it decides about a restart; what is raised here ends the run."""
            del run_context
            causes = [root_cause(error) for error in worker_exceptions.values()]
            for cause in causes:
                if isinstance(cause, TilestreamError):
                    raise cause

    return EndForGood()


def train(config: Config, *, debug: bool = False, verbose: bool = False, force: bool = False) -> TrainResult:
    """Runs a training to its last step, from the newest checkpoint of `run.out` if there is one.

    With `debug`, reader and trainer run in this process, without Ray, so that a debugger stops in both. With `force`,
    a run goes on by another recipe than it began with.

    Raises:
        TilestreamError: bad input, told in one line.
    """
    # Workers run in folders of their own, so a relative path would mean another place to each of them.
    labelled = config.watch.knn_dataset and storage.canonical(config.watch.knn_dataset)
    run, watch = replace(config.run, out=storage.canonical(config.run.out)), replace(config.watch, knn_dataset=labelled)
    config = replace(config, run=run, watch=watch)
    catalog = load_catalog(config.data)
    out, options, steps = config.run.out, config.data.storage_options, config.train.steps
    start, resume = resume_point(config, catalog.fingerprint, force=force)
    last = checkpoints.checkpoint_uri(out, steps)
    if start >= steps:
        return TrainResult(resume or last, start, steps, [f"{out} is trained to step {start} already"])
    check_gpus(config.train, debug=debug)
    make_plan(config, catalog)  # what the catalog can't give is told before anything starts
    check_model(config, resumed=resume is not None)
    check_watch(config)
    storage.write_bytes(storage.join(out, checkpoints.CONFIG), config.to_yaml().encode(), options)
    with MetricsLog(config, start) as log:
        if debug:
            if config.train.ranks != 1:
                raise ConfigError(f"train.ranks is {config.train.ranks}; --debug runs one rank: add --train.ranks 1")
            source = make_stream(config, catalog).local_batches(start, steps)
            batches = StepBatches(source, start, config, lambda failures: log.add(Failed("", failures)))
            with terminated() as stop:
                fit(config, catalog.fingerprint, batches, resume, log.add, Signals(stop=stop.is_set, begin=stop.listen))
        else:
            _fit_on_ray(config, catalog, log, verbose=verbose)
    reached = checkpoints.steps_of(out, options)[-1]
    return TrainResult(checkpoints.checkpoint_uri(out, reached), start, reached, log.summary)


class Termination(threading.Event):
    """Set by SIGTERM (spot machines send it) from `listen` on; a second one kills the process."""

    def listen(self) -> None:
        """Takes the signal to itself, where this is the main thread: no other may listen to signals."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def terminated() -> Generator[Termination]:
    """Listens to SIGTERM while the block runs."""
    event, before = Termination(), signal.getsignal(signal.SIGTERM)
    event.listen()
    try:
        yield event
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _fit_on_ray(config: Config, catalog: Catalog, log: MetricsLog, *, verbose: bool) -> None:
    train, data, options = config.train, config.data, config.data.storage_options
    slots = round(train.ranks * train.rank_cpus + data.readers[1] * data.reader_cpus) + 1
    cluster.connect(slots, verbose=verbose, ignore_sigterm=True)
    if train.gpu and (have := cluster.gpus()) < train.ranks:  # Ray Train waits without a word
        sys.stderr.write(f"train: waiting for GPUs: the ranks need {train.ranks}, the cluster has {have} so far\n")
    source = make_stream(config, catalog).source
    chain = start_chain(source)
    messages, orders = (ray.util.queue.Queue(actor_options=cluster.beside_this()) for _ in range(2))
    # Ray Train keeps its own notes in the run's storage, which all nodes reach.
    notes = storage.join(config.run.out, f".ray-{uuid.uuid4().hex[:8]}")
    fs, path = clients.filesystem(notes, options)
    handler = cast(Any, FSSpecHandler)(fs)  # its stubs call it abstract
    trainer = TorchTrainer(
        # Not as train_loop_config, which the controller would unpickle, importing all this, too.
        partial(_worker, _Loop(config, catalog.fingerprint, source, chain, messages, orders)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.ranks,
            use_gpu=train.gpu,
            resources_per_worker={"CPU": train.rank_cpus, **train.rank_resources},
            label_selector=train.rank_labels or None,
        ),
        run_config=ray.train.RunConfig(
            name="train",
            worker_runtime_env={"env_vars": RANK_ENVIRONMENT},
            storage_path=path,
            storage_filesystem=PyFileSystem(handler),
            failure_config=ray.train.FailureConfig(max_failures=train.max_restarts),
            callbacks=[_ending_for_good()],
        ),
    )
    try:
        # Not earlier: when Ray starts, it takes SIGTERM to itself.
        with log.listening(messages), terminated() as stop, _passing_on(stop, orders):
            trainer.fit()
    except SystemExit as error:  # Ray Train's own handler of Ctrl-C ends so, and says nothing
        raise KeyboardInterrupt from error
    finally:
        ray.kill(chain)
        with contextlib.suppress(TilestreamError):
            storage.remove(notes, options)


@contextlib.contextmanager
def _passing_on(stop: threading.Event, orders: ray.util.queue.Queue) -> Generator[None]:
    """Tells rank 0 of the event while the block runs."""
    done = threading.Event()

    def wait() -> None:
        while not done.is_set():
            if stop.wait(0.5):
                orders.put("stop")
                return

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        done.set()
        waiting.join()
