"""The block index: what it gives back, how large it is, and what is told of a broken one."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.catalog.index_packs import FilePart
from streaming.errors import CatalogError
from streaming.slide import open_slide
from streaming.slide.block_index import BlockIndex, pack, read_index, unpack
from streaming.slide.block_level import BlockedSlide, BlockLevel, SlideObject
from streaming.slide.codecs import BlockFormat

OBJECTS = (SlideObject("a.svs", 9_000, "tag"), SlideObject("parts/b.svs", 2**40, '"other"'))


def open_index(path: Path) -> BlockIndex:
    return read_index(FilePart(str(path), 0, 2**40))


def level(offsets: np.ndarray, nbytes: np.ndarray, columns: int) -> BlockLevel:
    rows = len(offsets) // columns
    return BlockLevel(columns * 256 - 7, rows * 256, BlockFormat("JPEG", 256, 256, b"\xff\xd8\x00"), offsets, nbytes)


@st.composite
def levels(draw) -> BlockLevel:
    columns, rows = draw(st.integers(1, 90)), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    nbytes = random.integers(1, draw(st.sampled_from([200, 60_000, 70_000, 20_000_000])), rows * columns)
    nbytes[random.random(len(nbytes)) < draw(st.sampled_from([0, 0.3, 1]))] = 0
    gaps = random.integers(0, draw(st.sampled_from([1, 2, 5000])), len(nbytes))
    offsets = draw(st.sampled_from([8, 2**33])) + np.cumsum(nbytes + gaps) - nbytes
    if draw(st.booleans()):
        order = random.permutation(len(nbytes))
        offsets, nbytes = offsets[order], nbytes[order]
    offsets[nbytes == 0] = draw(st.sampled_from([0, 5]))
    return level(offsets, nbytes, columns)


@settings(max_examples=150, deadline=None)
@given(st.lists(levels(), min_size=1, max_size=3), st.data())
def test_every_block_is_found_where_it_was_put(made: list[BlockLevel], data: st.DataObject) -> None:
    index = unpack(pack(BlockedSlide("aperio", (), tuple(made), OBJECTS), 0.25))
    assert (index.objects, index.vendor, index.mpp) == (OBJECTS, "aperio", 0.25)
    for put, got in zip(made, index.levels, strict=True):
        assert (got.width, got.height, got.form) == (put.width, put.height, put.form)
        first = data.draw(st.integers(0, len(put.nbytes) - 1))
        last = data.draw(st.integers(first, len(put.nbytes) - 1))
        offsets, nbytes = map(np.array, got.places(first, last))
        np.testing.assert_array_equal(nbytes, put.nbytes[first : last + 1])
        used = nbytes > 0
        np.testing.assert_array_equal(offsets[used], put.offsets[first : last + 1][used])


def test_an_index_takes_less_than_four_bytes_a_block_where_blocks_lie_in_order() -> None:
    random = np.random.default_rng(0)
    for most, wanted in ((60_000, 2.2), (200_000, 3.2)):
        nbytes = random.integers(2000, most, 80_000)
        for gap in (0, 1):  # scanners write them one after the other, libtiff at even addresses
            stored = nbytes + gap * (nbytes % 2)
            made = level(8 + np.cumsum(stored) - stored, nbytes, 400)
            assert len(pack(BlockedSlide("aperio", (), (made,), OBJECTS), 0.25)) / 80_000 < wanted + gap


def test_an_index_on_disk_reads_as_in_memory_and_as_tifffile_has_it(slides: list[Path], tmp_path: Path) -> None:
    content = open_slide(str(slides[0])).packed_index
    path = tmp_path / "index"
    path.write_bytes(content)
    with tifffile.TiffFile(slides[0]) as tiff:
        pages = [page for page in tiff.pages if page.is_tiled]
        for page, mine, theirs in zip(pages, open_index(path).levels, unpack(content).levels, strict=True):
            for indexed in (mine, theirs):
                offsets, nbytes = indexed.places(0, len(page.dataoffsets) - 1)
                assert (offsets, nbytes) == (list(page.dataoffsets), list(page.databytecounts))
    slide = open_slide(str(slides[0]), index=open_index(path))
    assert np.array_equal(
        slide.read_tile(700, 500, 0.25, 256), open_slide(str(slides[0])).read_tile(700, 500, 0.25, 256)
    )


def test_a_missing_a_foreign_and_a_cut_index_are_told(slides: list[Path], tmp_path: Path) -> None:
    content = open_slide(str(slides[0])).packed_index
    path = tmp_path / "index"
    with pytest.raises(CatalogError, match=r"index: can't read this block index \(No such file"):
        open_index(path)
    path.write_bytes(b"something else")
    with pytest.raises(CatalogError, match="not a block index"):
        open_index(path)
    path.write_bytes(content[:200])
    with pytest.raises(CatalogError, match="cut off"):
        open_index(path)
    path.write_bytes(content[:-9])
    last = open_index(path).levels[-1]
    with pytest.raises(CatalogError, match="cut off"):
        last.places(0, last.columns)
