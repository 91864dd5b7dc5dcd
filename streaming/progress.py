"""Progress on stderr: a live line on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

_LOG_EVERY_S = 10.0
_TOGETHER_S = 0.5  # what came within them says nothing of a pace


def clock(seconds: float) -> str:
    """A time as `2:05`, from an hour on as `1:02:05`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class Pace:
    """How fast a count grows once the first of it has come: before that, readers and models start."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def at(self, done: float) -> float | None:
        """How many came each second since the first ones, where so many have come by now; None: not known yet."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done) if done else None
            return None
        since, before = self._first
        return (done - before) / (now - since) if done > before and now - since >= _TOGETHER_S else None


class _DetailColumn(TextColumn):
    """Text that is cut where the terminal ends; rich would squeeze count and unit just as much."""

    def render(self, task: Task) -> Text:
        """One line of the task's text."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class ProgressLine:
    """Counts towards a total (None: not known) and shows a line of text beside the count.

    Use as a context manager; what it shows last stays on the screen.
    """

    def __init__(self, what: str, unit: str, total: int | None = None) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._done, self._text, self._logged_at = 0.0, "", time.monotonic()
        self._pace = Pace()
        self._progress: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            bar = BarColumn(12, table_column=Column(no_wrap=True))
            count = MofNCompleteColumn(table_column=Column(no_wrap=True))
            left = TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True))
            detail = _DetailColumn("{task.fields[text]}", style="dim", table_column=Column())
            named = (TextColumn("{task.description}"), bar, count, TextColumn(unit))
            self._progress = Progress(*named, left, detail, console=console)

    def __enter__(self) -> ProgressLine:
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task(self._what, total=self._total, text="")
        return self

    def update(self, done: float, text: str = "") -> None:
        """Sets the count, of which parts of one make the time left more exact, and the text."""
        self._done, self._text = done, text
        pace = self._pace.at(done)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, text=text)
        elif time.monotonic() - self._logged_at >= _LOG_EVERY_S:
            self._log(self._left(pace))

    def _log(self, left: str = "") -> None:
        self._logged_at = time.monotonic()
        of_total = f"/{self._total:,}" if self._total is not None else ""
        parts = (f"{self._what}: {int(self._done):,}{of_total} {self._unit}", self._text, left)
        sys.stderr.write("  ".join(part for part in parts if part) + "\n")
        sys.stderr.flush()

    def _left(self, pace: float | None) -> str:
        """The time that the rest takes at the pace so far, as the live line has it."""
        if self._total is None or pace is None or self._done >= self._total:
            return ""
        return f"{clock((self._total - self._done) / pace)} left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif self._done:
            self._log()
