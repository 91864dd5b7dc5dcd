"""Training: Ray Train starts the ranks, Ray Data feeds them, Lightning turns the steps."""

from __future__ import annotations

import contextlib
import logging
import uuid
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import ray
import ray.train
import ray.train.collective
import ray.util.queue
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.actor import ActorHandle
from ray.train import UserCallback
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchTrainer

from streaming import cluster, storage
from streaming.catalog import Catalog
from streaming.chain import Source, chained, start_chain
from streaming.errors import CheckpointError, ConfigError, TilestreamError, root_cause
from streaming.plan import TilePlan
from streaming.reader import ReaderOptions
from streaming.slide import Staging
from streaming.stream import TileStream, torch_batches
from trainer import checkpoint
from trainer.config import Config, DataConfig
from trainer.module import DinoModule
from trainer.watch import Failed, MetricsLog, Report, StepBatches, Watch


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended."""

    checkpoint: str
    start: int
    steps: int
    summary: list[str]


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
    return Catalog.load(data.catalog, data.storage_options)


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
    )


def make_stream(config: Config, catalog: Catalog) -> TileStream:
    """The stream of a configuration."""
    data = config.data
    reader = ReaderOptions(
        hsv_rule=data.hsv_rule,
        storage_options=data.storage_options,
        staging=Staging(folder=data.staging, max_bytes=int(data.staging_gb * 2**30)),
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


def resume_point(config: Config, catalog: str) -> tuple[int, str | None]:
    """The step to go on from and the checkpoint to load: the run's newest, if it has one; catalog is its fingerprint.

    Raises:
        CheckpointError: it is of another model, or was trained on another catalog or batch, so that its next index
            would mean other tiles.
    """
    found = checkpoint.latest(config.run.out, config.data.storage_options)
    if found is None:
        return 0, None
    meta = checkpoint.read_meta(found, config.data.storage_options)
    if meta.catalog != catalog:
        raise CheckpointError(
            f"{found}: trained on another catalog ({meta.catalog}, now {catalog}); "
            "restore that catalog or set another run.out"
        )
    if meta.next_index != meta.step * config.train.batch:
        raise CheckpointError(
            f"{found}: trained with batch {meta.next_index // meta.step}, now {config.train.batch}; "
            "set train.batch back or set another run.out"
        )
    before = checkpoint.read_config(found, config.data.storage_options)
    now = {**asdict(config.model), "global_size": config.augment.global_size}
    was = {**asdict(before.model), "global_size": before.augment.global_size}
    # What acts on the way and leaves the weights' shapes alone may change.
    changed = [f"{key} {was[key]} (now {now[key]})" for key in now if was[key] != now[key] and key != "drop_path"]
    if changed:
        raise CheckpointError(f"{found}: of another model: {', '.join(changed)}; set it back or set another run.out")
    return meta.step, found


def fit(config: Config, catalog: str, batches: StepBatches, resume: str | None, report: Report, **where: Any) -> None:
    """Trains to the last step in this process; `where` is Lightning's strategy, plugins and devices."""
    # Its advice (more workers for the loader, a product to try) does not apply here.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    plugins: list[Any] = [*where.pop("plugins", []), checkpoint.FolderCheckpointIO(config, catalog)]
    train = config.train
    trainer = pl.Trainer(
        **where,
        plugins=plugins,
        accelerator="gpu" if train.gpu else "cpu",
        max_steps=train.steps,
        precision=train.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=train.accumulate,
        callbacks=[Watch(config, batches, report)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if "strategy" in where:
        trainer = prepare_trainer(trainer)
    trainer.fit(DinoModule(config), train_dataloaders=batches, ckpt_path=resume, weights_only=True)


@dataclass(frozen=True)
class _Loop:
    """What each rank is given."""

    config: Config
    catalog: str
    """its fingerprint"""
    source: Source
    chain: ActorHandle[Any]
    messages: ray.util.queue.Queue


def _worker(given: dict[str, _Loop]) -> None:
    """One rank of Ray Train."""
    loop = given["loop"]
    config = loop.config
    rank = ray.train.get_context().get_world_rank()
    # One looks where the run stands, so that no two can see different checkpoints.
    found = (*resume_point(config, loop.catalog), uuid.uuid4().hex) if rank == 0 else None
    start, resume, generation = cast(
        "tuple[int, str | None, str]", ray.train.collective.broadcast_from_rank_zero(found)
    )
    read = partial(torch_batches, micro=config.train.shape.micro)
    tiles = chained(loop.chain, loop.source, generation, rank, (start, config.train.steps), read)
    fit(
        config,
        loop.catalog,
        StepBatches(tiles, start, config, lambda failures: loop.messages.put(Failed(generation, failures))),
        resume,
        loop.messages.put,
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        devices="auto",
    )


class _EndForGood(UserCallback):
    """Ends a run at an error that starting the workers again would only meet again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this before it decides about a restart; what is raised here ends the run."""
        del run_context
        causes = [root_cause(error) for error in worker_exceptions.values()]
        for cause in causes:
            if isinstance(cause, TilestreamError):
                raise cause


def train(config: Config, *, debug: bool = False, verbose: bool = False) -> TrainResult:
    """Runs a training to its last step, from the newest checkpoint of `run.out` if there is one.

    With `debug`, reader and trainer run in this process, without Ray, so that a debugger stops in both.

    Raises:
        TilestreamError: bad input, told in one line.
    """
    # Workers run in folders of their own, so a relative path would mean another place to each of them.
    config = replace(config, run=replace(config.run, out=storage.canonical(config.run.out)))
    catalog = load_catalog(config.data)
    out, options, steps = config.run.out, config.data.storage_options, config.train.steps
    start, resume = resume_point(config, catalog.fingerprint)
    last = checkpoint.checkpoint_uri(out, steps)
    if start >= steps:
        return TrainResult(resume or last, start, steps, [f"{out} is trained to step {start} already"])
    make_plan(config, catalog)  # what the catalog can't give is told before anything starts
    DinoModule(config)  # and what the model can't be
    storage.write_bytes(storage.join(out, checkpoint.CONFIG), config.to_yaml().encode(), options)
    with MetricsLog(config, start) as log:
        if debug:
            if config.train.ranks != 1:
                raise ConfigError(f"train.ranks is {config.train.ranks}; --debug runs one rank: add --train.ranks 1")
            source = make_stream(config, catalog).local_batches(start, steps)
            batches = StepBatches(source, start, config, lambda failures: log.add(Failed("", failures)))
            fit(config, catalog.fingerprint, batches, resume, log.add, devices=1)
        else:
            _fit_on_ray(config, catalog, log, verbose=verbose)
    return TrainResult(last, start, steps, log.summary)


def _fit_on_ray(config: Config, catalog: Catalog, log: MetricsLog, *, verbose: bool) -> None:
    train, data, options = config.train, config.data, config.data.storage_options
    cluster.connect(round(train.ranks * train.rank_cpus + data.readers[1] * data.reader_cpus) + 1, verbose=verbose)
    source = make_stream(config, catalog).source
    chain, messages = start_chain(source), ray.util.queue.Queue(actor_options={"num_cpus": 0})
    # Ray Train keeps its own notes in the run's storage, which all nodes reach.
    notes = storage.join(config.run.out, f".ray-{uuid.uuid4().hex[:8]}")
    fs, path = storage.filesystem(notes, options)
    handler = cast(Any, FSSpecHandler)(fs)  # its stubs call it abstract
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"loop": _Loop(config, catalog.fingerprint, source, chain, messages)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.ranks,
            use_gpu=train.gpu,
            resources_per_worker={"CPU": train.rank_cpus},
            label_selector=train.rank_labels or None,
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=path,
            storage_filesystem=PyFileSystem(handler),
            failure_config=ray.train.FailureConfig(max_failures=train.max_restarts),
            callbacks=[_EndForGood()],
        ),
    )
    try:
        with log.listening(messages):
            trainer.fit()
    finally:
        ray.kill(chain)
        with contextlib.suppress(TilestreamError):
            storage.remove(notes, options)
