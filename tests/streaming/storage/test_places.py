"""Where addresses are read: mirrors, public buckets, and how versions are told there."""

from pathlib import Path

import pytest

from streaming import storage
from streaming.errors import ConfigError, SlideError
from streaming.mirrors import default_mirrors, read_mirrors
from streaming.storage.ranges import open_ranges, read_range

KEY = "s3://idc-open-data/series/instance.dcm"


def test_a_mirror_moves_what_is_below_it_and_nothing_else() -> None:
    mirrors = {"s3://idc-open-data": "/data/idc", "s3://idc-open-data/series": "gs://copy/of", "s3://b": "s3://c/d/"}
    options = {"mirrors": mirrors, "key": "k"}
    place = storage.place_of(KEY, options)
    assert (place.uri, place.options, place.by_size) == ("gs://copy/of/instance.dcm", {"key": "k"}, True)
    assert storage.place_of("s3://idc-open-data/other/a.dcm", options).uri == "/data/idc/other/a.dcm"
    assert storage.place_of("s3://idc-open-data", options).uri == "/data/idc"
    assert storage.place_of("s3://b/x/y.svs", options).uri == "s3://c/d/x/y.svs"
    for uri in ("s3://bb/x.svs", "/s3://b/x", "gs://b/x"):
        assert storage.place_of(uri, options) == storage.Place(uri, {"key": "k"}, False)


def test_a_mirror_brings_options_of_its_own_over_those_of_the_run() -> None:
    mirrors = {"s3://idc-open-data": "s3://copy?endpoint_url=http://127.0.0.1:9000&anon=true"}
    place = storage.place_of(KEY, {"mirrors": mirrors, "endpoint_url": "http://mine", "timeout_s": 3})
    assert place.uri == "s3://copy/series/instance.dcm"
    assert place.options == {"endpoint_url": "http://127.0.0.1:9000", "anon": True, "timeout_s": 3}


def test_public_buckets_are_read_without_an_account_unless_one_is_given() -> None:
    assert storage.place_of(KEY).options == {"anon": True, "region": "us-east-1"}
    assert storage.place_of("s3://tcga-2-open/id/a.svs", {"timeout_s": 9}).options["anon"] is True
    assert storage.place_of("gs://idc-open-data/a/b.dcm").options == {"token": "anon"}
    assert storage.place_of(KEY, {"key": "k", "secret": "s"}).options == {"key": "k", "secret": "s"}
    assert storage.place_of("s3://mine/a.svs").options == {}
    assert (storage.place_of(KEY).by_size, storage.place_of("s3://mine/a.svs").by_size) == (True, False)


def test_the_variable_serves_where_no_option_tells_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILESTREAM_MIRRORS", "s3://a=/data/a, s3://b=gs://c?token=anon")
    assert default_mirrors() == {"s3://a": "/data/a", "s3://b": "gs://c?token=anon"}
    assert storage.place_of("s3://a/x").uri == "/data/a/x"
    assert storage.place_of("s3://a/x", {"mirrors": {"s3://a": "/other"}}).uri == "/other/x"
    for wrong in ("s3://a", "s3://a=", "/data=s3://a"):
        with pytest.raises(ConfigError, match="FROM=TO"):
            read_mirrors([wrong])


def test_files_go_to_a_mirror_and_back_under_their_own_address(tmp_path: Path) -> None:
    file = storage.ObjectInfo("s3://idc-open-data/series/other.dcm", 7, "tag")
    place = storage.place_of(KEY, {"mirrors": {"s3://idc-open-data": str(tmp_path)}})
    there = place.there(file)
    assert there.uri == f"{tmp_path}/series/other.dcm"
    assert place.named(there) == storage.ObjectInfo(file.uri, 7, "")


def test_an_object_that_is_told_by_its_size_is_refused_in_another_and_bound_to_the_first_version_seen(
    tmp_path: Path, s3_bucket: str
) -> None:
    uri = f"{s3_bucket}/places/a"
    for at in (uri, str(tmp_path / "a")):
        storage.write_bytes(at, b"0123456789")
        with pytest.raises(SlideError, match="10 bytes, not 11"):
            read_range(_opened(at, 11), 0, 4)
    ranges = _opened(uri, 10)
    assert read_range(ranges, 2, 5) == b"234"
    storage.write_bytes(uri, b"abcdefghij")
    with pytest.raises(SlideError, match="changed since"):
        read_range(ranges, 2, 5)


def _opened(uri: str, size: int):
    ranges = open_ranges(uri, None, "", size)
    assert ranges is not None
    return ranges
