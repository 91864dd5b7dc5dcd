"""Where a run goes on, and whether what it goes on with is still the same recipe."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from streaming.errors import CheckpointError
from streaming.slide.versions import pixel_libraries
from trainer.recipe.schedule import Schedules
from trainer.run import checkpoints
from trainer.run.config import Config, leaves, plain

# What no force can change: another model's weights don't fit, another batch's next index lies within a step.
_FIXED = ("model.", "train.batch", "augment.global_size", "loss.patch")


def recipe_changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """Fields of the recipe that differ, with both values: those that may be forced, and those that can't be."""
    was, becomes = _flat(plain(asdict(before))), _flat(plain(asdict(now)))
    # In float32, shards train as replicas do; in bfloat16 they round more: what goes from block to block, too.
    counts = () if now.train.precision == "32-true" else ("train.strategy",)
    free = tuple(f"{leaf.key}." for leaf in leaves() if leaf.is_free and leaf.key not in counts)
    changed = [key for key in becomes | was if was.get(key) != becomes.get(key) and not f"{key}.".startswith(free)]
    fixed = [key for key in changed if key.startswith(_FIXED) and key != "model.drop_path"]
    told = {key: f"{key} {was.get(key)} (now {becomes.get(key)})" for key in changed}
    return [told[key] for key in changed if key not in fixed], [told[key] for key in fixed]


def _flat(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def resume_point(config: Config, catalog: str, *, force: bool = False) -> tuple[int, str | None]:
    """The step to go on from and the checkpoint to load: the run's newest that is not damaged, if it has one.

    catalog is its fingerprint. A run that has ended may go on for more steps; with `force`, another recipe or catalog
    is taken as meant, too.

    Raises:
        CheckpointError: it is of another model, or was trained by another recipe, or on another catalog or batch, so
            that its next index would mean other tiles.
    """
    found = checkpoints.newest_good(config.run.out, config.data.storage_options)
    if found is None:
        return 0, None
    meta = checkpoints.read_meta(found, config.data.storage_options)
    before = checkpoints.read_config(found, config.data.storage_options)
    has_ended = meta.step >= before.train.steps < config.train.steps
    length = {"steps": before.train.steps, "flops": before.train.flops} if has_ended else {}
    changed, fixed = recipe_changes(before, replace(config, train=replace(config.train, **length)))
    if fixed:
        raise CheckpointError(
            f"{found}: does not fit the configuration: {', '.join(fixed)}; set it back or set another run.out"
        )
    if meta.catalog != catalog:
        changed.append(f"the content of the catalog, or of data.tiles, {meta.catalog} (now {catalog})")
    if changed and not force:
        raise CheckpointError(
            f"{found}: trained by another recipe: {', '.join(changed)}; set it back, set another run.out, "
            "or go on all the same with --force"
        )
    return meta.step, found


def longer_line(before: Config, now: Config, start: int) -> str | None:
    """What becomes of the schedules where a run goes on to more steps, or fewer, than it was started for."""
    if before.train.steps == now.train.steps:
        return None
    was, becomes = (Schedules(config.optim, config.train.steps, config.train.batch) for config in (before, now))
    last, first = was.at(start - 1), becomes.at(start)
    return (
        f"{before.train.steps:,} steps have become {now.train.steps:,}, and from step {start + 1:,} on schedules go "
        f"over {becomes.total_steps:,}: learning rate {last.lr:.3g} before, {first.lr:.3g} now, "
        f"weight decay {last.weight_decay:.3g} and {first.weight_decay:.3g}, "
        f"momentum {last.momentum:.6g} and {first.momentum:.6g}"
    )


def library_changes(meta: checkpoints.Meta) -> list[str]:
    """The libraries that make pixels here in other versions than when a checkpoint was written, with both."""
    now = pixel_libraries()
    return [
        f"{name} {version} (now {now.get(name, 'none')})"
        for name, version in meta.libraries.items()
        if now.get(name) != version
    ]
