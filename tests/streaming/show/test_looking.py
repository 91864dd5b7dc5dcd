"""What one looks at before anything is trained: the page of a catalog, the tiles of a step."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import openslide
import pyarrow as pa
import pytest
from PIL import Image

from streaming.catalog import Catalog, schema
from streaming.plan import TilePlan
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.show.pictures import mosaic, with_tissue, write_picture
from streaming.show.preview import write_preview
from streaming.storage import write_table
from tests.conftest import write_catalog
from trainer.cli import main


class Page(HTMLParser):
    """Addresses that a page loads, its text, and its pictures by their alternative text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.loads, self.text, self.pictures = list[str](), "", dict[str, Image.Image]()
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        source = found.get("src") or found.get("href") or ""
        if source.startswith("data:image/jpeg;base64,"):
            content = base64.b64decode(source.partition(",")[2])
            self.pictures[str(found["alt"])] = Image.open(io.BytesIO(content))
        elif source:
            self.loads.append(source)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_preview_shows_slides_with_their_tissue_and_rejected_ones_with_the_reason(
    slides: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_catalog(tmp_path / "catalog", slides[:2])
    blank, odd = tmp_path / "blank<b>.svs", "s3://gone/x.svs"
    blank.symlink_to(slides[2])
    reasons = {str(blank): "no tissue found", odd: "not a slide that <OpenSlide> knows"}
    rows = [{"slide": slide, "size": 1, "version": "v", "reason": reason} for slide, reason in reasons.items()]
    write_table(f"{out}/rejected.parquet", pa.Table.from_pylist(rows, schema=schema.REJECTED_SCHEMA))
    skipped = {"file": ["a.vsi", "b.vsi"], "reason": [".vsi", ".vsi"]}
    write_table(f"{out}/skipped.parquet", pa.table(skipped, schema=schema.SKIPPED_SCHEMA))
    assert main(["catalog", "--out", out, "--preview"]) == 0
    assert capsys.readouterr().out == f"{out}/preview.html: 2 slides to look at\n"
    page = Page(Path(out, "preview.html").read_text())
    assert not page.loads  # it opens without a network
    assert set(page.pictures) == {"patient0.svs", "patient1.svs", "blank<b>.svs"}
    assert {image.size for image in page.pictures.values()} == {(360, 270)}
    for told in ("2 slides", "2 .vsi", "2 of 2 rejected", *reasons.values(), "0.25 µm/px (by metadata)"):
        assert told in page.text
    # OpenSlide's thumbnail, greener where the tissue is.
    with openslide.OpenSlide(slides[0]) as opened:
        plain = np.asarray(opened.get_thumbnail((360, 270))).astype(float)
    changed = np.asarray(page.pictures["patient0.svs"]) - plain
    inside = np.kron(_about(out)[1].fraction >= 102, np.ones((45, 45), bool))
    greener = changed[..., 1] - changed[..., 0]
    assert greener[inside].mean() > 5 > 1 > abs(greener[~inside].mean())


def _about(out: str) -> tuple:
    catalog = Catalog.load(out)
    return catalog[0], catalog.tissue_grid(0)


def test_tinted_are_the_cells_with_enough_tissue(catalog: str) -> None:
    row, tissue = _about(catalog)
    image = np.full((600, 800, 3), 200, np.uint8)  # 100 px a cell of 256 level-0 px
    tinted = (with_tissue(image, row, tissue, 0.4) != 200).any(axis=2)
    assert (tinted.reshape(6, 100, 8, 100).all(axis=(1, 3)) == (tissue.fraction >= 102)).all()
    assert tinted.mean() == pytest.approx((tissue.fraction >= 102).mean())


def test_cells_of_a_pixel_are_tinted_without_lines_that_would_hide_the_slide(catalog: str) -> None:
    row, tissue = _about(catalog)
    image = np.full((30, 40, 3), 200, np.uint8)  # 5 px a cell
    tinted = with_tissue(image, row, tissue, 0.4)
    assert (tinted != 200).any()
    assert len(np.unique(tinted[(tinted != 200).any(axis=2)], axis=0)) == 1


def test_a_slide_that_is_gone_is_told_on_the_page(slides: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(slides[0].read_bytes())
    out = write_catalog(tmp_path / "catalog", [tmp_path / "a.svs", slides[1]])
    (tmp_path / "a.svs").unlink()
    target, num = write_preview(out)
    page = Page(Path(target).read_text())
    assert (num, set(page.pictures)) == (2, {"patient1.svs"})
    assert f"{tmp_path}/a.svs: not found" in page.text


def test_sources_or_a_preview_must_be_asked_for(catalog: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalog", "--out", catalog]) == 2
    assert "no SLIDES; name files, folders" in capsys.readouterr().err


@pytest.mark.slow
def test_the_mosaic_is_of_the_first_step_s_tiles(catalog: str, tmp_path: Path) -> None:
    out = tmp_path / "tiles.png"
    options = ["--steps", "3:5", "--batch", "6", "--ranks", "2", "--size", "128", "--mpp", "0.5"]
    assert main(["stream", catalog, *options, "--mosaic", str(out)]) == 0
    loaded = Catalog.load(catalog)
    reader = TileReader(TilePlan(loaded, mpp={0.5: 1}, size=128), loaded, ReaderOptions())
    tiles = reader({"index": np.arange(18, 24)})["tile"]
    shown = np.asarray(Image.open(out))
    assert shown.shape == (2 * 131 - 3, 3 * 131 - 3, 3)
    for i, tile in enumerate(tiles):
        top, left = i // 3 * 131, i % 3 * 131
        assert (shown[top : top + 128, left : left + 128] == tile).all()


@pytest.mark.parametrize(
    ("extra", "told"), [(["--mosaic", "x.gif"], ".png, .jpg"), (["--mosaic", "x.png", "--dry-run"], "dry run")]
)
def test_a_mosaic_that_can_t_be_written_is_refused_at_once(
    catalog: str, extra: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stream", catalog, *extra]) == 2
    assert told in capsys.readouterr().err


def test_tiles_stand_in_rows_and_what_is_left_over_is_grey(tmp_path: Path) -> None:
    tiles = [np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)]
    shown = mosaic(tiles, 2, 2, gap=1)
    assert shown[:, :, 0].tolist() == [
        [10, 10, 128, 20, 20],
        [10, 10, 128, 20, 20],
        [128] * 5,
        [30, 30, 128, 128, 128],
        [30, 30, 128, 128, 128],
    ]
    write_picture(str(tmp_path / "a.PNG"), shown)
    assert (np.asarray(Image.open(tmp_path / "a.PNG")) == shown).all()
