"""Tables as sources: manifests of the Genomic Data Commons, and whatever has a column of addresses."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streaming import storage
from streaming.catalog.given import Given
from streaming.catalog.idc import IdcOptions
from streaming.catalog.inspection import Inspected, Rejected, inspect_named
from streaming.catalog.listings import read_listing
from streaming.catalog.selection import find
from streaming.errors import ConfigError
from streaming.storage.staging import Staging
from tests.idc_index import series, write_index

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
        ("slide,b\n", "has no rows"),
        ("slide,b\n,2\n", "row 1 has no 'slide'"),
        ("id\tfilename\nx\t\n", "row 1 has no id or no filename"),
        ("id\tfilename\n../x\ta.svs\n", "row 1 has '../x', a path and no name"),
        ("id\tfilename\nx\t..\n", "row 1 has '..', a path and no name"),
        ("", "has no rows"),
        ("slide,b\n,,\n , \n", "has no rows"),
        ("slide,b\na.svs,1\n,\n,2\n", "row 3 has no 'slide'"),
        ("slide,b\n/data/a, b.svs,2\n", "row 1 has more cells than the header; put what holds a comma in double"),
        ("id\tfilename\n1\ta.bam\n2\tb.tar.gz\n", "none of its 2 files is a slide"),
    ],
)
def test_a_table_that_names_nothing_is_refused_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_listing(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_manifest_is_read_as_windows_saves_it_and_what_is_no_slide_is_counted(
    tmp_path: Path, mark: str, end: str
) -> None:
    manifest = tmp_path / "manifest.txt"
    rows = [
        "id\tfilename\tmd5\tsize\tstate",
        f"ab-1\t{NAME}\t0f\t1234\treleased",
        f" ab-1 \t{NAME}\t0f\t1234\treleased",
    ]
    rows += ["ab-2\twith a space.SVS\t0f\t7\treleased", "", "ab-3\treads.bam\t0f\t9\treleased", "ab-4\tnotes\t\t\t", ""]
    manifest.write_bytes((mark + end.join(rows)).encode())
    skipped: dict[str, str] = {}
    found = find([str(manifest)], None, None, skipped)
    assert [(named.uri, named.nbytes) for named in found] == [
        (f"s3://tcga-2-open/ab-1/{NAME}", 1234),
        ("s3://tcga-2-open/ab-2/with a space.SVS", 7),
    ]
    assert Counter(skipped.values()) == {".bam": 1, "without suffix": 1}


def test_what_pandas_writes_for_nothing_is_nothing(tmp_path: Path) -> None:
    table = {
        "uri": ["s3://idc-open-data/u1/*", "s3://idc-open-data/u2/*"],
        "organ": ["lung", None],
        "mpp": [math.nan, 0.5],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert [named.metadata for named in find([str(tmp_path / "a.parquet")])] == [{"organ": "lung"}, {"mpp": "0.5"}]


def test_a_slide_that_is_named_twice_is_one_and_what_is_told_of_it_comes_together(
    slides: list[Path], tmp_path: Path
) -> None:
    slide, table, other = str(slides[0]), tmp_path / "a.csv", tmp_path / "b.csv"
    table.write_text(f"path,organ\n{slide},lung\n{slide},lung\n{slide},\n")
    other.write_text(f"path,organ,patient\n{slide},lung,p1\n")
    for sources in ([table, slide, other], [other, slide, table], [slide, other, table]):
        (named,) = find([str(source) for source in sources])
        assert named.metadata == {"organ": "lung", "patient": "p1"}
        assert named.info == storage.stat(slide)
    other.write_text(f"path,organ\n{slide},liver\n")
    with pytest.raises(ConfigError, match=r"patient0\.svs: named twice, with organ 'lung' and 'liver'; keep one"):
        find([str(table), str(other)])


def test_a_series_in_two_collections_of_the_index_is_refused_and_in_two_patterns_is_one(tmp_path: Path) -> None:
    rows = [series("tcga_brca", "p", "u1"), series("tcga_luad", "p", "u2"), series("gtex", "p", "u2")]
    options = IdcOptions(idc_index=write_index(tmp_path, rows))
    assert len(find(["idc:tcga_*", "idc:tcga_brca", "idc:tcga_luad"], None, options)) == 2
    with pytest.raises(ConfigError, match="u2: named twice, with collection 'tcga_luad' and 'gtex'"):
        find(["idc:*"], None, options)


def test_slides_of_a_manifest_and_of_tables_are_catalogued_from_s3_and_mirrors(
    s3_bucket: str, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, copy = boto3.client("s3", region_name="us-east-1"), tmp_path / "copy"
    client.create_bucket(Bucket="tcga-2-open")
    names = [NAME, "with a space.svs"]
    for number, name in enumerate(names):
        body = slides[number].read_bytes()
        client.put_object(Bucket="tcga-2-open", Key=f"id-{number}/{name}", Body=body, ACL="public-read")
        client.put_object(Bucket="tiles", Key=f"of gdc/id-{number}/{name}", Body=body)
        (copy / f"id-{number}").mkdir(parents=True)
        (copy / f"id-{number}" / name).write_bytes(body)
    manifest = tmp_path / "manifest.tsv"
    rows = ["id\tfilename", *(f"id-{number}\t{name}" for number, name in enumerate(names)), "id-9\tgone.svs"]
    manifest.write_bytes("\ufeff".encode() + "\r\n".join(rows).encode())
    found = dict[str, list[Inspected | Rejected]]()
    for name, mirror in (
        ("itself", None),
        ("bucket", f"s3://tcga-2-open={s3_bucket}/of gdc"),
        ("folder", f"s3://tcga-2-open={copy}"),
        ("nowhere", f"s3://tcga-2-open={tmp_path}/nowhere"),
    ):
        if mirror:
            monkeypatch.setenv("TILESTREAM_MIRRORS", mirror)
        found[name] = [inspect_named(named, Given(), None, Staging()) for named in find([str(manifest)])]
    assert [type(one) for one in found["itself"]] == [Inspected, Inspected, Rejected]
    for name in ("bucket", "folder"):
        for one, other in zip(found["itself"][:2], found[name][:2], strict=True):
            assert isinstance(one, Inspected)
            assert isinstance(other, Inspected)
            assert replace(one.row, index=None) == replace(other.row, index=None)
    for one in (*found["nowhere"], found["itself"][2], found["bucket"][2], found["folder"][2]):
        assert isinstance(one, Rejected)
        assert one.slide.startswith("s3://tcga-2-open/id-")
    assert f"{tmp_path}/nowhere/id-0" in found["nowhere"][0].reason


def test_sql_without_a_source_that_has_an_index_is_refused(slides: list[Path]) -> None:
    with pytest.raises(ConfigError, match="name one, for example idc:tcga_brca"):
        find([str(slides[0])], None, IdcOptions(where="1"))
