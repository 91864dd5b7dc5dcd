"""The same tiles, tissue and specs on every kind of CPU: what is pinned here is what any machine of a fleet makes.

Libraries are told to take this CPU for a lesser one. Whoever changes a pin changes what every run is trained on.
"""

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
from numpy._core import _multiarray_umath as numpy_core

from streaming.vision import cv2
from tests.streaming import sameness

PINS = {
    "jpeg: a level's pixels": "dfb83342c93b55eb",
    "lzw: a level's pixels": "d02bbfb919aba083",
    "jpeg: decoded at half its size": "5b4f4ce6466ad230",
    "jpeg: own pixels at half their size": "0066e3fad40046ce",
    "lzw: own pixels at half their size": "a6afe18269f77652",
    "jpeg: area average": "9f29d812accf2cd9",
    "jpeg: area average over many": "390714b4d0c16d34",
    "jpeg: enlarged": "618ef4744ec18538",
    "tissue": "2e3bb04eead818e5",
    "specs: all tiles": "57c709db1bc04a0a",
    "specs: a part, without replacement": "73f97280e71255a1",
    "specs: windows": "ce515305659d10f8",
    "specs: own pixels": "506b922251488c90",
}
# JPEG 2000 with losses is floats, OpenJPEG's own affair: pinned for the version that is locked, on x86.
JPEG2000_PINS = {
    "jp2k-rgb: a level's pixels": "8dff4b2bc20cfb3a",
    "jp2k-ycbcr: a level's pixels": "fc5846f34b5f7556",
}
JPEG2000_VERSION = "2026.3.6"


@dataclass(frozen=True)
class Machine:
    """A CPU that the libraries are to believe in."""

    opencv: set[str]
    """what OpenCV has code for and may use"""
    numpy: tuple[str, ...] = ()
    """how the names of what NumPy has code for and may not use begin"""
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Of this process, with what hides parts of the CPU."""
        hidden = [name for name in _OPENCV if name not in self.opencv]
        # NumPy refuses names of what this CPU does not have anyway.
        names = [n for n in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__[n] and n.startswith(self.numpy)]
        others = {
            name: value for name, value in os.environ.items() if not name.startswith(("OPENCV_", "JSIMD_", "NPY_"))
        }
        disabled = {"OPENCV_CPU_DISABLE": ",".join(hidden), "NPY_DISABLE_CPU_FEATURES": " ".join(names)}
        return others | self.variables | {name: value for name, value in disabled.items() if value}


_OPENCV = {"SSE4.1", "SSE4.2", "AVX", "FP16", "AVX2", "FMA3", "AVX512-SKX"}
MACHINES = {
    "AVX-512": Machine(_OPENCV, variables={"OPENCV_IPP": "avx512"}),
    "AVX2": Machine(_OPENCV - {"AVX512-SKX"}, ("AVX512", "X86_V4"), {"OPENCV_IPP": "avx2", "JSIMD_FORCEAVX2": "1"}),
    "SSE4.2": Machine({"SSE4.1", "SSE4.2"}, ("",), {"OPENCV_IPP": "sse42", "JSIMD_FORCESSE2": "1"}),
    "none": Machine(set(), ("",), {"OPENCV_IPP": "disabled", "JSIMD_FORCENONE": "1"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sameness")
    sameness.write_slides(folder)
    return folder


def made_by(machine: Machine, folder: Path, *options: str) -> tuple[dict[str, str], set[str]]:
    """What a machine makes, and for what instructions OpenCV has chosen its code."""
    command = [sys.executable, sameness.__file__, str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=machine.environment())
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return said["digests"], set(re.findall(r"\*(\S+)(?<!\?)(?:\s|$)", said["features"]))


@pytest.mark.parametrize("name", MACHINES)
def test_tiles_tissue_and_specs_are_the_same_whatever_the_cpu(name: str, folder: Path) -> None:
    made, used = made_by(MACHINES[name], folder)
    assert used <= MACHINES[name].opencv or platform.machine() != "x86_64", "a part of the CPU that is not hidden"
    of_jpeg2000 = {key: made.pop(key) for key in JPEG2000_PINS}
    assert made == PINS
    if version("imagecodecs") == JPEG2000_VERSION and platform.machine() == "x86_64":
        assert of_jpeg2000 == JPEG2000_PINS


def test_with_ipp_they_would_not_be(folder: Path) -> None:
    if "Intel IPP:" not in cv2.getBuildInformation():
        pytest.skip("this build of OpenCV has no IPP")
    made, _ = made_by(MACHINES["AVX2"], folder, "--with-ipp")
    assert {name for name, digest in (PINS | JPEG2000_PINS).items() if made[name] != digest} == {"jpeg: enlarged"}
