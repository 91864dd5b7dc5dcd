import json
from pathlib import Path

import openslide
import pytest

from benchmarks.mission import mission_slides
from benchmarks.reader import main
from benchmarks.table import line

SMALL = ["--side", "2560", "--tiles", "2", "--steps", "2", "--turns", "1", "--no-peers", "--json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def lines(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, float | str]]:
    main([*arguments, *SMALL])
    (printed,) = (text for text in capfd.readouterr().out.splitlines() if text.startswith("{"))
    return {entry["what"]: entry for entry in json.loads(printed)["lines"]}


def test_a_line_has_the_median_of_the_ratios_of_its_turns() -> None:
    found = line("speed", [2.0, 9.0, 4.0], [1.0, 3.0, 4.0], "ms", most=2.5)
    assert (found.ratio, found.lowest, found.highest) == (2.0, 1.0, 3.0)
    assert (found.ours, found.theirs) == (4.0, 3.0)
    assert found.holds
    assert not line("speed", [2.0, 9.0, 4.0], [1.0, 3.0, 4.0], "ms", least=2.5).holds


@pytest.mark.slow
def test_the_mix_is_as_scanners_write_it(folder: Path) -> None:
    made = mission_slides(folder, 2560)
    assert sum(each.is_jpeg for each in made) == 7
    assert len(made) == 10
    for each in made:
        with openslide.OpenSlide(each.path) as slide:
            assert slide.properties["aperio.MPP"] == f"{each.slide.mpp:.4f}"
            side = str(each.slide.block_px)
            assert slide.properties["openslide.level[0].tile-width"] == side
            assert ("J2K" in slide.properties["openslide.comment"]) is not each.is_jpeg


@pytest.mark.slow
def test_cpu_lines_have_all_that_must_hold(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = lines(capfd, "--parts", "cpu", "--folder", str(folder))
    musts = [entry["must"] for entry in found.values() if entry["must"] != "–"]
    assert sorted(musts) == ["≤ 0.06", "≤ 0.12", "≤ 0.25", "≤ 0.3", "≤ 0.5", "≤ 0.85"]
    assert all(entry["ours"] > 0 and entry["theirs"] > 0 for entry in found.values())


@pytest.mark.long
def test_streams_from_storage_with_latency(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = lines(capfd, "--parts", "mix", "distant", "--latency-ms", "20", "--folder", str(folder))
    assert [entry["must"] for entry in found.values()] == ["≥ 2.8", "≥ 0.65", "≥ 5.0", "–", "≥ 0.9"]
