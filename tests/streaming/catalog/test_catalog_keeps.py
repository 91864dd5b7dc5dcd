"""A catalog loses nothing: what was told of slides stays, corrections reach them, every file is accounted for."""

import contextlib
import functools
import gzip
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest

from streaming import storage
from streaming.catalog import Catalog, keeping
from streaming.catalog.build import build_catalog
from streaming.catalog.metadata_csv import read_metadata
from streaming.errors import ConfigError
from streaming.slide import open_slide
from streaming.storage.staging import Staging
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from tests.cloud_servers import Options, azurite, fake_gcs, make_bucket
from tests.dicom_files import write_series
from tests.faulty_server import FaultyServer
from trainer.cli import main

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def folder(slides: list[Path], tmp_path: Path) -> Path:
    """Slides a, b (0.25 µm/px) and c (no µm/px)."""
    (tmp_path / "slides").mkdir()
    for name, slide in zip("ab", slides, strict=False):
        shutil.copy(slide, tmp_path / f"slides/{name}.svs")
    bare = SyntheticSlide(width=1024, height=768, downsamples=(1,), write_mpp=False)
    write_slide(bare, tmp_path / "slides/c.svs")
    return tmp_path / "slides"


def column(out: str, name: str) -> list[object]:
    return Catalog.load(out).to_arrow()[name].to_pylist()


def test_a_slide_that_was_uploaded_anew_keeps_its_patient_and_cohort(
    folder: Path, tmp_path: Path, slides: list[Path]
) -> None:
    out = str(tmp_path / "catalog")
    (tmp_path / "m.csv").write_text("slide,patient,cohort\na,p1,c1\nb,p2,c2\nc,p3,c3\n")
    build_catalog([str(folder)], out, metadata_csv=str(tmp_path / "m.csv"), mpp=0.5)
    before = storage.stat(str(folder / "a.svs"))
    shutil.copy(slides[2], folder / "a.svs")
    report = build_catalog([str(folder)], out)
    assert (report.added, report.changed, report.unchanged) == (0, 1, 2)
    assert column(out, "version")[0] == storage.stat(str(folder / "a.svs")).version != before.version
    assert column(out, "patient") == ["p1", "p2", "p3"]
    assert column(out, "cohort") == ["c1", "c2", "c3"]
    # What --slide-mpp told stays, too.
    assert column(out, "mpp") == [0.25, 0.25, 0.5]


@pytest.fixture(scope="module")
def buckets(s3_bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[str, Options]]]:
    """Gives the bucket of a storage, or a folder, with its options."""
    with contextlib.ExitStack() as running:

        @functools.cache
        def started(kind: str) -> tuple[str, Options]:
            if kind in ("disk", "s3"):
                return (s3_bucket if kind == "s3" else str(tmp_path_factory.mktemp("disk"))), {}
            server = azurite(tmp_path_factory.mktemp("azurite")) if kind == "az" else fake_gcs()
            root, options = f"{kind}://keeps", running.enter_context(server)
            make_bucket(root, options)
            return root, options

        yield started


@pytest.mark.parametrize("place", ["disk", "s3", "az", "gs"])
def test_two_builds_on_one_catalog_add_to_it(
    folder: Path,
    tmp_path: Path,
    buckets: Callable[[str], tuple[str, Options]],
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, options = buckets(place)
    out = f"{root}/two-builds"
    (tmp_path / "m.csv").write_text("slide,stain\na,HE\nb,HE\n")
    real, others = keeping.write, [str(folder / "b.svs"), str(folder / "c.svs")]

    def beaten(*arguments: object) -> bool:
        # Between reading the catalog and writing it, other builds begin and end, and saved parts go with them.
        if others:
            one = others.pop()
            build_catalog([one], out, mpp=0.5, metadata_csv=str(tmp_path / "m.csv"), options=options)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(keeping, "write", beaten)
    build_catalog([str(folder / "a.svs")], out, options=options)
    catalog = Catalog.load(out, options)
    assert [Path(slide).name for slide in catalog.slides()] == ["a.svs", "b.svs", "c.svs"]
    assert catalog.metadata("stain") == ["HE", "HE", None]
    assert [bool(catalog.tissue_grid(row).fraction.any()) for row in range(3)] == [True] * 3
    # Nothing is left of what was written in vain.
    names = storage.list_names(out, options)
    assert [name for name in names if "tissue" in name] == [f"tissue-{catalog.fingerprint}.bin"]
    assert not storage.list_names(storage.join(out, "parts"), options)
    # From scratch it is the same catalog.
    whole = str(tmp_path / "whole")
    build_catalog([str(folder)], whole, mpp=0.5)
    assert Catalog.load(whole).fingerprint == catalog.fingerprint


@pytest.mark.parametrize("place", ["disk", "s3", "az", "gs"])
def test_a_file_is_replaced_by_one_of_those_who_have_read_it(
    buckets: Callable[[str], tuple[str, Options]], place: str
) -> None:
    root, options = buckets(place)
    uri = f"{root}/replaced/file"
    for turn in range(3):  # there is none yet, and then one
        seen = [storage.read_current(uri, options) for _ in range(4)]
        contents = [b"%d, %d" % (turn, i) for i in range(4)]
        # moto compares and writes in two steps.
        with ThreadPoolExecutor(1 if place == "s3" else 4) as pool:
            written = pool.map(storage.replace, [uri] * 4, seen, contents, [options] * 4)
            assert sorted(written) == [False, False, False, True]
    storage.remove(uri, options)
    assert not storage.replace(uri, seen[0], b"x", options)


class NoConditions(FaultyServer):
    """An S3 that writes nothing on a condition, as some others than Amazon's are."""

    def answer(
        self, command: str, path: str, headers: Mapping[str, str], content: bytes
    ) -> tuple[int, Mapping[str, str], bytes]:
        if {name.lower() for name in headers} & {"if-match", "if-none-match"}:
            return 501, {"Content-Length": "0"}, b""
        return super().answer(command, path, headers, content)


def test_a_bucket_that_knows_no_conditions_takes_catalogs_and_keeps_what_others_wrote(
    folder: Path, s3_bucket: str
) -> None:
    with NoConditions(os.environ["AWS_ENDPOINT_URL"]) as server:
        options, out = {"endpoint_url": server.url}, f"{s3_bucket}/no-conditions"
        for name in ("a", "b"):
            build_catalog([str(folder / f"{name}.svs")], out, options=options)
        assert len(Catalog.load(out, options)) == 2
        uri = f"{out}/slides.parquet"
        seen = storage.read_current(uri, options)
        assert storage.replace(uri, seen, b"other", options)
        assert not storage.replace(uri, seen, b"late", options)
        assert not storage.replace(uri, storage.Current(None, None), b"late", options)
        assert storage.read_bytes(uri, options) == b"other"


def test_slides_of_any_key_are_read_from_their_catalog(s3_bucket: str, slides: list[Path], tmp_path: Path) -> None:
    keys = ["a//b.svs", "//c.svs", "../d.svs", "./e.svs", "f [1]/g#h?i+j.svs", "ü%20.svs", "k", "k/l.svs"]
    client = boto3.client("s3", region_name="us-east-1")
    for key in keys:
        content = b"" if key == "k" else slides[0].read_bytes()  # an empty object stands for its folder
        client.put_object(Bucket="tiles", Key=f"any/{key}", Body=content)
    build_catalog([f"{s3_bucket}/any"], str(tmp_path / "catalog"))
    catalog = Catalog.load(str(tmp_path / "catalog"))
    assert {*catalog.slides()} == {f"{s3_bucket}/any/{key}" for key in keys} - {f"{s3_bucket}/any/k"}
    for row in range(len(catalog)):
        with contextlib.closing(catalog.open_slide(row)) as slide:
            assert slide.read_tile(0, 0, 0.25, 64).shape == (64, 64, 3)


@pytest.mark.parametrize("place", ["in", "in//", "//in", "[1]", ".."])
def test_a_series_is_whole_whatever_its_folder_is_called(
    s3_bucket: str, slides: list[Path], tmp_path: Path, place: str
) -> None:
    client = boto3.client("s3", region_name="us-east-1")
    paths = write_series(tmp_path / "series", slides[0])
    for path in paths:
        client.upload_file(str(path), "tiles", f"series/{place}/{path.name}")
    for number, source in enumerate(("", f"/{place}/{paths[1].name}")):
        out = str(tmp_path / f"{number}")
        build_catalog([f"{s3_bucket}/series{source}"], out)
        found = [Catalog.load(out).open_slide(f"{s3_bucket}/series/{place}/{paths[0].name}")]
        found.append(open_slide(found[0].uri))
        for slide in found:
            with contextlib.closing(slide):
                assert len(slide.level_dimensions) == 2
                assert slide.read_tile(0, 0, 1.0, 64).shape == (64, 64, 3)
    storage.remove(f"{s3_bucket}/series")


def test_damaged_notes_of_what_was_passed_over_are_begun_anew(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "catalog"
    (folder / "notes.xyz").touch()
    assert main(["catalog", str(folder), "--out", str(out)]) == 0
    for name in ("skipped.parquet", "rejected.parquet"):
        (out / name).write_bytes((out / name).read_bytes()[:-9])
    capsys.readouterr()
    assert main(["catalog", str(folder), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert all(f"{name}: not a whole Parquet file" in said for name in ("skipped.parquet", "rejected.parquet"))
    assert [Path(row["slide"]).name for row in pq.read_table(out / "rejected.parquet").to_pylist()] == ["c.svs"]
    assert [Path(row["file"]).name for row in pq.read_table(out / "skipped.parquet").to_pylist()] == ["notes.xyz"]


def test_a_second_mpp_changes_the_slides_it_concerns(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "catalog")
    command = ["catalog", str(folder), "--out", out]
    assert main([*command, "--slide-mpp", "0.5"]) == 0
    first, area = Catalog.load(out).fingerprint, column(out, "tissue_mm2")
    assert column(out, "mpp_from") == ["metadata", "metadata", "--slide-mpp"]
    capsys.readouterr()
    assert main([*command, "--slide-mpp", "0.25"]) == 0
    assert "3 slides: 0 added, 1 changed, 2 unchanged, 0 rejected" in capsys.readouterr().out
    assert column(out, "mpp") == [0.25, 0.25, 0.25]
    assert column(out, "tissue_mm2")[:2] == area[:2]
    # A quarter, but for what is filled and dropped, which is told by its size in µm.
    assert 0.15 < column(out, "tissue_mm2")[2] / area[2] < 0.6  # type: ignore[operator]
    assert Catalog.load(out).fingerprint != first
    # Built at once, it is the same.
    assert main(["catalog", str(folder), "--out", str(tmp_path / "fresh"), "--slide-mpp", "0.25"]) == 0
    assert Catalog.load(str(tmp_path / "fresh")).fingerprint == Catalog.load(out).fingerprint
    # A table goes before --slide-mpp, also when only that is given later; nothing given changes nothing.
    (tmp_path / "m.csv").write_text("slide;mpp\nc;0,4\n")
    assert main([*command, "--metadata", str(tmp_path / "m.csv")]) == 0
    assert (column(out, "mpp")[2], column(out, "mpp_from")[2]) == (0.4, "table")
    capsys.readouterr()
    assert main([*command, "--slide-mpp", "0.25"]) == main(command) == 0
    assert "1 changed" not in capsys.readouterr().out
    assert column(out, "mpp")[2] == 0.4
    assert main([*command, "--recheck"]) == 0
    assert "3 slides: 0 added, 3 changed, 0 unchanged" in capsys.readouterr().out
    assert column(out, "mpp")[2] == 0.4


def test_a_csv_that_contradicts_the_metadata_is_told_and_decides_if_asked_to(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = str(tmp_path / "catalog"), str(tmp_path / "m.csv")
    Path(table).write_text("slide,mpp\na,0.5\nb,0.26\nc,0.5\n")  # b's is 4 % off
    command = ["catalog", str(folder), "--out", out, "--metadata", table]
    for _ in range(2):  # also when nothing changed
        assert main(command) == 0
        told = capsys.readouterr().err
        assert f"{folder}/a.svs: its metadata says 0.25 µm/px, the table 0.5: the metadata counts" in told
        assert "--mpp-from csv" in told
        assert "b.svs" not in told
    assert column(out, "mpp") == [0.25, 0.25, 0.5]
    assert column(out, "own_mpp") == [0.25, 0.25, None]
    assert main([*command, "--mpp-from", "csv"]) == 0
    said = capsys.readouterr()
    assert "3 slides: 0 added, 2 changed, 1 unchanged" in said.out
    assert "metadata says" not in said.err
    assert column(out, "mpp") == [0.5, 0.26, 0.5]
    catalog = Catalog.load(out)
    opened = catalog.open_slide(0, None, Staging())
    assert opened.mpp == 0.5
    opened.close()
    # It is remembered, also of a slide that is looked at anew.
    os.utime(folder / "a.svs")
    assert main(["catalog", str(folder), "--out", out]) == 0
    assert "1 changed" in capsys.readouterr().out
    assert column(out, "mpp") == [0.5, 0.26, 0.5]
    # The same table without the option: the metadata counts again.
    assert main(command) == 0
    assert column(out, "mpp") == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("mpp", ["inf", "1e-9", "352", "0", "-1", "nan", "0.25 µm"])
def test_a_µm_px_that_is_no_microscope_s_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mpp: str
) -> None:
    table = tmp_path / "m.csv"
    table.write_text(f"slide,mpp\na,{mpp}\n")
    command = ["catalog", str(folder), "--out", str(tmp_path / "catalog")]
    if mpp != "nan":  # in a table, it is a missing value
        assert main([*command, "--metadata", str(table), "--mpp-from", "csv"]) == 2
        assert (
            f"a.svs: mpp '{mpp}' in the table; it is µm per pixel, a number from 0.02 to 20" in capsys.readouterr().err
        )
    if " " not in mpp:
        assert main([*command, f"--slide-mpp={mpp}"]) == 2
        assert "it is µm per pixel, a number from 0.02 to 20" in capsys.readouterr().err
    assert not (tmp_path / "catalog").exists()


@pytest.mark.parametrize("option", ["--out", "--metadata", "--masks", "SLIDES"])
def test_an_empty_address_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    given = {"SLIDES": str(folder), "--out": str(tmp_path / "catalog"), option: ""}
    slides = given.pop("SLIDES")
    try:
        status = main(["catalog", slides, *(word for pair in given.items() for word in pair)])
    except SystemExit as refused:  # by the parser
        status = refused.code
    assert status == 2
    assert "an address is empty; is a variable of the shell" in capsys.readouterr().err
    assert not (tmp_path / "catalog").exists()


@pytest.mark.parametrize("option", ["--metadata=m.csv", "--masks=m", "--slide-mpp=0.5", "--recheck", "--where=x = 1"])
def test_options_that_a_preview_alone_would_pass_over_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main(["catalog", "--out", str(tmp_path), "--preview", option]) == 2
    assert f"{option.split('=')[0]}: says how slides are looked at; name SLIDES, too" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04\x14\x00\x06,\xff",
        gzip.compress(b"slide,x\na,b\n"),
        "slide,x\na,b\n".encode("utf-16-le"),
        "slide,x\na,b\n".encode("utf-32"),
    ],
    ids=["workbook", "gzip", "utf-16 without its mark", "utf-32"],
)
def test_a_table_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.xlsx").write_bytes(content)
    with pytest.raises(ConfigError, match=r"m\.xlsx: no table of text; save it as CSV"):
        read_metadata(str(tmp_path / "m.xlsx"), None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_metadata_is_read_whatever_program_wrote_it(
    tmp_path: Path, encoding: str, separator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [["slide_id", "case_id", "organ"], ["0012", "0012", "Zäpfchen"], ["0013.svs", "0013", ""]]
    path = tmp_path / "m.csv"
    path.write_bytes("\r\n".join(separator.join(line) for line in lines).encode(encoding))
    expected = {"0012": {"patient": "0012", "organ": "Zäpfchen"}, "0013.svs": {"patient": "0013"}}
    assert read_metadata(str(path), None) == expected
    assert ("cp1252" in capsys.readouterr().err) == (encoding == "cp1252")


def test_a_separator_that_is_told_to_excel_is_taken(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"sep=|\r\nslide|organ, site\r\na|x, y\r\n")
    assert read_metadata(str(tmp_path / "m.csv"), None) == {"a": {"organ,_site": "x, y"}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('slide,patient\n"a,p1\nb,p2\n', "unexpected end of data"),
        ("slide,patient,patient\na,p1,p2\n", "two columns are called 'patient'"),
        ("slide,Patient,patient\na,p1,p2\n", "two columns are called 'patient'"),
        ("slide,patient\na,p1\n,p2\n", "row 2 has no slide"),
    ],
)
def test_a_table_of_which_rows_or_columns_would_be_lost_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_metadata(str(tmp_path / "m.csv"), None)


def test_every_file_that_is_seen_is_counted_and_named(
    folder: Path, tmp_path: Path, slides: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "catalog")
    for name in (".Trash-1000/files/t.svs", "@eaDir/a.svs/x.svs", ".ipynb_checkpoints/n.svs", "__MACOSX/._a.svs"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"junk")
    (folder / "._b.svs").write_bytes(b"junk")
    (folder / "x.vsi").write_bytes(b"other")
    (folder / "cut.svs").write_bytes(slides[0].read_bytes()[:5000])
    (folder / "gone.svs").symlink_to("nowhere")
    (folder / "round").symlink_to(folder)
    (folder / "me.svs").symlink_to("me.svs")
    os.mkfifo(folder / "pipe.svs")
    (folder / "closed").mkdir(mode=0)
    (folder / os.fsdecode(b"\xff.svs")).write_bytes(b"junk")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(folder / "socket"))
    everything = {str(path) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    everything = {uri.replace("\udcff", "\ufffd") for uri in everything}
    try:
        assert main(["catalog", str(folder), "--out", out, "--slide-mpp", "0.5"]) == 0
    finally:
        server.close()
        (folder / "closed").chmod(0o700)
    said = capsys.readouterr().out
    skipped = {row["file"]: row["reason"] for row in pq.read_table(f"{out}/skipped.parquet").to_pylist()}
    rejected = pq.read_table(f"{out}/rejected.parquet")["slide"].to_pylist()
    assert rejected == [str(folder / "cut.svs")]
    is_root = os.geteuid() == 0  # whom no folder is closed to
    wanted = everything | (set() if is_root else {str(folder / "closed")})
    assert {*skipped, *rejected, *column(out, "slide")} == wanted
    hidden = "in hidden and system folders"
    assert [skipped[str(folder / name)] for name in (".Trash-1000/files/t.svs", "__MACOSX/._a.svs")] == [hidden] * 2
    assert skipped[str(folder / "gone.svs")] == "links to nothing"
    assert skipped[str(folder / "me.svs")] == "links in a circle"
    assert skipped[str(folder / "round")] == "links to a folder above"
    assert "pipe" in skipped[str(folder / "pipe.svs")]
    num = len(skipped)
    assert (
        f"3 slides: 3 added, 0 changed, 0 unchanged, 1 rejected (reasons in {out}/rejected.parquet), {num} files"
        in said
    )
    # Another source's files stay named; what was skipped and is a slide now is not.
    (tmp_path / "more").mkdir()
    shutil.copy(slides[2], tmp_path / "more/d.svs")
    (tmp_path / "more/y.txt").write_text("x")
    assert main(["catalog", str(tmp_path / "more"), str(folder / "x.vsi"), "--out", out]) == 0
    again = pq.read_table(f"{out}/skipped.parquet")["file"].to_pylist()
    assert set(again) == (set(skipped) - {str(folder / "x.vsi")}) | {str(tmp_path / "more/y.txt")}


def test_a_pipe_that_is_named_is_refused_and_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.svs")
    for arguments in ([str(tmp_path / "pipe.svs")], [str(tmp_path), "--metadata", str(tmp_path / "pipe.svs")]):
        assert main(["catalog", *arguments, "--out", str(tmp_path / "catalog")]) == 2
        assert (
            capsys.readouterr().err == f"tilestream: {tmp_path}/pipe.svs: a pipe, a socket or a device; name a file\n"
        )


def test_names_as_long_as_a_disk_takes_them_and_with_any_letters_are_slides(folder: Path, tmp_path: Path) -> None:
    names = [
        "x" * 251 + ".svs",
        "ü" * 125 + ".svs",
        "a\nb.svs",
        "-a.svs",
        "a'\".svs",
        "a%20b.svs",
        "a*.svs",
        "a?b#c.svs",
    ]
    for name in names:
        shutil.copy(folder / "a.svs", folder / name)
    build_catalog([str(folder)], str(tmp_path / "catalog"), mpp=0.5)
    catalog = Catalog.load(str(tmp_path / "catalog"))
    assert {str(folder / name) for name in names} < set(catalog.slides())
    for row in range(len(catalog)):
        with contextlib.closing(catalog.open_slide(row, None, Staging())) as slide:
            assert slide.read_tile(0, 0, 0.5, 64).shape == (64, 64, 3)


def test_a_hidden_folder_that_is_named_is_searched(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / ".slides")
    for number, source in enumerate((".slides", ".slides/*.svs", ".sl*/*.svs")):
        assert build_catalog([str(tmp_path / source)], str(tmp_path / f"{number}"), mpp=0.5).added == 3


def test_an_error_of_ours_costs_its_slide_and_is_told_as_what_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streaming.catalog import inspection

    real = inspection.thumbnail

    def failing(slide: inspection.Slide) -> object:
        if slide.uri.endswith("a.svs"):
            raise ZeroDivisionError("by\nzero")
        return real(slide)

    monkeypatch.setattr(inspection, "thumbnail", failing)
    report = build_catalog([str(folder)], str(tmp_path / "catalog"), mpp=0.5)
    (rejected,) = report.rejected
    assert "unexpected ZeroDivisionError: by zero" in rejected.reason
    assert report.added == 2
