"""The metrics that readers and ranks export through Ray, which prefixes their names with `ray_`: see `METRICS`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from streaming.reading.batch import Batch, counters_of, failed_slides


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: a counter, a gauge, or a histogram where it has bounds."""

    name: str
    what: str
    tag: str | None = None
    bounds: tuple[float, ...] = ()
    gauge: bool = False


METRICS = {
    entry.name: entry
    for entry in (
        Metric(name="tilestream_tiles_total", what="tiles that readers handed out"),
        Metric(name="tilestream_tiles_replaced_total", what="tiles replaced: failed, or filtered", tag="reason"),
        Metric(name="tilestream_fetch_requests_total", what="byte ranges asked for"),
        Metric(name="tilestream_fetch_retries_total", what="times that one was sent again"),
        Metric(name="tilestream_fetch_throttled_total", what="times of these because the storage throttled"),
        Metric(name="tilestream_fetch_held_seconds_total", what="seconds that requests were held back since it did"),
        Metric(name="tilestream_fetch_bytes_total", what="bytes of those ranges"),
        Metric(name="tilestream_stage_seconds_total", what="seconds of readers' threads by stage", tag="stage"),
        Metric(name="tilestream_blocks_total", what="compressed blocks decoded"),
        Metric(name="tilestream_staging_hits_total", what="copies of slides found on local disk"),
        Metric(name="tilestream_staging_misses_total", what="copies of slides that had to be downloaded"),
        Metric(name="tilestream_step", what="optimiser step that was logged last", gauge=True),
        Metric(name="tilestream_loss", what="loss of that step", gauge=True),
        Metric(name="tilestream_validation_loss", what="last loss on patients that are held out", gauge=True),
        Metric(name="tilestream_batches_total", what="micro-batches that ranks took"),
        Metric(
            name="tilestream_batch_wait_seconds",
            what="seconds that a rank waited for a micro-batch",
            bounds=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
        ),
    )
}

# The stages of `streaming.counters.Counters`, in the order of a tile's way.
STAGES = ("plan", "open", "request", "fetch", "decode", "assemble", "resample", "filter")
_COUNTS = {
    "tiles": "tilestream_tiles_total",
    "requests": "tilestream_fetch_requests_total",
    "retries": "tilestream_fetch_retries_total",
    "throttled": "tilestream_fetch_throttled_total",
    "held_s": "tilestream_fetch_held_seconds_total",
    "nbytes": "tilestream_fetch_bytes_total",
    "blocks": "tilestream_blocks_total",
    "staged_hits": "tilestream_staging_hits_total",
    "staged_misses": "tilestream_staging_misses_total",
}


@cache
def _exported(name: str) -> Any:
    """Ray's object for a metric, one a process."""
    from ray.util.metrics import Counter, Gauge, Histogram

    metric = METRICS[name]
    tags = (metric.tag,) if metric.tag else ()
    if metric.bounds:
        return Histogram(name, metric.what, boundaries=list(metric.bounds), tag_keys=tags)
    return (Gauge if metric.gauge else Counter)(name, metric.what, tag_keys=tags)


def _count(name: str, value: float, tag: str | None = None) -> None:
    if value > 0:
        key = METRICS[name].tag
        _exported(name).inc(value, tags={key: tag} if key and tag else None)


def export_read(batch: Batch) -> None:
    """Counts a batch that was read, in its reader's process."""
    taken = counters_of(batch).as_dict()
    for key, name in _COUNTS.items():
        _count(name, taken[key])
    for stage in STAGES:
        _count("tilestream_stage_seconds_total", taken[f"{stage}_s"], stage)
    other = taken["total_s"] - sum(taken[f"{stage}_s"] for stage in STAGES)
    _count("tilestream_stage_seconds_total", other, "other")
    _count("tilestream_tiles_replaced_total", float(batch["filtered"].sum()), "filtered")
    _count("tilestream_tiles_replaced_total", len(failed_slides(batch)), "failed")


def export_wait(seconds: float) -> None:
    """Counts a micro-batch that a rank took, and how long it waited for it, in the rank's process."""
    _count("tilestream_batches_total", 1)
    _exported("tilestream_batch_wait_seconds").observe(seconds)


def export_step(step: float, loss: float, validation_loss: float | None = None) -> None:
    """Shows how far a training is, in the process of rank 0."""
    if validation_loss is not None:
        _exported("tilestream_validation_loss").set(validation_loss)
    _exported("tilestream_step").set(step)
    _exported("tilestream_loss").set(loss)
