"""URIs, listings, whole writes, and what storage errors say."""

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pyarrow as pa
import pytest

from streaming import storage
from streaming.errors import StorageError
from streaming.storage import patience


def put(bucket: str, *keys: str) -> None:
    client = boto3.client("s3", region_name="us-east-1")
    for key in keys:
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=key.encode())


def names(uri: str) -> list[str]:
    return [info.uri.removeprefix(uri.split("*")[0].rstrip("/")).lstrip("/") for info in storage.expand(uri)[0]]


def test_a_folder_a_glob_and_a_file_expand_to_their_objects_locally_and_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    keys = ("b.svs", "a.svs", "deep/c.tiff", "deep/[1].svs", "of [1]/d.svs")
    put(s3_bucket, *[f"expand/{key}" for key in keys], "expand/empty/")
    for key in keys:
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_text(f"expand/{key}")
    for root in (str(tmp_path), f"{s3_bucket}/expand"):
        assert [i.uri for i in storage.expand(root)[0]] == sorted(f"{root}/{key}" for key in keys)
        assert [i.uri for i in storage.expand(f"{root}/*.svs")[0]] == [f"{root}/a.svs", f"{root}/b.svs"]
        assert len(storage.expand(f"{root}/**/*.svs")[0]) == 4
        # A name with a glob's characters is that file where it exists.
        (info,), outright = storage.expand(f"{root}/deep/[1].svs")
        assert outright
        assert (info.uri, info.size) == (f"{root}/deep/[1].svs", len("expand/deep/[1].svs"))
        with pytest.raises(StorageError, match="no file matches"):
            storage.expand(f"{root}/*.ndpi")
        # So is a folder's.
        assert [i.uri for i in storage.expand(f"{root}/of [1]/")[0]] == [f"{root}/of [1]/d.svs"]
        with pytest.raises(StorageError, match="not found"):
            storage.expand(f"{root}/none")
        assert storage.list_names(f"{root}/deep") == ["[1].svs", "c.tiff"]
        assert storage.list_names(f"{root}/none") == []


def test_an_object_overwritten_with_as_many_bytes_is_another_version(s3_bucket: str, tmp_path: Path) -> None:
    for uri in (str(tmp_path / "a"), f"{s3_bucket}/version/a"):
        storage.write_bytes(uri, b"one")
        before = storage.stat(uri)
        if storage.is_local(uri):
            os.utime(uri, (1, 1))
        storage.write_bytes(uri, b"two")
        assert storage.stat(uri).size == before.size
        assert storage.stat(uri).version != before.version
        assert storage.read_bytes(uri) == b"two"
        storage.remove(uri)
        assert not storage.exists(uri)
        storage.remove(uri)  # nothing there is fine


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"before")

    def half() -> None:
        with storage.whole_file(str(target)) as temporary:
            Path(temporary).write_bytes(b"hal")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"before"


def test_a_table_comes_back_as_written_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.parquet")
    table = pa.table({"slide": ["a", "b"], "x": [1, 2]})
    storage.write_table(uri, table)
    assert storage.read_table(uri).equals(table)
    storage.write_bytes(uri, storage.read_bytes(uri)[:-9])
    with pytest.raises(StorageError, match="not a whole Parquet file"):
        storage.read_table(uri)


def test_reading_a_table_leaves_no_thread_that_python_s_end_could_abort(tmp_path: Path) -> None:
    # In a process whose Arrow has no threads yet.
    uri = str(tmp_path / "table.parquet")
    table = pa.table({name: range(3000) for name in "abcdefgh"}, metadata={"version": "3"})
    storage.write_table(uri, table)
    assert storage.read_table(uri).equals(table, check_metadata=True)
    code = (
        "import os, sys\nfrom streaming import storage\nbefore = os.listdir('/proc/self/task')\n"
        "storage.read_table(sys.argv[1])\nassert os.listdir('/proc/self/task') == before"
    )
    done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_address_without_storage_or_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_first_contact_s", 1.0)
    with pytest.raises(StorageError, match="tape://a: no storage for this address"):
        storage.stat("tape://a")
    options = {"key": "a", "secret": "b", "endpoint_url": "http://127.0.0.1:9", "region": "us-east-1"}
    with pytest.raises(StorageError, match="check AWS_ENDPOINT_URL"):
        storage.stat("s3://bucket/a.svs", options)


def test_one_place_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.canonical("a/../b/") == str(tmp_path / "b")
    assert storage.canonical(f"file://{tmp_path}/b") == str(tmp_path / "b")
    assert storage.canonical("s3://bucket/b/") == "s3://bucket/b"
    assert storage.join("s3://bucket/b/", "c", "d") == "s3://bucket/b/c/d"
    assert storage.name_of("s3://bucket/b/c.svs") == "c.svs"
