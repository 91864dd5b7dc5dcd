"""Tables and folders as other programs leave them."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.catalog.tables import _of_text, read_rows
from streaming.errors import ConfigError
from trainer.evaluate.annotations import AnnotatedTiles
from trainer.evaluate.datasets import Samples, read_dataset

ROWS = [{"path": "ä 1.png", "label": "a", "patient": "0012"}, {"path": "b.png", "label": "b; c", "patient": "0013"}]


def samples(path: Path) -> Samples:
    return read_dataset(str(path), AnnotatedTiles())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_pandas_writes_is_read(tmp_path: Path, encoding: str, separator: str, end: str) -> None:
    path = tmp_path / "a.csv"
    pd.DataFrame(ROWS).to_csv(path, sep=separator, encoding=encoding, index=False, lineterminator=end)
    assert read_rows(str(path)) == ROWS


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), max_size=9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_quoted_values_hold_whatever_pandas_puts_there(values: list[tuple[str, str]]) -> None:
    rows = [{"path": a, "label": b} for a, b in values]
    text = pd.DataFrame(rows).to_csv(index=False, quoting=1, lineterminator="\n")
    assert _of_text("a.csv", text) == rows


def test_columns_are_found_whatever_their_spelling(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(" Path , LABEL,Patient,x y\na.png,a,p,1\nb.png,b,q,2\n")
    found = samples(tmp_path / "a.csv")
    assert found.patients is not None
    assert found.patients.tolist() == ["p", "q"]
    assert set(read_rows(str(tmp_path / "a.csv"))[0]) == {"path", "label", "patient", "x_y"}


def test_clam_s_table_is_of_whole_slides_by_patient(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",case_id,slide_id,label\n0,p1,s1,tumor\n1,p2,s2,normal\n")
    found = samples(tmp_path / "a.csv")
    assert found.whole_slides
    assert found.patients is not None
    assert found.patients.tolist() == ["p1", "p2"]
    assert [tile.uri for tile in found.tiles] == [str(tmp_path / name) for name in ("s1", "s2")]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_numbers_are_names_and_a_missing_one_makes_no_fractions(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    columns = {"path": ["a", "b", "c"], "label": [1.0, np.nan, 0.0], "patient": ["007", "7", "1.0"], "mpp": [0.5, 1, 2]}
    frame = pd.DataFrame(columns)
    frame.to_csv(path, index=False) if kind == "csv" else pq.write_table(pa.Table.from_pandas(frame), path)
    rows = read_rows(str(path))
    assert [row["label"] for row in rows] == ["1", "", "0"]
    assert [row["patient"] for row in rows] == ["007", "7", "1.0"]
    assert [row["mpp"] for row in rows] == ["0.5", "1.0", "2.0"]
    with pytest.raises(ConfigError, match=r"1 of 3 rows have no label \(first: row 2, b\)"):
        samples(path)


def test_paths_of_windows_are_found_below_the_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,label\nred\\a.png,a\nC:\\tiles\\b.png,b\n")
    assert [tile.uri for tile in samples(tmp_path / "a.csv").tiles] == [str(tmp_path / "red/a.png"), "C:/tiles/b.png"]


def test_a_field_may_be_huge(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"path,label,note\na,x,{'n' * 300_000}\nb,y,\n")
    assert len(read_rows(str(tmp_path / "a.csv"))[0]["note"]) == 300_000


@pytest.mark.parametrize(
    "left", ["red/p0/._0.png", ".ipynb_checkpoints/p/0.png", "__MACOSX/red/0.png", "red/@eaDir/p/0.png"]
)
def test_what_other_programs_leave_in_a_folder_is_no_image(coloured: Path, tmp_path: Path, left: str) -> None:
    folder = tmp_path / "images"
    shutil.copytree(coloured, folder)
    before = samples(folder)
    (folder / left).parent.mkdir(parents=True, exist_ok=True)
    (folder / left).write_bytes(b"junk")
    assert samples(folder).tiles == before.tiles
    assert samples(folder).classes == before.classes == ("blue", "red")
    assert samples(folder).patients is not None


@pytest.mark.parametrize(
    ("odd", "named"),
    [("red/loose.png", "loose.png is in no patient's folder, as "), ("train/red/p9/0.png", "is in no split, as ")],
)
def test_a_folder_that_is_laid_out_in_two_ways_is_refused(coloured: Path, tmp_path: Path, odd: str, named: str) -> None:
    folder = tmp_path / "images"
    shutil.copytree(coloured, folder)
    (folder / odd).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(next(coloured.rglob("*.png")), folder / odd)
    with pytest.raises(ConfigError, match=named):
        samples(folder)


def test_lines_of_nothing_as_spreadsheets_save_them_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,label\na.png,a\n,\nb.png,b\n,,,\n , \n")
    assert len(samples(tmp_path / "a.csv")) == 2
    (tmp_path / "a.csv").write_text("path,label\n,\n")
    with pytest.raises(ConfigError, match="has no rows"):
        samples(tmp_path / "a.csv")


@pytest.mark.parametrize("odd", [{"x": "inf"}, {"mpp": "0"}, {"mpp": "inf"}, {"size": "-3"}, {"size": "1000000"}])
def test_a_square_that_is_none_is_told_with_its_numbers(tmp_path: Path, odd: dict[str, str]) -> None:
    whole = {"path": "a.svs", "label": "a", "x": "0", "y": "0", "mpp": "0.5", "size": "32"}
    pd.DataFrame([{**whole, "label": "b"}, {**whole, **odd}]).to_csv(tmp_path / "a.csv", index=False)
    ((name, value),) = odd.items()
    with pytest.raises(ConfigError, match=rf"a\.svs: .*{name} '{value}'.*: all must be numbers"):
        samples(tmp_path / "a.csv")


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("none")
    with pytest.raises(ConfigError, match="holds no image"):
        samples(tmp_path)
