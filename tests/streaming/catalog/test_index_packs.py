"""Block indexes in packs: written once, found again wherever the catalog lies."""

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest

from streaming import storage
from streaming.catalog import Catalog
from streaming.catalog.given import Given
from streaming.catalog.index_packs import FilePart, save_indexes
from streaming.catalog.inspection import Inspected, Rejected, inspect
from streaming.catalog.writing import merge, part_of, write
from streaming.errors import CatalogError
from streaming.slide import open_slide
from streaming.slide.block_index import unpack
from streaming.storage.staging import Staging


@pytest.fixture(scope="module")
def looked_at(slides: list[Path]) -> list[Inspected | Rejected]:
    broken = Rejected("broken.svs", 1, "v", "is broken")
    one, two, three = (inspect(storage.stat(str(path)), Given(), None, Staging()) for path in slides)
    return [one, broken, two, three]


@pytest.fixture(params=["local", "remote"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "catalog")
        return
    uri = f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
    yield uri
    storage.remove(uri)


def packs(out: str) -> list[str]:
    return storage.list_names(storage.join(out, "blocks"))


def test_slides_of_a_pack_are_read_as_openslide_reads_them(
    out: str, looked_at: list[Inspected | Rejected], tmp_path: Path, slides: list[Path]
) -> None:
    saved = save_indexes(looked_at, out, None)
    assert [type(entry) for entry in saved] == [Inspected, Rejected, Inspected, Inspected]
    rows = [entry for entry in saved if isinstance(entry, Inspected)]
    assert all(entry.index is None for entry in rows)
    (pack,) = packs(out)
    write(out, *merge([part_of(rows)], None), None)
    catalog = Catalog.load(out, None, Staging(folder=str(tmp_path / "cache")))
    for again in (catalog, pickle.loads(pickle.dumps(catalog))):
        for row, path in enumerate(slides):
            with openslide.OpenSlide(path) as oracle:
                wanted = np.asarray(oracle.read_region((300, 200), 0, (256, 256)))[:, :, :3]
            opened = again.open_slide(row, None, Staging())
            assert opened.backend == "blocks"
            assert np.array_equal(opened.read_region((300, 200), 0, (256, 256)), wanted)
    assert sum(len(open_slide(str(path)).packed_index or b"") for path in slides) == int(pack.rpartition("-")[2])


def test_slides_that_are_added_later_leave_what_was_written_alone(
    out: str, looked_at: list[Inspected | Rejected], tmp_path: Path
) -> None:
    first = save_indexes(looked_at[:1], out, None)
    write(out, *merge([part_of(first)], None), None)
    (pack,) = packs(out)
    before = storage.stat(storage.join(out, "blocks", pack))
    old = Catalog.load(out, None, Staging(folder=str(tmp_path / "cache")))
    later = save_indexes(looked_at[2:], out, None)
    write(out, *merge([old.table, part_of(later)], old.tissue), None)
    assert storage.stat(storage.join(out, "blocks", pack)) == before
    assert len(packs(out)) == 2
    new = Catalog.load(out, None, Staging(folder=str(tmp_path / "cache")))
    assert (len(old), len(new)) == (1, 3)
    pixels = [
        c.open_slide(row, None, Staging()).read_region((0, 0), 1, (99, 99)) for c in (old, new) for row in range(len(c))
    ]
    assert np.array_equal(pixels[0], pixels[1])
    # What a task that is run again writes is the same pack.
    save_indexes(looked_at[:1], out, None)
    assert len(packs(out)) == 2


def test_where_a_pack_can_t_be_written_its_slides_are_rejected(
    looked_at: list[Inspected | Rejected], tmp_path: Path
) -> None:
    (tmp_path / "blocks").write_bytes(b"a file where the folder should be")
    found = save_indexes(looked_at, str(tmp_path), None)
    assert all(isinstance(entry, Rejected) for entry in found)
    reasons = {entry.reason for entry in found if entry.slide != "broken.svs"}
    assert all(reason.startswith("its block index can't be written") for reason in reasons)


def test_a_part_of_a_file_ends_where_it_ends(looked_at: list[Inspected | Rejected], tmp_path: Path) -> None:
    contents = [entry.index for entry in looked_at if isinstance(entry, Inspected)]
    path = tmp_path / "pack"
    path.write_bytes(b"".join(contents))
    part = FilePart(str(path), len(contents[0]), len(contents[1]))
    assert part.read(0, 2**30) == contents[1]
    assert part.read(len(contents[1]) - 3, 10) == contents[1][-3:]
    assert part.read(len(contents[1]) + 5, 10) == b""
    assert unpack(part.read(0, 2**30)).levels[0].places(0, 3) == unpack(contents[1]).levels[0].places(0, 3)


def test_a_pack_that_is_gone_is_told(looked_at: list[Inspected | Rejected], tmp_path: Path) -> None:
    write(str(tmp_path), *merge([part_of(save_indexes(looked_at[:1], str(tmp_path), None))], None), None)
    shutil.rmtree(tmp_path / "blocks")
    with pytest.raises(CatalogError, match=r"can't read this block index .* build the catalog anew"):
        Catalog.load(str(tmp_path)).open_slide(0, None, Staging())
