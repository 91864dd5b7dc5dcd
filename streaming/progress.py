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


def clock(seconds: float) -> str:
    """A time as `2:05`, from an hour on as `1:02:05`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


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
        self._first: tuple[float, float] | None = None
        """when something was done first, and what"""
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
        if self._first is None and done:
            self._first = time.monotonic(), done
        if self._progress is not None:
            self._progress.update(self._task, completed=done, text=text)
        elif time.monotonic() - self._logged_at >= _LOG_EVERY_S:
            self._log(self._left())

    def _log(self, left: str = "") -> None:
        self._logged_at = time.monotonic()
        of_total = f"/{self._total:,}" if self._total is not None else ""
        parts = (f"{self._what}: {int(self._done):,}{of_total} {self._unit}", self._text, left)
        sys.stderr.write("  ".join(part for part in parts if part) + "\n")
        sys.stderr.flush()

    def _left(self) -> str:
        """The time that the rest takes at the pace so far, as the live line has it."""
        if self._total is None or self._first is None or self._done >= self._total:
            return ""
        since, before = self._first
        pace = (self._done - before) / max(1e-9, time.monotonic() - since)
        return f"{clock((self._total - self._done) / pace)} left" if pace > 0 else ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif self._done:
            self._log()
