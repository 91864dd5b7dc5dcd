"""Views of one place, read: OpenSlide is the oracle for where they lie, and they belong together."""

import os
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import torch
from PIL import Image

from streaming import TileStream, cluster, torch_dataset
from streaming.catalog import Catalog
from streaming.delivery.stream import BatchShape, step_digest
from streaming.errors import ConfigError
from streaming.plan import TilePlan
from streaming.plan.views import View
from streaming.reading.batch import failures_of, of_view, tile_columns
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions, TileReader
from tests.conftest import write_catalog
from trainer.cli import main

VIEWS = (View(mpp=0.25), View(mpp=1.0, same_centre=True))
SIZE = 128  # as a mosaic shows them
COLUMNS = tuple(of_view(name, view) for name in ("tile", "x", "y", "mpp") for view in (0, 1))


def plan_of(catalog: Catalog, views: tuple[View, ...] = VIEWS) -> TilePlan:
    return TilePlan(catalog, size=SIZE, mpp={0.25: 1}, views=views)


def read(catalog: Catalog, rule: HsvRule | None = None, *, isolated: bool = False) -> dict:
    reader = TileReader(plan_of(catalog), catalog, ReaderOptions(hsv_rule=rule or HsvRule(min_share=0)))
    return reader({"index": np.arange(48)}, isolated=isolated)


def test_both_views_are_openslide_s_regions_around_one_level_0_point(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    batch = read(loaded)
    assert tile_columns(batch) == ["tile", "tile_1"]
    assert (batch["mpp"] == 0.25).all()
    assert (batch["mpp_1"] == 1.0).all()
    for row in range(48):
        with openslide.OpenSlide(loaded.slides()[batch["slide"][row]]) as slide:
            centre = np.array([batch[name][row] + SIZE / 2 for name in ("x", "y")])
            for level, tile in enumerate((batch["tile"][row], batch["tile_1"][row])):
                side = SIZE * slide.level_downsamples[level]
                corner = np.rint(centre - side / 2).astype(int)
                assert np.abs(corner + side / 2 - centre).max() <= 0.5
                region = np.asarray(slide.read_region(tuple(corner.tolist()), level, (SIZE, SIZE)))
                # Transparent outside the slide, where a tile is white.
                assert np.array_equal(tile, np.where(region[:, :, 3:] == 0, 255, region[:, :, :3]))


def test_a_sample_of_which_one_view_is_turned_down_is_replaced_as_a_whole(catalog: str) -> None:
    loaded, rule = Catalog.load(catalog), HsvRule(min_share=0.8)
    loose, strict = read(loaded), read(loaded, rule)
    first, wide = (np.array([rule.accepts(tile) for tile in loose[name]]) for name in ("tile", "tile_1"))
    assert (first & ~wide).any(), "there are such samples"
    kept = first & wide
    assert np.array_equal(strict["filtered"] == 0, kept)
    for name in COLUMNS:
        assert np.array_equal(strict[name][kept], loose[name][kept]), name
    assert all(map(rule.accepts, [*strict["tile"], *strict["tile_1"]]))
    apart = read(loaded, rule, isolated=True)
    assert all(np.array_equal(strict[name], apart[name]) for name in (*COLUMNS, "slide", "filtered"))


def test_a_sample_of_which_one_view_can_t_be_read_is_replaced_as_a_whole(slides: list[Path], tmp_path: Path) -> None:
    copies = [tmp_path / path.name for path in slides]
    for path, copy in zip(slides, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    catalog = Catalog.load(write_catalog(tmp_path / "catalog", copies))
    sound = read(catalog)
    # The blocks of the coarser level alone; the file's date tells nothing.
    before = copies[1].stat()
    with tifffile.TiffFile(copies[1]) as tiff:
        coarse = tiff.series[0].levels[1].keyframe
        spans = list(zip(coarse.dataoffsets, coarse.databytecounts, strict=True))
    with copies[1].open("r+b") as file:
        for offset, nbytes in spans:
            file.seek(offset)
            file.write(bytes(nbytes))
    os.utime(copies[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    broken = read(catalog)
    hit = sound["slide"] == 1
    assert 0 < hit.sum() < 48
    assert 1 not in broken["slide"], "a sample has all its views or none, though the finer level can be read"
    assert {failure.index for failure in failures_of(broken)} >= set(np.flatnonzero(hit).tolist())
    for name in COLUMNS:
        assert np.array_equal(broken[name][~hit], sound[name][~hit]), name


def test_a_state_of_other_views_is_refused(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    one, other = (
        torch_dataset(loaded, plan_of(loaded, views), batch=8, stop=2)
        for views in (VIEWS, (View(mpp=0.25), View(mpp=2.0, same_centre=True)))
    )
    with pytest.raises(ConfigError, match="its steps are other tiles"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ConfigError, match="its steps are other tiles"):
        torch_dataset(loaded, plan_of(loaded, ()), batch=8, stop=2).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--views", "0.5"], "views has one view"),
        (["--views", "0.5,1.0", "--mpp", "0.5"], "--views and --mpp: views have their own"),
        (["--views", "0.5,1.0", "--tiles", "list.parquet"], "leave out views"),
    ],
)
def test_options_that_make_no_sense_with_views_are_refused_in_one_line(
    options: list[str], told: str, catalog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stream", catalog, "--dry-run", *options]) == 2
    line = capsys.readouterr().err
    assert told in line
    assert line.count("\n") == 1


@pytest.mark.slow
def test_ray_carries_a_column_a_view_for_any_ranks_and_digest_mosaic_and_dataset_show_them(
    catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, picture = Catalog.load(catalog), tmp_path / "tiles.png"
    plan = plan_of(loaded)
    local = TileReader(plan, loaded, ReaderOptions())({"index": np.arange(8)})
    options = ["--steps", "0:2", "--batch", "8", "--ranks", "2", "--size", str(SIZE), "--views", "0.25,1.0"]
    assert main(["stream", catalog, *options, "--digest", "--mosaic", str(picture)]) == 0
    assert f"step 0 {step_digest([local])}" in capsys.readouterr().out
    single = TileReader(plan_of(loaded, ()), loaded, ReaderOptions())({"index": np.arange(8)})
    assert step_digest([local]) != step_digest([{"index": local["index"], "tile": local["tile"]}])
    assert tile_columns(single) == ["tile"]
    shown = np.asarray(Image.open(picture))
    corner = SIZE + 3
    assert np.array_equal(shown[:SIZE, :SIZE], local["tile"][0])
    assert np.array_equal(shown[:SIZE, corner : corner + SIZE], local["tile_1"][0])

    cluster.connect(4)
    (batches,) = TileStream(loaded, plan, BatchShape(8, 2)).steps(0, 1)
    for name in (*COLUMNS, "slide", "index"):
        assert np.array_equal(np.concatenate([batch[name] for batch in batches]), local[name]), name
    ((first, wide),) = torch_dataset(loaded, plan, batch=8, rank=0, ranks=1, stop=1)
    assert torch.equal(first, torch.from_numpy(local["tile"]))
    assert torch.equal(wide, torch.from_numpy(local["tile_1"]))
