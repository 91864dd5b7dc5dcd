"""Slides opened as their catalog knows them: by a spec, by name, and among other sources."""

import json
from pathlib import Path

import boto3
import numpy as np
import pytest

from streaming import Catalog, TilePlan, open_slide
from streaming.catalog.inspection import Inspected
from streaming.catalog.known import known_slides
from streaming.errors import CatalogError, ConfigError, SlideError, StorageError
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions, TileReader
from streaming.storage.staging import Staging
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from tests.conftest import write_catalog
from trainer.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide whose metadata has 0.25 µm/px, and one whose has none."""
    folder = tmp_path_factory.mktemp("slides")
    made = SyntheticSlide(width=2048, height=1536, patient=0, downsamples=(1, 4))
    write_slide(made, folder / "told.svs")
    write_slide(
        SyntheticSlide(width=2048, height=1536, patient=1, downsamples=(1, 4), write_mpp=False), folder / "bare.svs"
    )
    return folder


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        (("--slide-mpp", "0.3"), {"bare.svs": 0.3, "told.svs": 0.25}),
        (("--metadata", "mpp.csv", "--mpp-from", "csv"), {"bare.svs": 0.4, "told.svs": 0.5}),
    ],
)
def test_a_spec_opened_by_its_catalog_is_the_tile_of_the_stream(
    folder: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    mpp: dict[str, float],
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mpp.csv").write_text("slide,mpp\nbare,0.4\ntold,0.5\n")
    assert main(["catalog", str(folder), "--out", "catalog", *options]) == 0
    catalog = Catalog.load("catalog")
    plan = TilePlan(catalog, mpp={0.5: 1, 1.0: 1}, size=64)
    reader = TileReader(plan, catalog, ReaderOptions(hsv_rule=HsvRule(min_share=0)))
    batch, opened = reader({"index": np.arange(24)}), set[str]()
    for i in range(24):
        spec = plan[i]
        slide = catalog.open_slide(spec)
        assert slide.mpp == mpp[Path(spec.slide).name]
        assert np.array_equal(slide.read_tile(spec.x, spec.y, spec.mpp, spec.size), batch["tile"][i])
        opened.add(spec.slide)
    assert len(opened) == 2
    spec = plan[0]
    for by in (spec.slide, catalog.slides().index(spec.slide)):
        assert catalog.open_slide(by).mpp == catalog.open_slide(spec).mpp
    with pytest.raises(CatalogError, match=r"other\.svs: not among the 2 slides of .*catalog"):
        catalog.open_slide(str(folder / "other.svs"))


def test_slides_are_opened_by_the_options_and_the_staging_that_the_catalog_was_loaded_with(
    s3_bucket: str, s3_slides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = write_catalog(f"{s3_bucket}/known-catalog", [f"{s3_slides}/patient0.svs"])
    options = {
        "endpoint_url": boto3.client("s3", region_name="us-east-1").meta.endpoint_url,
        "key": "test",
        "secret": "test",
    }
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    staging = Staging(folder=str(tmp_path / "staging"))
    catalog = Catalog.load(stored, options, staging)
    spec = TilePlan(catalog, mpp={0.5: 1}, size=64)[0]
    assert catalog.open_slide(spec).read_tile(spec.x, spec.y, spec.mpp, spec.size).shape == (64, 64, 3)
    with pytest.raises(StorageError):
        open_slide(spec.slide)


def test_a_catalogs_slides_are_what_it_says_whatever_other_source_names_them(folder: Path, tmp_path: Path) -> None:
    catalog = write_catalog(tmp_path / "catalog [1]", sorted(folder.glob("*.svs")), mpp=0.3)
    for sources in ([catalog], [str(folder), catalog], [catalog, str(folder / "*.svs")]):
        known = known_slides(sources)
        assert [Path(slide.info.uri).name for slide in known.slides] == ["bare.svs", "told.svs"]
        assert [known.open(number).mpp for number in range(2)] == [0.3, 0.25]
        found = known.inspect(0)
        assert isinstance(found, Inspected)
        assert np.array_equal(found.tissue.fraction, Catalog.load(catalog).tissue_grid(0).fraction)
        assert known.may_be_made_by(1) == {""}
        assert known.may_be_made_by(0) == {json.dumps([0.3, ""])}


def test_an_mpp_of_a_table_or_of_the_command_line_serves_where_the_slide_tells_none(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "slides.csv").write_text(f"slide,mpp\n{folder / 'bare.svs'},0.4\n{folder / 'told.svs'},0.7\n")
    by_table = known_slides([str(tmp_path / "slides.csv")], slide_mpp=0.9)
    assert [by_table.open(number).mpp for number in range(2)] == [0.4, 0.25]
    by_option = known_slides([str(folder)], slide_mpp=0.9)
    assert [by_option.open(number).mpp for number in range(2)] == [0.9, 0.25]
    # Which of both it is, only the slide tells.
    found = by_option.inspect(1)
    assert isinstance(found, Inspected)
    assert (found.row.mpp_from, by_option.may_be_made_by(1)) == ("metadata", {"", json.dumps([0.9, ""])})
    catalog = write_catalog(tmp_path / "catalog", [folder / "told.svs"])
    with pytest.raises(ConfigError, match=r"--slide-mpp 0\.5: a catalog tells the mpp of its slides"):
        known_slides([catalog], slide_mpp=0.5)


def test_a_slide_that_changed_since_it_was_catalogued_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a.svs"
    copy.write_bytes((folder / "told.svs").read_bytes())
    known = known_slides([write_catalog(tmp_path / "catalog", [copy]), str(copy)])
    copy.write_bytes((folder / "bare.svs").read_bytes())
    with pytest.raises((SlideError, StorageError), match="changed"):
        known.open(0).read_tile(0, 0, 0.5, 64)


def test_a_slide_is_found_by_address_name_or_stem_and_a_name_of_two_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/told.svs").symlink_to(folder / "told.svs")
    known = known_slides([str(folder)])
    for name in (str(folder / "told.svs"), "told.svs", "told", "/elsewhere/told.svs"):
        assert known.number_of(name) == 1
    assert known.number_of("nobody") is None
    both = known_slides([str(folder), str(tmp_path / "more")])
    assert both.number_of(str(folder / "told.svs")) is not None
    with pytest.raises(ConfigError, match="have that name; give the whole address"):
        both.number_of("told")
