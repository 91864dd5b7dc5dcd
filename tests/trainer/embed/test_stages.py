"""Which tiles are embedded, of which slides, and what is said of the others; without Ray."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from streaming import Catalog
from streaming.catalog.inspection import Inspected, Rejected
from streaming.catalog.known import KnownSlides, known_slides, made_by
from streaming.errors import ConfigError
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from tests.conftest import write_catalog
from trainer.cli import main
from trainer.embed.files import find_embeddings
from trainer.embed.job import Job, keep_rejected
from trainer.embed.options import EmbedOptions
from trainer.embed.stages import PlaceTiles, ReadTiles


def placed(slides: KnownSlides, number: int, **options: Any) -> dict[str, Any]:
    return PlaceTiles(slides, EmbedOptions(size=16, **options).tiles)({"id": np.array([number])})


@pytest.mark.parametrize(("mpp", "bound", "served"), [(0.5, 2, False), (0.5, 40, True), (8.0, 2, True), (8.5, 1, True)])
@pytest.mark.parametrize("of_catalog", [False, True])
def test_a_slide_that_would_be_enlarged_too_much_is_rejected_with_both_numbers(
    bare: Path, tmp_path: Path, mpp: float, bound: float, served: bool, of_catalog: bool
) -> None:
    source, slide_mpp = (write_catalog(tmp_path, [bare], mpp=8.4), None) if of_catalog else (str(bare), 8.4)
    slides = known_slides([source], slide_mpp=slide_mpp)
    (reason, *_) = placed(slides, 0, mpp=mpp, max_upsampling=bound, min_tissue=0.01)["reason"]
    if served:
        assert reason == ""
    else:
        assert reason.startswith(
            "has 8.4 µm/px at best: for tiles of 0.5 it would be enlarged 16.8 times, over 2; take"
        )
        assert "--max-upsampling" in reason


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bare") / "bare.svs"
    write_slide(SyntheticSlide(width=2048, height=1536, patient=1, downsamples=(1, 4), write_mpp=False), path)
    return path


@pytest.mark.parametrize(
    "senseless", [{"mpp": math.inf}, {"mpp": math.nan}, {"size": 0}, {"readers": (2, 1)}, {"readers": (0, 0)}], ids=str
)
def test_options_that_make_no_sense_are_refused(senseless: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(senseless))):
        EmbedOptions(**senseless)


def test_of_a_catalogs_slide_its_mpp_and_its_tissue_count(
    bare: Path, slides: list[Path], tmp_path: Path, in_this_process: None
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    half = np.zeros((96, 128), np.uint8)
    half[:, :64] = 255
    Image.fromarray(half).save(masks / f"{slides[0].stem}.png")
    out = str(tmp_path / "catalog")
    command = ["catalog", str(slides[0]), str(bare), "--out", out, "--slide-mpp", "0.25", "--masks", str(masks)]
    assert main(command) == 0
    known, plain = known_slides([out]), known_slides([str(slides[0])])
    by_name = {Path(slide.info.uri).name: number for number, slide in enumerate(known.slides)}
    masked, whole = placed(known, by_name[slides[0].name], mpp=0.5), placed(plain, 0, mpp=0.5)
    assert masked["x"].max() < 1024 < whole["x"].max()
    assert len(masked["x"]) == 64 * 24  # the mask's half, of tiles of 32 level-0 px
    untold = placed(known, by_name["bare.svs"], mpp=0.5)
    assert untold["reason"][0] == ""
    read = ReadTiles(known, EmbedOptions(mpp=0.5, size=16).tiles)(untold)
    row = Catalog.load(out).row_of(str(bare))
    wanted = Catalog.load(out).open_slide(row).read_tile(int(untold["x"][0]), int(untold["y"][0]), 0.5, 16, tolerance=0)
    assert np.array_equal(read["tile"][0], wanted)


def test_a_slide_is_done_until_its_version_its_mpp_or_its_mask_are_others(
    bare: Path, slides: list[Path], tmp_path: Path
) -> None:
    job = Job("model", "digest", str(tmp_path / "out"), EmbedOptions(), {})
    (tmp_path / "out").mkdir()

    def done(slides: KnownSlides) -> list[int]:
        return sorted(job.done(slides))

    def embedded(slides: KnownSlides, number: int) -> None:
        made_by = known_made_by(slides, number)
        Path(job.file(slides.slides[number].info, made_by)).touch()

    sources = [str(slides[0]), str(bare)]
    first = known_slides(sources, slide_mpp=0.25)
    assert [Path(slide.info.uri).name for slide in first.slides] == ["bare.svs", "patient0.svs"]
    assert done(first) == []
    for number in range(2):
        embedded(first, number)
    assert done(first) == [0, 1]
    # Of the slide whose metadata tells its mpp another one that is given changes nothing.
    assert done(known_slides(sources, slide_mpp=0.5)) == [1]
    assert done(known_slides([str(slides[0])])) == [0]
    same = write_catalog(tmp_path / "same", [slides[0], bare], mpp=0.25)
    assert done(known_slides([same])) == [0, 1]
    other = write_catalog(tmp_path / "other", [slides[0], bare], mpp=0.3)
    assert done(known_slides([other])) == [1]


def known_made_by(slides: KnownSlides, number: int) -> str:
    found = slides.inspect(number)
    assert isinstance(found, Inspected)
    return made_by(found.row)


def test_the_list_of_rejected_slides_tells_the_present_state_and_lies_apart(tmp_path: Path) -> None:
    out = str(tmp_path)
    keep_rejected(out, [], set(), {})
    assert list(tmp_path.iterdir()) == []  # nothing is written of nothing
    keep_rejected(out, [Rejected("b.svs", 1, "v", "broken"), Rejected("a.svs", 1, "v", "broken")], {"c.svs"}, {})

    def reasons() -> list[tuple[str, str]]:
        rows = pq.read_table(tmp_path / ".rejected/rejected.parquet").to_pylist()
        return [(row["slide"], row["reason"]) for row in rows]

    assert reasons() == [("a.svs", "broken"), ("b.svs", "broken")]
    # The one was mended, the other is broken in another way; a third, which was not looked at, stays.
    keep_rejected(out, [Rejected("z.svs", 1, "v", "no tissue")], set(), {})
    keep_rejected(out, [Rejected("b.svs", 2, "w", "cut off")], {"a.svs"}, {})
    assert reasons() == [("b.svs", "cut off"), ("z.svs", "no tissue")]
    keep_rejected(out, [], {"b.svs", "z.svs"}, {})
    assert reasons() == []
    pq.write_table(pa.table({"embedding": [[1.0]]}), tmp_path / "a-1.parquet")
    assert find_embeddings([out]) == [str(tmp_path / "a-1.parquet")]
    assert pq.read_table(tmp_path).column_names == ["embedding"]
