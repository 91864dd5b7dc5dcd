"""Tiles that could not be read and were replaced: what a run allows of them, and their log, `failures.parquet`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa

from streaming import storage
from streaming.errors import ConfigError, StreamError
from streaming.reading.batch import Batch, Failure, failed_slides
from streaming.reading.filters import HSV

FAILURES = "failures.parquet"
# The share of tiles that could not be read past which a run stops.
MAX_FAILED_SHARE = 0.01
SCHEMA = pa.schema(
    [("slide", pa.string()), ("reason", pa.string()), ("count", pa.int64()), ("first_index", pa.int64())]
)
# A slide may give another reason for each of its blocks; past so many they are counted together.
_MAX_REASONS = 20
_OTHER = "other reasons"


class _Counts:
    """Failures by slide and reason: how many, and the first index."""

    def __init__(self) -> None:
        self._reasons: dict[str, dict[str, tuple[int, int]]] = {}

    def add(self, slide: str, reason: str, count: int, first: int) -> None:
        reasons = self._reasons.setdefault(slide, {})
        if reason not in reasons and len(reasons) >= _MAX_REASONS:
            reason = _OTHER
        before, earliest = reasons.get(reason, (0, first))
        reasons[reason] = before + count, min(earliest, first)

    def rows(self) -> list[tuple[str, str, int, int]]:
        return [
            (slide, reason, count, first)
            for slide, reasons in sorted(self._reasons.items())
            for reason, (count, first) in sorted(reasons.items())
        ]


class FailureLog:
    """Failures of a run, each counted once however often the run goes back to a checkpoint.

    What came since the last checkpoint is counted apart (a slide may then have two rows of the same reason), so that it
    can be taken back: its first index lies behind the checkpoint's, that of all else before it. As a context manager it
    is saved at the end, also where an error is the end.
    """

    def __init__(self, uri: str, options: storage.StorageOptions | None = None, next_index: int = 0) -> None:
        """Goes on with the log of a run that goes on at that index.

        Raises:
            StorageError: there is one, but it can't be read.
        """
        self._uri, self._options = storage.join(uri, FAILURES), options
        self._settled, self._recent = _Counts(), _Counts()
        if next_index and storage.exists(self._uri, options):
            for row in storage.read_table(self._uri, options).to_pylist():
                if row["first_index"] < next_index:
                    self._settled.add(row["slide"], row["reason"], row["count"], row["first_index"])

    def add(self, failures: Iterable[Failure]) -> None:
        """Counts failures."""
        for failure in failures:
            self._recent.add(failure.slide, failure.reason, 1, failure.index)

    def settle(self) -> None:
        """At a checkpoint: nothing before it will come again."""
        for row in self._recent.rows():
            self._settled.add(*row)
        self._recent = _Counts()

    def rewind(self) -> None:
        """Back to the last checkpoint: what came since will come again."""
        self._recent = _Counts()

    def table(self) -> pa.Table:
        """A row a slide and reason: `slide`, `reason`, `count`, `first_index`."""
        rows = self._settled.rows() + self._recent.rows()
        return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)

    def __enter__(self) -> FailureLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.save()

    def save(self) -> None:
        """Writes the log, whole or not at all; where no tile failed there is none.

        Raises:
            StorageError: it can't be written.
        """
        table = self.table()
        if table.num_rows:
            storage.write_table(self._uri, table, self._options)


@dataclass
class FailureBudget:
    """Counts replaced tiles and stops the run when more than the allowed share could not be read.

    A run is stopped when the count is past what chance explains at the allowed share: share·n + 5·√(share·n), five
    standard deviations of a Poisson count, n being at least 100 tiles; so a single bad tile in the first batch stops
    nothing, and one slide in four does within a few batches.
    """

    max_share: float
    tiles: int = 0
    filtered: int = 0
    failed: int = 0
    by_slide: Counter[str] = field(default_factory=Counter[str])
    reasons: dict[str, str] = field(default_factory=dict[str, str])
    by_rule: Counter[str] = field(default_factory=Counter[str])

    def __post_init__(self) -> None:
        if not 0 <= self.max_share <= 1:
            raise ConfigError(f"the share of failed tiles is {self.max_share}; it is a share from 0 to 1")

    def add(self, batch: Batch) -> None:
        """Counts a batch of the reader's columns.

        Raises:
            StreamError: too many tiles failed; names the slide that failed most and why.
        """
        self.tiles += len(batch["index"])
        self.filtered += int(batch["filtered"].sum())
        for names in batch["turned_down"]:
            self.by_rule.update(names)
        for failure in failed_slides(batch):
            self.failed += 1
            self.by_slide[failure.slide] += 1
            self.reasons[failure.slide] = failure.reason
        expected = self.max_share * max(self.tiles, 100)
        if self.failed > expected + 5 * math.sqrt(expected):
            worst = self.by_slide.most_common(1)[0][0]
            raise StreamError(
                f"{self.failed:,} tiles failed while {self.tiles:,} were read, more than the allowed share of "
                f"{self.max_share:.1%}; most of {worst} ({self.reasons[worst]}); take bad slides out of the catalog or "
                "raise data.max_failed_share (--max-failed-share)"
            )

    def summary(self) -> list[str]:
        """Lines for the end of a run: one for each filter that turned tiles down, one a failing slide."""
        looked_at = self.tiles + self.filtered
        lines = list[str]()
        for rule, num in self.by_rule.most_common():
            usual = "; up to a tenth is usual" if rule == HSV else ""
            of_tiles = f"{num:,} of {looked_at:,} tiles ({num / looked_at:.0%})"
            lines.append(f"{of_tiles} turned down by {rule} and replaced{usual}")
        for slide, count in self.by_slide.most_common(10):
            lines.append(f"{count:,} tiles replaced: {slide}: {self.reasons[slide]}")
        if len(self.by_slide) > 10:
            lines.append(f"… and {len(self.by_slide) - 10} more slides with failing tiles")
        return lines
