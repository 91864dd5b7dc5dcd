"""What a consumer of the stream counts: tiles and failures."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field

from streaming.errors import StreamError
from streaming.reader import Batch


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

    def add(self, batch: Batch) -> None:
        """Counts a batch of the reader's columns.

        Raises:
            StreamError: too many tiles failed; names the slide that failed most and why.
        """
        self.tiles += len(batch["index"])
        self.filtered += int(batch["filtered"].sum())
        for text in batch["failures"]:
            for slide, reason in json.loads(text) if text else []:
                self.failed += 1
                self.by_slide[slide] += 1
                self.reasons[slide] = reason
        expected = self.max_share * max(self.tiles, 100)
        if self.failed > expected + 5 * math.sqrt(expected):
            worst = self.by_slide.most_common(1)[0][0]
            raise StreamError(
                f"{self.failed:,} tiles failed while {self.tiles:,} were read, more than the allowed share of "
                f"{self.max_share:.1%}; most of {worst} ({self.reasons[worst]}); take bad slides out of the catalog or "
                "raise data.max_failed_share"
            )

    def summary(self) -> list[str]:
        """Lines for the end of a run: one for the filter where it turned tiles down, one a failing slide."""
        lines = [f"{self.filtered:,} tiles turned down by the HSV rule and replaced"] if self.filtered else []
        for slide, count in self.by_slide.most_common(10):
            lines.append(f"{count:,} tiles replaced: {slide}: {self.reasons[slide]}")
        if len(self.by_slide) > 10:
            lines.append(f"… and {len(self.by_slide) - 10} more slides with failing tiles")
        return lines
