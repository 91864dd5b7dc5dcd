"""What a consumer of the stream counts: tiles, failures, and where the time goes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from streaming.delivery.exported_metrics import STAGES
from streaming.reading.batch import Batch, counters_of

# A consumer that waits for less than this share of its time is what bounds the stream.
_HARDLY = 0.1
_KEPT_WAITS = 100_000


@dataclass
class TimeUse:
    """Where the time of readers and of a consumer goes."""

    totals: Counter[str] = field(default_factory=Counter[str])
    """sums of `streaming.counters.Counters` by name"""
    stored: deque[float] = field(default_factory=lambda: deque[float](maxlen=_KEPT_WAITS))
    """seconds from a batch's reading to its arrival here"""
    waits: deque[float] = field(default_factory=lambda: deque[float](maxlen=_KEPT_WAITS))
    """seconds that the consumer waited for each batch or step"""
    waited_s: float = 0.0
    """their sum"""

    def add(self, batch: Batch, now_s: float | None = None) -> None:
        """Counts what reading a batch took; now_s, seconds since the epoch, is when it arrived."""
        self.totals.update(counters_of(batch).as_dict())
        if now_s is not None:
            ended_s = float(batch["ended_at"].max())
            self.stored.append(max(0.0, now_s - ended_s))  # the clocks of two machines may differ

    def waited(self, seconds: float) -> None:
        """Counts a wait for a batch or a step."""
        self.waits.append(seconds)
        self.waited_s += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds of readers' threads by stage; `other` is what no stage counts."""
        stages = {stage: self.totals[f"{stage}_s"] for stage in STAGES}
        return {**stages, "other": max(0.0, self.totals["total_s"] - sum(stages.values()))}

    def shares(self) -> dict[str, float]:
        """Each stage's share of the readers' time; they sum to 1, or to 0 where nothing was read."""
        seconds = self.seconds()
        total = sum(seconds.values())
        return {stage: spent / total if total else 0.0 for stage, spent in seconds.items()}

    def numbers(self, wall_s: float) -> dict[str, float]:
        """The numbers for one row of metrics; wall_s is the time in which they were counted."""
        tiles = max(1.0, self.totals["tiles"])
        shares = {f"reader_{stage}_share": share for stage, share in self.shares().items()}
        return {
            **shares,
            "reader_ms_per_tile": self.totals["total_s"] / tiles * 1000,
            "fetch_bytes": float(self.totals["nbytes"]),
            "fetch_requests": float(self.totals["requests"]),
            "fetch_retries": float(self.totals["retries"]),
            "fetch_throttled": float(self.totals["throttled"]),
            "staging_hits": float(self.totals["staged_hits"]),
            "staging_misses": float(self.totals["staged_misses"]),
            "wait_share": self.waited_s / wall_s if wall_s > 0 else 0.0,
            **dict(zip(("wait_p50_s", "wait_p95_s", "wait_p99_s"), percentiles(self.waits), strict=True)),
        }

    def bottleneck(self, wall_s: float) -> str:
        """One sentence: what bounds the stream, and what to do; wall_s is how long the consumer ran."""
        shares, waiting = self.shares(), self.waited_s / wall_s if wall_s > 0 else 0.0
        if waiting < _HARDLY:
            return f"the consumer: it waits {waiting:.0%} of its time for tiles; more readers would not help"
        groups = {
            "storage": shares["fetch"] + shares["request"],
            "opening": shares["open"],
            "decoding": shares["decode"] + shares["assemble"] + shares["resample"],
            "filter": shares["filter"],
            "plan": shares["plan"],
            "other": shares["other"],
        }
        worst = max(groups, key=lambda group: groups[group])
        return self._remedy(worst, f"{groups[worst]:.0%} of reader time")

    def _remedy(self, group: str, of_time: str) -> str:
        """What to do about a group of stages that takes most of the readers' time."""
        match group:
            case "storage":
                # Of the requests under way, all are held back where the brake is what bounds the stream.
                if self.totals["held_s"] <= self.totals["fetch_s"]:
                    return f"storage: {of_time} is waiting for bytes; add readers or raise `requests_in_flight`"
                return (
                    f"storage: {of_time} is waiting for bytes, and it throttles ({self.totals['throttled']:,.0f} "
                    "requests turned down), so that the readers of a node ask more slowly together; spread the slides "
                    "over more prefixes, or have its limit raised"
                )
            case "opening":
                return (
                    f"opening slides: {of_time} ({self.totals['staged_misses']:,.0f} copies downloaded); it passes "
                    "once all are open; where slides are staged, draw in windows (`universe.window`, `--window`) or "
                    "raise `data.staging_gb` of a training"
                )
            case "decoding":
                return (
                    f"decoding: {of_time} is making pixels; add readers on more cores, or take mpp nearer the slides' "
                    "levels"
                )
            case "filter":
                return f"the HSV rule and other filters: {of_time}; add readers, or leave out a filter"
            case "plan":
                return f"the plan: {of_time} is drawing tiles; lower `min_tissue`, or take larger batches"
            case _:
                return f"Ray and Python: {of_time} is in no stage; give readers more cores, or take larger batches"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The closing table: stage, seconds, share of the readers' time, per tile."""
        tiles, shares = max(1.0, self.totals["tiles"]), self.shares()
        named = {"fetch": "fetch (wait)", "request": "request", "open": "open slides"}
        return [
            (named.get(stage, stage), f"{spent:,.1f} s", f"{shares[stage]:.0%}", f"{spent / tiles * 1000:.2f} ms")
            for stage, spent in self.seconds().items()
        ]

    def lines(self, wall_s: float) -> list[str]:
        """What stands below the table, the bottleneck last."""
        tiles, total = max(1.0, self.totals["tiles"]), self.totals
        lines = [
            f"storage: {total['requests']:,.0f} requests ({total['requests'] / tiles:.2f} a tile; "
            f"{total['retries']:,.0f} sent again, {total['throttled']:,.0f} of them throttled), "
            f"{total['nbytes'] / 1e6:,.1f} MB ({total['nbytes'] / tiles / 1000:.1f} KB a tile), "
            f"{total['index_nbytes'] / 1e6:,.1f} MB of them of the catalog itself"
        ]
        if total["staged_hits"] or total["staged_misses"]:
            lines.append(
                f"slides that are copied whole: {total['staged_misses']:,.0f} downloaded, {total['staged_hits']:,.0f} "
                "times found here"
            )
        if self.stored:
            lines.append(f"object store and queues: {_spread(self.stored)} from a reader to here")
        lines.append(f"wait for a batch: {_spread(self.waits)}; {self.waited_s / max(wall_s, 1e-9):.0%} of the time")
        return [*lines, f"bottleneck: {self.bottleneck(wall_s)}"]

    def print(self, wall_s: float, console: Console) -> None:
        """Writes the closing table: ruled on a terminal, plain lines else."""
        head = ("stage", "readers", "share", "a tile")
        if console.is_terminal:
            table = Table(*head)
            for column in table.columns[1:]:
                column.justify = "right"
            for row in self.rows():
                table.add_row(*row)
            console.print(table)
        else:
            for stage, *numbers in (head, *self.rows()):
                console.file.write(f"{stage:<14}" + "".join(f"{number:>12}" for number in numbers) + "\n")
        for line in self.lines(wall_s):
            console.file.write(line + "\n")


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The 50th, 95th and 99th percentile; zeros of nothing."""
    if not seconds:
        return 0.0, 0.0, 0.0
    p50, p95, p99 = np.percentile(np.array(seconds), [50, 95, 99]).tolist()
    return p50, p95, p99


def _spread(seconds: Sequence[float]) -> str:
    p50, p95, p99 = percentiles(seconds)
    return f"p50 {p50 * 1000:,.0f} ms, p95 {p95 * 1000:,.0f} ms, p99 {p99 * 1000:,.0f} ms"
