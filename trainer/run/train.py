"""Training: `tilestream train`, from the newest checkpoint of a run to its last step."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from streaming import storage
from streaming.errors import ConfigError
from trainer.run import checkpoints
from trainer.run.after_step import ProbeKind
from trainer.run.background_checkpoints import FolderCheckpointIO
from trainer.run.config import Config
from trainer.run.data import load_catalog, make_plan
from trainer.run.endings import check_not_stopped, told_in_its_folder
from trainer.run.fit import check_model, fit
from trainer.run.fitted import fitted
from trainer.run.messages import Failed
from trainer.run.metrics_log import MetricsLog
from trainer.run.placement import check_gpus
from trainer.run.profiling import profiles
from trainer.run.ranks_on_ray import fit_on_ray
from trainer.run.resuming import library_changes, longer_line, resume_point
from trainer.run.slide_sources import slide_sources
from trainer.run.step_batches import StepBatches
from trainer.run.stop_signals import Signals, terminated
from trainer.run.trackers import check_installed
from trainer.run.validation import held_out_stream


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended."""

    checkpoint: str
    start: int
    steps: int
    planned: int
    """the run's last step"""
    summary: list[str]


def train(
    config: Config,
    probe: ProbeKind | None = None,
    *,
    debug: bool = False,
    verbose: bool = False,
    force: bool = False,
    profile_steps: int = 0,
) -> TrainResult:
    """Runs a training to its last step, from the newest checkpoint of `run.out` if there is one.

    With `debug`, reader and trainer run in this process, without Ray, so that a debugger stops in both. With `force`,
    a run goes on by another recipe than it began with, or though it broke down. probe scores the teacher on
    `watch.knn_dataset`, where there is one. profile_steps: how many are traced, into the run's folder.

    Raises:
        TilestreamError: bad input, told in one line.
    """
    # Workers run in folders of their own, and whoever reports or replays the run may be in another one: there a
    # relative path would mean another place.
    labelled = config.watch.knn_dataset and storage.canonical(config.watch.knn_dataset)
    run, watch = replace(config.run, out=storage.canonical(config.run.out)), replace(config.watch, knn_dataset=labelled)
    places = {name: getattr(config.data, name) for name in ("catalog", "tiles")}
    data = replace(config.data, **{name: uri and storage.canonical(uri) for name, uri in places.items()})
    config, said = fitted(replace(config, run=run, watch=watch, data=data))
    for line in said:
        sys.stderr.write(f"train: {line}\n")
    catalog = load_catalog(config.data)
    out, options, steps = config.run.out, config.data.storage_options, config.train.steps
    check_not_stopped(config, force=force)
    start, resume = resume_point(config, config.identity(catalog), force=force)
    last = checkpoints.checkpoint_uri(out, steps)
    if start >= steps:
        return TrainResult(resume or last, start, start, steps, [f"{out} is trained to step {start} already"])
    if resume and (changed := library_changes(checkpoints.read_meta(resume, options))):
        sys.stderr.write(
            f"train: {resume} was trained with {', '.join(changed)}: pixels may differ a little from here on; "
            "install those versions to keep them\n"
        )
    if resume and (line := longer_line(checkpoints.read_config(resume, options), config, start)):
        sys.stderr.write(f"train: {line}\n")
    if config.train.gpu:
        fewer = "add --train.gpu false or lower train.ranks"
        check_gpus("train.gpu", 1 if debug else config.train.least_ranks, fewer, joins_ray=not debug)
    check_installed(config.run.loggers)
    # What the catalog can't give is told before anything starts.
    for line in make_plan(config.data, config.run.seed, catalog, config.held_out).left_out:
        sys.stderr.write(f"train: {line}\n")
    if config.held_out:
        held_out_stream(config, catalog)
    check_model(config, resumed=resume is not None)
    if config.watch.knn_dataset:
        if probe is None:
            raise ConfigError("watch.knn_dataset is set, so pass who scores it: trainer.evaluate.knn_watch.KnnWatch")
        probe.check(config)
    storage.write_bytes(storage.join(out, checkpoints.CONFIG), config.to_yaml().encode(), options)
    with told_in_its_folder(config), MetricsLog(config, start) as log:
        if debug:
            if config.train.ranks != 1:
                raise ConfigError(f"train.ranks is {config.train.ranks}; --debug runs one rank: add --train.ranks 1")
            stream = config.stream(catalog)
            tiles = stream.local_batches(start, steps)
            batches = StepBatches(tiles, start, config, lambda failures: log.add(Failed("", failures)))
            with terminated() as stop:
                signals = Signals(stop=stop.is_set, begin=stop.listen)
                to_storage = FolderCheckpointIO(config, config.identity(catalog), slide_sources(catalog, stream.plan))
                also = profiles(config, start, profile_steps, log.add)
                fit(config, to_storage, batches, resume, log.add, signals, probe=probe, also=also)
        else:
            fit_on_ray(config, catalog, log, probe, verbose=verbose, profile_steps=profile_steps)
    reached = checkpoints.steps_of(out, options)[-1]
    return TrainResult(checkpoints.checkpoint_uri(out, reached), start, reached, steps, log.summary)
