"""µm/px as scanners and exports write it: numbers, units, and what of them can be a microscope's.

OpenSlide 4.0.1's rules where it has some, so that a slide has the same mpp in both.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from streaming.errors import ConfigError, SlideError

# µm/px outside this is a default or a unit mix-up in the metadata (72 dpi reads as 352 µm/px), not a microscope.
_PLAUSIBLE_MPP = (0.02, 20.0)
MPP_RANGE = f"a number from {_PLAUSIBLE_MPP[0]} to {_PLAUSIBLE_MPP[1]:.0f}"
"""what is said where other is given"""
NO_MPP, ODD_MPP = "no mpp in its metadata", "its metadata says "
"""what a slide lacks, or that its µm/px can't be; the beginning of `why_no_mpp`"""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)

# Signs and names of lengths that a pixel can have: OME's UnitsLength, and how others write the same.
_INCH_UM = 25_400.0
_LENGTHS_UM = {
    ("µm", "um", "µ", "micron", "micrometer", "micrometre"): 1.0,
    # UTF-8 that was read as Latin-1, a first letter that was lost on the way, or escaped.
    ("Âµm", "Î¼m", "\ufffdm", "\ufffd\ufffdm", "?m", r"\u00b5m", r"\u03bcm"): 1.0,
    ("m", "meter", "metre"): 1e6,
    ("dm", "decimeter", "decimetre"): 1e5,
    ("cm", "centimeter", "centimetre"): 1e4,
    ("mm", "millimeter", "millimetre"): 1e3,
    ("nm", "nanometer", "nanometre"): 1e-3,
    ("pm", "picometer", "picometre"): 1e-6,
    ("Å", "angstrom", "ångström"): 1e-4,
    ("in", "inch", "inches"): _INCH_UM,
    ("thou",): _INCH_UM / 1000,
    ("pt",): _INCH_UM / 72,
}
_TIFF_UM = {2: _INCH_UM, 3: 10_000.0}
_TIFF_DEFAULT_UNIT = 2


def number(text: str) -> float | None:
    """A number as OpenSlide reads it: a comma stands for the point, nothing else is beside it; None: it is none."""
    text = text.strip().replace(",", ".")
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def um_of(unit: str) -> float | None:
    """µm of a unit of length, by its sign or name; None: it is none, as OME's `pixel` and `reference frame`."""
    name = _as_one(unit).rstrip(".")
    return _UM.get(name) or _UM.get(name.removesuffix("s"))


def _as_one(unit: str) -> str:
    """The same for the micro sign and the Greek mu, the Ångström sign and the letter, capitals and small letters."""
    return unicodedata.normalize("NFKC", unit).strip().casefold()


_UM = {_as_one(name): um for names, um in _LENGTHS_UM.items() for name in names}


def tiff_mpp(per_unit: Sequence[tuple[int, int] | None], unit: int | None) -> tuple[float, ...]:
    """µm/px by a TIFF's XResolution and YResolution, pixels in a ResolutionUnit; empty unless it has both, and a unit.

    Without a ResolutionUnit it is inches, by TIFF 6.0; where that says that there is none, the two tell a ratio only.
    """
    um = _TIFF_UM.get(_TIFF_DEFAULT_UNIT if unit is None else unit)
    if um is None or not all(value and value[0] and value[1] for value in per_unit):
        return ()
    return tuple(um * value[1] / value[0] for value in per_unit if value)


def is_plausible_mpp(value: float) -> bool:
    """Whether so many µm/px can be a microscope's."""
    return _PLAUSIBLE_MPP[0] <= value <= _PLAUSIBLE_MPP[1]


def check_given_mpp(what: str, value: float | None) -> None:
    """Refuses what a user gives for a slide's µm/px and no microscope has; `what` is the option.

    Raises:
        ConfigError: it is out of bounds.
    """
    if value is not None and not is_plausible_mpp(value):
        raise ConfigError(f"{what} {value}; it is µm per pixel, {MPP_RANGE}")


def plausible_mpp(uri: str, told: Sequence[float]) -> float | None:
    """The µm/px that metadata tell for the axes, as one number; None where they can't be a microscope's.

    Raises:
        SlideError: the pixels are not square.
    """
    if not told or not all(map(is_plausible_mpp, told)):
        return None
    if max(told) > 1.05 * min(told):
        raise SlideError(f"{uri}: pixels of {told[0]:.4g} × {told[1]:.4g} µm are not square; resample the slide")
    return sum(told) / len(told)


def why_no_mpp(told: Sequence[float]) -> str:
    """Why there is no µm/px where metadata tell such values for the axes."""
    if not told:
        return NO_MPP
    values = " × ".join(f"{value:.4g}" for value in dict.fromkeys(told))
    return f"{ODD_MPP}{values} µm/px, which is no microscope's"
