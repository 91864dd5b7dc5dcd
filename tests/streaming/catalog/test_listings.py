"""Tables as sources: manifests of the Genomic Data Commons, and whatever has a column of addresses."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streaming import storage
from streaming.catalog.listings import read_listing
from streaming.catalog.selection import find
from streaming.errors import ConfigError

NAME = "TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C291.svs"


def test_a_manifest_of_the_gdc_names_objects_of_its_bucket_and_their_barcodes_tell_patient_and_site(
    tmp_path: Path,
) -> None:
    manifest = tmp_path / "gdc_manifest.2026-01-01.txt"
    manifest.write_text(
        f"id\tfilename\tmd5\tsize\tstate\nab-1\t{NAME}\t0f\t1234\treleased\nab-2\tother.svs\t0e\t5\tx\n"
    )
    first, second = read_listing(str(manifest))
    assert (first.uri, first.nbytes) == (f"s3://tcga-2-open/ab-1/{NAME}", 1234)
    assert first.metadata == {"patient": "TCGA-3C-AALI", "site": "3C", "cohort": "tcga"}
    assert (second.uri, second.metadata) == ("s3://tcga-2-open/ab-2/other.svs", {})
    # Nothing is asked for: the bucket's keys tell the content.
    assert [named.info for named in find([str(manifest)])] == [None, None]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_names_files_and_series_and_only_known_columns_come_along(
    tmp_path: Path, slides: list[Path], suffix: str
) -> None:
    table = tmp_path / f"slides{suffix}"
    columns = {
        "Path": [str(slides[0]), "beside/b.svs", "s3://idc-open-data/u1/*"],
        "Organ": ["lung", "", "skin"],
        "patient_name": ["Jane Doe", "John Doe", "Jim Doe"],
        "mpp": ["0.5", "", ""],
    }
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), table)
    else:
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        table.write_text("\n".join(("\t" if suffix == ".tsv" else ",").join(row) for row in rows) + "\n")
    named = {entry.uri: entry for entry in find([str(table)])}
    assert set(named) == {str(slides[0]), str(tmp_path / "beside/b.svs"), "s3://idc-open-data/u1"}
    assert named[str(slides[0])].info == storage.stat(str(slides[0]))
    assert named[str(slides[0])].metadata == {"organ": "lung", "mpp": "0.5"}
    assert named[str(tmp_path / "beside/b.svs")].info is None  # missing: told when it is opened
    assert named["s3://idc-open-data/u1"].is_series


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1,2\n", "no column of addresses"),
        ("slide,b\n", "without a row"),
        ("slide,b\n,2\n", "row 1 has no 'slide'"),
        ("id\tfilename\nx\t\n", "row 1 has no id or no filename"),
        ("", "without a row"),
    ],
)
def test_a_table_that_names_nothing_is_refused_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_listing(str(tmp_path / "a.csv"))


def test_sql_without_a_source_that_has_an_index_is_refused(slides: list[Path]) -> None:
    from streaming.catalog.idc import IdcOptions

    with pytest.raises(ConfigError, match="name one, for example idc:tcga_brca"):
        find([str(slides[0])], None, IdcOptions(where="1"))
