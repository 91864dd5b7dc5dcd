"""Which series the index of the Imaging Data Commons names, and what is told of them."""

from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.catalog.idc import IdcOptions, find_series
from streaming.catalog.selection import work_line
from streaming.errors import ConfigError, StorageError
from tests.idc_index import BUCKET, series, write_file_table, write_index, write_slide_table

ROWS = [
    series("tcga_brca", "TCGA-3C-AAAU", "u1"),
    series("tcga_brca", "TCGA-A7-A0CD", "u2", SeriesDescription="Frozen HE TP TS1"),
    series("tcga_luad", "TCGA-05-4244", "u3", license_short_name="CC BY 4.0", SeriesDescription="FFPE HE NT DX2"),
    series("gtex", "GTEX-1117F", "u4", SeriesDescription="PG PE HE", source_DOI="10.5281/zenodo.11099099"),
    series("tcga_brca", "TCGA-3C-AAAU", "mr", Modality="MR", SeriesDescription="FFPE HE"),
    series("tcga_brca", "TCGA-3C-AAAU", "ann", Modality="ANN", SeriesDescription="FFPE HE"),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_index(tmp_path_factory.mktemp("idc"), ROWS)


def found(index: str, *patterns: str, where: str | None = None) -> list[str]:
    return sorted(named.uri for named in find_series(patterns, IdcOptions(where=where, idc_index=index)))


def test_globs_and_sql_choose_series_of_slides_alone(index: str) -> None:
    assert found(index, "tcga_*") == [f"{BUCKET}/u1", f"{BUCKET}/u2", f"{BUCKET}/u3"]
    assert found(index, "TCGA_luad", "gtex") == [f"{BUCKET}/u3", f"{BUCKET}/u4"]
    assert found(f"{index}/idc_index.parquet", "*", where="SeriesDescription LIKE 'FFPE%'") == [
        f"{BUCKET}/u1",
        f"{BUCKET}/u3",
    ]
    assert found(index, "*", where="collection_id = 'gtex' OR PatientID IN ('TCGA-A7-A0CD') -- so") == [
        f"{BUCKET}/u2",
        f"{BUCKET}/u4",
    ]
    with pytest.raises(ConfigError, match="no series left"):
        found(index, "*", where="SeriesDescription LIKE 'ffpe%'")


def test_names_in_quotes_are_columns_and_text_in_quotes_stays_as_it_is(index: str) -> None:
    first = [f"{BUCKET}/u1"]
    # What is within quotes or a comment is no column, whatever quotes it holds.
    for where in (
        "\"SeriesDescription\" LIKE 'FFPE HE TP%'",
        "[SeriesDescription] = 'FFPE HE TP DX1' AND `PatientID` <> 'a \"b\" -- c'",
        'series."seriesDESCRIPTION" LIKE \'%TP DX1\' /* "not this" */ -- nor "this"',
        "SeriesDescription = 'FFPE HE TP DX1' AND 'it''s \"so\"' = 'it''s ' || char(34) || 'so' || char(34)",
        'PatientID IN (SELECT "p" FROM (SELECT PatientID AS "p" FROM series GROUP BY 1 HAVING count(*) = 1)) '
        "AND license_short_name LIKE '%3.0' AND PatientID LIKE '%AAAU'",
    ):
        assert found(index, "tcga_*", where=where) == first, where


def test_cells_that_sql_has_not_are_text_and_names_that_differ_by_case_alone_are_one(tmp_path: Path) -> None:
    folder = write_index(tmp_path, ROWS)
    table = pq.read_table(tmp_path / "idc_index.parquet")
    dates = pa.array([date(2020, 1, 1 + number) for number in range(len(ROWS))])
    pq.write_table(table.append_column("day", dates), tmp_path / "idc_index.parquet")
    told = {"SeriesInstanceUID": ["1.2.826.u2"], "patientid": ["other"], "cost": [Decimal("1.50")]}
    pq.write_table(pa.table(told), tmp_path / "sm_index.parquet")
    assert found(folder, "*", where="day = '2020-01-02' AND cost = '1.50'") == [f"{BUCKET}/u2"]


def test_an_index_that_is_cut_off_or_damaged_is_told(tmp_path: Path) -> None:
    write_index(tmp_path, ROWS)
    path = tmp_path / "idc_index.parquet"
    content = path.read_bytes()
    for damaged in (content[:-9], content[:4] + b"\xff" * 2000 + content[2004:]):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match="not a whole Parquet file"):
            found(str(tmp_path), "*")


_TEXTS = st.text(st.sampled_from("tcgax_*?"), max_size=5)


@settings(deadline=None, max_examples=30)
@given(st.lists(_TEXTS.filter(lambda text: "*" not in text and "?" not in text), min_size=1, max_size=4), _TEXTS)
def test_a_glob_names_the_collections_that_it_matches(
    tmp_path_factory: pytest.TempPathFactory, collections: Sequence[str], pattern: str
) -> None:
    folder = write_index(tmp_path_factory.mktemp("idc"), [series(c, "p", f"u{i}") for i, c in enumerate(collections)])
    wanted = [f"{BUCKET}/u{i}" for i, collection in enumerate(collections) if fnmatchcase(collection, pattern)]
    if wanted:
        assert found(folder, pattern) == wanted
    else:
        with pytest.raises(ConfigError, match="the nearest is"):
            found(folder, pattern)


def test_what_is_told_of_a_series_comes_along_and_nothing_else(index: str) -> None:
    by_uri = {named.uri: named for named in find_series(["*"], IdcOptions(idc_index=index))}
    first = by_uri[f"{BUCKET}/u1"]
    assert (first.is_series, first.num_files, first.nbytes) == (True, 5, 500_250_000)
    assert first.metadata == {
        "patient": "TCGA-3C-AAAU",
        "collection": "tcga_brca",
        "cohort": "tcga",
        "site": "3C",
        "description": "FFPE HE TP DX1",
        "license": "CC BY 3.0",
        "doi": "10.5281/zenodo.12689962",
    }
    assert by_uri[f"{BUCKET}/u4"].metadata["cohort"] == "gtex"
    assert "site" not in by_uri[f"{BUCKET}/u4"].metadata


def test_companions_tell_organs_more_columns_and_the_files_of_levels(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "idc", ROWS)
    collections = {
        "collection_id": ["tcga_brca", "gtex", "tcga_luad"],
        "tumor_locations": ["Breast", "Various", "a, b"],
    }
    pq.write_table(pa.table(collections), tmp_path / "idc/collections_index.parquet")
    organs = {named.uri: named.metadata.get("organ") for named in find_series(["*"], IdcOptions(idc_index=folder))}
    assert organs == {
        f"{BUCKET}/{uuid}": organ
        for uuid, organ in zip(["u1", "u2", "u3", "u4"], ["Breast", "Breast", None, None], strict=True)
    }
    write_slide_table(tmp_path / "idc", {"u4": "Skin of lower leg", "u2": "Breast NOS"})
    write_file_table(
        tmp_path / "idc",
        {"u2": [("b", 11, "VOLUME"), ("a", 7, "VOLUME"), ("c", 3, "LABEL")], "u4": [("d", 5, "OVERVIEW")]},
    )
    options = IdcOptions(
        idc_index=folder, where="ObjectiveLensPower = 40 AND staining_usingSubstance_CodeMeaning LIKE '%eosin%'"
    )
    second, fourth = find_series(["*"], options)
    assert second.metadata["organ"] == "Breast NOS"
    assert [(info.uri, info.size) for info in second.levels] == [(f"{BUCKET}/u2/a.dcm", 7), (f"{BUCKET}/u2/b.dcm", 11)]
    assert (fourth.metadata["organ"], fourth.levels) == ("Skin of lower leg", ())
    # Of the first neither a listing nor its label is wanted.
    assert work_line([second], 3).startswith("1 to look at, 3 known: about")
    assert int(work_line([second], 0).split("about ")[1].split()[0]) < int(
        work_line([fourth], 0).split("about ")[1].split()[0]
    )


@pytest.mark.parametrize(
    ("patterns", "options", "told"),
    [
        (["tcga_brac"], {}, "nearest is tcga_brca"),
        (["*"], {"where": "SeriesDescripton LIKE 'FFPE%'"}, "no such column: SeriesDescripton (text"),
        (
            ["*"],
            {"where": '"Misspelt" = 1'},
            "no such column: Misspelt (text stands in 'single quotes'); columns: collec",
        ),
        (["*"], {"where": 'SeriesDescription LIKE "FFPE%"'}, "no such column: FFPE% (text stands in 'single quotes')"),
        (["*"], {"where": ""}, "syntax error"),
        (["*"], {"where": "count(*) > 1"}, "misuse of aggregate"),
        (["*"], {"where": "PatientID = ? -- '"}, "binding"),
        (["*"], {"where": "load_extension('x')"}, "not authorized"),
        (["*"], {"where": "abs(-9223372036854775807 - 1) = 1"}, "integer overflow"),
        (
            ["tcga_*", "gtex"],
            {"where": "SeriesDescription\nLIKE 'FFPE%'"},
            "idc:gtex: no series left by --where Series",
        ),
        (["*"], {"where": "1=1); DROP TABLE series; --"}, "--where 1=1"),
        (["*"], {"where": "1 +"}, "syntax error"),
        (["*"], {"where": "\udc80"}, "surrogates not allowed"),
        (["*"], {"idc_index": "nowhere"}, "there is no idc_index.parquet"),
        (["*"], {"idc_index": "folder/index.parquet"}, "must be idc_index.parquet"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(
    index: str, patterns: Sequence[str], options: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as error:
        find_series(patterns, IdcOptions(**{"idc_index": index, **options}))
    assert told in str(error.value)


def test_a_table_of_something_else_is_no_index(tmp_path: Path) -> None:
    pq.write_table(pa.table({"Modality": ["SM"], "collection_id": ["a"]}), tmp_path / "idc_index.parquet")
    with pytest.raises(ConfigError, match="no index of IDC: it has no column PatientID"):
        find_series(["a"], IdcOptions(idc_index=str(tmp_path)))


@pytest.mark.parametrize(
    ("column", "values"),
    [("collection_id", [1]), ("Modality", [1]), ("series_aws_url", [1]), ("series_size_MB", ["a"])],
)
def test_an_index_with_a_column_of_another_type_is_refused(tmp_path: Path, column: str, values: list) -> None:
    folder = write_index(tmp_path, ROWS[:1])
    table = pq.read_table(tmp_path / "idc_index.parquet")
    table = table.set_column(table.column_names.index(column), column, pa.array(values))
    pq.write_table(table, tmp_path / "idc_index.parquet")
    with pytest.raises(ConfigError, match=rf"no index of IDC: its column {column} is of \w+, not of (text|numbers)"):
        found(folder, "*")


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -1.0])
def test_a_size_that_is_none_is_missing(tmp_path: Path, size: float) -> None:
    folder = write_index(tmp_path, [series("a", "p", "u1"), series("a", "p", "u2", series_size_MB=size)])
    with pytest.raises(ConfigError, match="1 of the series asked for have no series_size_MB; leave them out by"):
        found(folder, "a")
    assert found(folder, "a", where="series_size_MB IS NOT NULL") == [f"{BUCKET}/u1"]


def test_an_index_with_gaps_is_told_by_the_column(tmp_path: Path) -> None:
    rows = [series("a", "p", "u1"), series("a", "p", "u2", series_aws_url=None), series(None, "p", "u3")]
    folder = write_index(tmp_path / "gaps", rows)
    with pytest.raises(ConfigError, match="1 of the series asked for have no series_aws_url; leave them out by"):
        found(folder, "a")
    assert found(folder, "a", where="series_aws_url IS NOT NULL") == [f"{BUCKET}/u1"]
    folder = write_index(tmp_path / "none", [series("a", "p", "u1", Modality="CT")])
    with pytest.raises(ConfigError, match=r"idc_index\.parquet: no collection with slides"):
        found(folder, "a")


def test_without_the_package_the_user_is_told_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "idc_index_data", None)
    with pytest.raises(ConfigError, match="pip install"):
        find_series(["gtex"], IdcOptions())
