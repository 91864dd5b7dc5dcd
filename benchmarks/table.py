"""The table that benchmarks print, and the options that all have. Needs nothing but Python."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TURNS = 3


def memory_mib(field: str = "VmRSS") -> float:
    """Of this process, in MiB: resident memory, its most so far (`VmHWM`), or another field of /proc/self/status."""
    status = Path("/proc/self/status").read_text().split(f"{field}:")[1]
    return int(status.split()[0]) / 1024


@dataclass(frozen=True)
class Line:
    """One line of the table; ratio is ours to theirs, each turn's for itself where there were several."""

    what: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    must: str
    holds: bool
    lowest: float
    """of the turns' ratios"""
    highest: float
    extract_s: float | None = None
    """seconds of cutting 1,000 tiles beforehand, where theirs needs it"""
    stored_mb: float | None = None
    """MB that 1,000 such tiles take"""


def line(
    what: str,
    ours: float | Sequence[float],
    theirs: float | Sequence[float],
    unit: str,
    *,
    most: float = 0,
    least: float = 0,
    **extraction: float,
) -> Line:
    """A line whose ratio must be at most, or at least, something; of turns, side by side, the medians."""
    us, they = ([float(x) for x in (side if isinstance(side, Sequence) else [side])] for side in (ours, theirs))
    ratios = [a / b for a, b in zip(us, they, strict=True)]
    ratio = statistics.median(ratios)
    must = f"≤ {most}" if most else f"≥ {least}" if least else "–"
    return Line(
        what=what,
        ours=statistics.median(us),
        theirs=statistics.median(they),
        unit=unit,
        ratio=ratio,
        must=must,
        holds=ratio <= most if most else ratio >= least,
        lowest=min(ratios),
        highest=max(ratios),
        **extraction,
    )


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"tilestream bench {name}", description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--slides", type=int, default=2, help="slides that are made for it (2)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave out what must be installed first")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir(), "tilestream-bench"),
        help="where slides and peers are kept",
    )
    return parser


def machine() -> str:
    """What the numbers were measured on."""
    kind = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {kind}, Python {platform.python_version()}"


def report(lines: Sequence[Line], as_json: bool, turns: int = TURNS, **facts: str) -> int:
    """Prints the table; 1 where a ratio does not hold, else 0."""
    if as_json:
        print(json.dumps({"machine": machine(), **facts, "lines": [asdict(entry) for entry in lines]}))
        return 0 if all(entry.holds for entry in lines if entry.must != "–") else 1
    print("; ".join([machine(), *(f"{key}: {fact}" for key, fact in facts.items()), f"median of {turns} turns\n"]))
    cut = any(entry.extract_s is not None for entry in lines)
    more = f"{'cut s':>7} {'MB':>6}  " if cut else ""
    print(f"{'ours':>9} {'theirs':>9} {'':8} {'ratio':>6} {'of turns':>12}  {'must':7}      {more}what")
    for entry in lines:
        verdict = "" if entry.must == "–" else "yes" if entry.holds else "NO"
        if cut:
            more = f"{entry.extract_s:7.1f} {entry.stored_mb:6.1f}  " if entry.extract_s is not None else " " * 16
        spread = f"{entry.lowest:.3g} – {entry.highest:.3g}" if entry.lowest < entry.highest else ""
        print(
            f"{entry.ours:9.2f} {entry.theirs:9.2f} {entry.unit:8} {entry.ratio:6.3g} {spread:>12}  {entry.must:7} "
            f"{verdict:4} {more}{entry.what}"
        )
    if cut:
        print("\ncut s, MB: seconds and storage of cutting 1,000 tiles beforehand")
    return 0 if all(entry.holds for entry in lines if entry.must != "–") else 1
