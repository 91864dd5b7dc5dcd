"""Addresses as people have them: odd keys, URLs, links, pipes; what is secret in one stays so."""

import os
import traceback
from pathlib import Path
from urllib.parse import quote

import boto3
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.latency_server import serve
from streaming import storage
from streaming.catalog.sources import find_slides
from streaming.errors import MissingError, StorageError
from streaming.slide import open_slide
from streaming.storage import addresses
from streaming.storage.ranges import open_ranges, read_range
from streaming.storage.staging import Staging
from tests.faulty_server import FaultyServer

SECRET = "X-Amz-Signature=5ecret"
ODD_KEYS = (
    "a//b",
    "../c",
    "./d",
    "e#1",
    "f?sig=1",
    "g+h",
    "i[1]",
    "ä.svs",
    "j%20k",
    "l m",
    "100%",
    "tab\tx",
    "n\\o",
    "p::q",
)


@pytest.mark.parametrize("key", ODD_KEYS)
def test_keys_of_s3_are_listed_and_read_as_they_stand(s3_bucket: str, key: str, tmp_path: Path) -> None:
    whole, content = f"odd/{ODD_KEYS.index(key)}/{key}", key.encode() * 100
    client = boto3.client("s3", region_name="us-east-1")
    client.put_object(Bucket="tiles", Key=whole, Body=content)
    uri = f"{s3_bucket}/{whole}"
    (info,), outright = storage.expand(f"{s3_bucket}/odd/{ODD_KEYS.index(key)}")
    assert (info.uri, info.size, outright) == (uri, len(content), False)
    assert storage.stat(uri) == info
    assert storage.read_bytes(uri) == content
    ranges = open_ranges(uri)
    assert read_range(ranges, 3, 50) == content[3:50]
    assert ranges.tag == info.version
    assert Path(Staging(folder=str(tmp_path)).fetch(info, None)).read_bytes() == content
    storage.remove(uri)
    assert not storage.exists(uri)


def test_an_empty_object_beside_a_folder_of_its_name_stands_for_the_folder(s3_bucket: str) -> None:
    client = boto3.client("s3", region_name="us-east-1")
    for key, content in (("beside/x", b""), ("beside/x/", b""), ("beside/x/a.svs", b"a"), ("beside/y/", b"")):
        client.put_object(Bucket="tiles", Key=key, Body=content)
    assert [info.uri for info in storage.expand(f"{s3_bucket}/beside/x")[0]] == [f"{s3_bucket}/beside/x/a.svs"]
    assert storage.expand(f"{s3_bucket}/beside/y") == ([], False)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda name: name not in (".", "..")))
def test_a_name_in_a_url_is_spelled_in_one_way_and_asked_for_as_it_is(name: str) -> None:
    parts = [part for part in name.replace("?", "").split("/") if part not in ("", ".", "..")]
    if not parts or parts[-1] != parts[-1].strip("/"):
        return
    raw, quoted = "/".join(parts), "/".join(quote(part, safe="") for part in parts)
    uri = addresses.canonical(f"https://host/{quoted}")
    assert addresses.canonical(uri) == uri
    assert addresses.split(uri) == ("https://host", raw)
    assert addresses.name_of(uri) == parts[-1]


def test_a_url_copied_from_a_browser_or_a_signed_one_is_read_and_no_error_shows_its_signature() -> None:
    content = bytes(range(256)) * 10
    with FaultyServer(content) as server:
        for path in ("My%20Slide.svs", "My Slide.svs", "a%2Fb.svs", "c//d.svs", f"e.svs?{SECRET}&x=1"):
            uri = f"{server.url}/{path}"
            assert storage.stat(uri).size == len(content)
            assert storage.read_bytes(uri) == content
            assert read_range(open_ranges(uri), 5, 90) == content[5:90]
        signed = f"{server.url}/e.svs?{SECRET}"
        server.befalls_all = True
        for mood in ("403", "404", "400:no"):
            server.mood = lambda n, mood=mood: mood
            for ask in (storage.stat, storage.read_bytes, open_slide, find_slides_of):
                with pytest.raises(StorageError) as caught:
                    ask(signed)
                told = "".join(traceback.format_exception(caught.value))
                assert "e.svs" in told
                assert "5ecret" not in told
        assert "query=" in told_by(lambda: storage.expand(signed))


def find_slides_of(uri: str) -> None:
    find_slides([uri], None)


def told_by(ask: object) -> str:
    with pytest.raises(StorageError) as caught:
        ask()
    return str(caught.value)


def test_a_query_given_as_an_option_goes_with_each_request(slides: list[Path]) -> None:
    paths = list[str]()

    class Noting(FaultyServer):
        def answer(self, command: str, path: str, *rest: object) -> object:
            paths.append(path)
            return super().answer(command, path, *rest)

    with Noting(slides[0].read_bytes()) as server:
        slide = open_slide(f"{server.url}/a.svs", {"query": SECRET})
        assert slide.read_tile(0, 0, 0.5, 64).shape == (64, 64, 3)
        assert SECRET not in slide.uri
        assert set(paths) == {f"/a.svs?{SECRET}"}


def test_a_web_server_without_ranges_serves_slides_that_are_copied(slides: list[Path], tmp_path: Path) -> None:
    class Whole(FaultyServer):
        def answer(self, command: str, path: str, headers: dict[str, str], content: bytes) -> object:
            return super().answer(command, path, {}, content)

    with Whole(slides[0].read_bytes()) as server:
        slide = open_slide(f"{server.url}/a.svs", staging=Staging(folder=str(tmp_path)))
        assert slide.backend == "openslide"
        here = open_slide(str(slides[0]))
        assert np.array_equal(slide.read_region((0, 0), 0, (300, 200)), here.read_region((0, 0), 0, (300, 200)))


def test_links_are_what_they_point_to_and_circles_end(slides: list[Path], tmp_path: Path) -> None:
    cohort, other = tmp_path / "cohort", tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "two.svs").write_bytes(slides[1].read_bytes())
    cohort.mkdir()
    (cohort / "one.svs").symlink_to(slides[0])
    (cohort / "folder").symlink_to(other)
    (other / "deep" / "up").symlink_to(other)
    (cohort / "gone.svs").symlink_to(tmp_path / "gone")
    os.mkfifo(cohort / "pipe.svs")
    found = find_slides([str(cohort)], None)
    assert [info.uri for info in found] == [str(cohort / "folder" / "deep" / "two.svs"), str(cohort / "one.svs")]
    for info in found:
        assert info == storage.stat(info.uri)
        assert info.size == os.stat(info.uri).st_size
        assert open_slide(info.uri, expected=info).backend == "blocks"
    for pattern in ("*.svs", "**/*.svs"):
        assert str(cohort / "one.svs") in [info.uri for info in storage.expand(f"{cohort}/{pattern}")[0]]
    with pytest.raises(StorageError, match="a pipe, a socket or a device"):
        storage.stat(str(cohort / "pipe.svs"))
    with pytest.raises(MissingError):
        storage.stat(str(cohort / "gone.svs"))


def test_long_names_empty_files_and_double_colons_are_read(tmp_path: Path) -> None:
    for name in ("ä" * 125 + ".svs", "a::b.svs", "a b#c?.svs"):
        uri = str(tmp_path / name)
        storage.write_bytes(uri, b"pixels")
        assert storage.read_bytes(uri) == b"pixels"
        assert storage.stat(uri).uri == uri
    storage.write_bytes(str(tmp_path / "empty"), b"")
    assert storage.stat(str(tmp_path / "empty")).size == 0


def test_an_empty_object_is_read_wherever_it_is(s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/empty/a", b"")
    with FaultyServer(b"") as server:
        for uri in (f"{s3_bucket}/empty/a", f"{server.url}/a"):
            assert storage.stat(uri).size == 0
            assert storage.read_bytes(uri) == b""


def test_a_slide_behind_a_web_server_is_the_same_by_both_spellings(slides: list[Path], tmp_path: Path) -> None:
    (tmp_path / "My Slide.svs").write_bytes(slides[0].read_bytes())
    with serve(tmp_path, 0.0) as server:
        (info,) = find_slides([f"{server.url}/My Slide.svs", f"{server.url}/My%20Slide.svs"], None)
        assert open_slide(info.uri).backend == "blocks"
