"""Filters of a tile's pixels beside the HSV rule: blur, pens, white, users' own; and other rules for other stains."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, cast

import numpy as np

from streaming.catalog.pen import pen_pixels
from streaming.errors import ConfigError, StreamError
from streaming.plan import TilePlan
from streaming.reading.hsv_rule import HsvRule
from streaming.slide.resample import Pixels
from streaming.vision import cv2

# As bright as glass and paper are in all three colours.
_WHITE = 220

HSV = "the HSV rule (data.hsv_rule)"


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Further filters of a tile's pixels; one that they turn down is replaced, as the HSV rule has it."""

    blur: float | None = None
    """least variance of the Laplacian of a tile's grey values, below which it is out of focus; none: not asked"""
    pen: float | None = None
    """most share of a tile's pixels in the colours of marker pens; none: not asked"""
    white: float | None = None
    """most share of a tile's pixels as bright as glass (220 and more of each colour); none: not asked"""
    functions: tuple[str, ...] = ()
    """your own filters as MODULE:NAME; each takes a tile, uint8 (size, size, 3), and says whether it stays"""
    by_stain: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """what else holds on slides of a stain, by value of the catalog's column `stain`: hsv_rule and the fields above"""

    def __post_init__(self) -> None:
        for name in ("pen", "white"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(f"filters.{name} is {share}; it is a share from 0 to 1")
        if self.blur is not None and not self.blur >= 0:
            raise ConfigError(f"filters.blur is {self.blur}; it is a variance, 0 or more")
        for path in self.functions:
            if not all(part.isidentifier() for part in path.replace(":", ".", 1).split(".")) or path.count(":") != 1:
                raise ConfigError(f"filters.functions has {path!r}; it is MODULE:NAME, such as my_filters:is_sharp")
        for stain in self.by_stain:
            self.of_stain(stain, HsvRule())

    def of_stain(self, stain: str | None, hsv_rule: HsvRule) -> tuple[HsvRule, Filters]:
        """The rules that hold on slides of a stain.

        Raises:
            ConfigError: what `by_stain` says of it are no rules.
        """
        given: Mapping[str, Any] = {} if stain is None else self.by_stain.get(stain, {})
        known = {"hsv_rule", *(entry.name for entry in fields(self))} - {"by_stain"}
        if odd := sorted(set(given) - known):
            raise ConfigError(f"filters.by_stain.{stain} has {odd[0]!r}; it takes {', '.join(sorted(known))}")
        try:
            of_hsv = {name: tuple(v) if isinstance(v, list) else v for name, v in given.get("hsv_rule", {}).items()}
            changes = {name: value for name, value in given.items() if name != "hsv_rule"}
            if "functions" in changes:
                changes["functions"] = tuple(changes["functions"])
            return replace(hsv_rule, **of_hsv), replace(self, by_stain={}, **changes)
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"filters.by_stain.{stain}: {error}") from error


Accepts = Callable[[Pixels], bool]


class TileRules:
    """All filters of a run, by the stain of a plan's slides.

    Raises:
        ConfigError: a function is not found, or stains have rules of which the catalog knows nothing.
    """

    def __init__(self, plan: TilePlan, hsv_rule: HsvRule, filters: Filters) -> None:
        if unknown := sorted(set(filters.by_stain) - set(plan.stains)):
            have = ", ".join(filter(None, plan.stains)) or "none"
            raise ConfigError(
                f"filters.by_stain has rules for {unknown[0]!r}, but no slide of the catalog has that in its column "
                f"`stain`; it has: {have}"
            )
        self._stain = plan.stain
        self._rules = [_named(*filters.of_stain(stain, hsv_rule)) for stain in plan.stains]

    def turns_down(self, tile: Pixels, slide: int) -> str | None:
        """The name of the first rule that turns a tile of a slide down (row of the catalog); None: it stays.

        Raises:
            StreamError: a user's function fails, or answers neither yes nor no.
        """
        return next((name for name, accepts in self._rules[self._stain[slide]] if not accepts(tile)), None)


def _named(hsv_rule: HsvRule, filters: Filters) -> Sequence[tuple[str, Accepts]]:
    rules: list[tuple[str, Accepts]] = []
    if hsv_rule.min_share:
        rules.append((HSV, hsv_rule.accepts))
    if filters.white is not None:
        rules.append(("white (data.filters.white)", partial(_is_coloured, filters.white)))
    if filters.pen is not None:
        rules.append(("pen (data.filters.pen)", partial(_has_no_pen, filters.pen)))
    if filters.blur is not None:
        rules.append(("blur (data.filters.blur)", partial(_is_sharp, filters.blur)))
    return [*rules, *((path, partial(_asked, path, _imported(path))) for path in filters.functions)]


def _is_coloured(most: float, tile: Pixels) -> bool:
    white = cast(Any, cv2).inRange(tile, (_WHITE,) * 3, (255,) * 3)
    return cv2.countNonZero(white) <= most * white.size


def _has_no_pen(most: float, tile: Pixels) -> bool:
    found = pen_pixels(cast(Pixels, cv2.cvtColor(tile, cv2.COLOR_RGB2HSV)))
    return cv2.countNonZero(found) <= most * found.size


def _is_sharp(least: float, tile: Pixels) -> bool:
    return focus(tile) >= least


def focus(tile: Pixels) -> float:
    """Variance of the Laplacian (3 × 3) of a tile's grey values of 8 bits; low where nothing is sharp.

    In whole numbers up to the last division, so the same on every machine. Source: Pech-Pacheco et al., ICPR 2000.
    """
    edges = cv2.Laplacian(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY), cv2.CV_16S).astype(np.int64)
    total, squares = int(edges.sum()), int((edges * edges).sum())
    return (squares * edges.size - total * total) / edges.size**2


def _imported(path: str) -> Accepts:
    module, name = path.split(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"filters.functions has {path}, which can't be imported ({error}); all machines of the run must find it: "
            "install its package there, or set PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"filters.functions has {path}, which is no function")
    return cast(Accepts, found)


def _asked(path: str, accepts: Accepts, tile: Pixels) -> bool:
    shown = tile.view()
    shown.flags.writeable = False
    try:
        answer: Any = accepts(shown)
    except Exception as error:
        raise StreamError(f"the filter {path} failed: {type(error).__name__}: {error}; mend it") from error
    if not isinstance(answer, bool | np.bool_):
        raise StreamError(f"the filter {path} answered {answer!r}; it says True (the tile stays) or False")
    return bool(answer)
