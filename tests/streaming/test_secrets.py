"""A secret given as an option reaches the storage, and nothing that is written or told."""

import copy
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from ray.data._internal.metadata_exporter import sanitize_for_struct

from streaming import storage
from streaming.reading.reader import ReaderOptions
from streaming.secrets import Secret, hidden, revealed
from tests.faulty_server import FaultyServer
from trainer.cli import main
from trainer.run.config import parse_config

MARK = "5ecret"
OPTIONS = {
    "key": f"{MARK}-key",
    "secret": f"{MARK}-secret",
    "sas_token": f"sig={MARK}",
    "headers": {"Authorization": f"Bearer {MARK}"},
    "query": f"X-Amz-Signature={MARK}",
    "proxy": f"http://user:{MARK}@proxy",
    "endpoint_url": f"https://user:{MARK}@host",
}


def test_secrets_are_hidden_from_whoever_does_not_ask_for_them() -> None:
    told = hidden({**OPTIONS, "region": "eu-west-1"})
    assert told["region"] == "eu-west-1"
    assert revealed(told) == {**OPTIONS, "region": "eu-west-1"}
    assert hidden(told) == told == pickle.loads(pickle.dumps(told)) == copy.deepcopy(told)
    assert all(isinstance(told[name], Secret) for name in OPTIONS)
    reader = ReaderOptions(storage_options=OPTIONS)
    # What Ray writes of an operator's arguments where its events are exported.
    for text in (repr(told), repr(reader), str(sanitize_for_struct(reader)), str(asdict(reader))):
        assert MARK not in text


def test_a_configuration_that_is_written_has_no_secret(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = tmp_path / "run.yaml"
    source.write_text(yaml.safe_dump({"data": {"storage_options": {**OPTIONS, "region": "eu-west-1"}}}))
    config = parse_config(yaml.safe_load(source.read_text()), [])
    assert revealed(config.data.storage_options)["secret"] == OPTIONS["secret"]
    assert yaml.safe_load(config.to_yaml())["data"]["storage_options"] == {"region": "eu-west-1"}
    assert main(["train", str(source), "--print_config"]) == 0
    told = capsys.readouterr()
    assert "eu-west-1" in told.out
    assert MARK not in told.out + told.err


def test_a_catalog_made_with_secrets_has_none_and_says_none(
    capsys: pytest.CaptureFixture[str], slides: list[Path], tmp_path: Path
) -> None:
    with FaultyServer(slides[0].read_bytes()) as server:
        out, query = tmp_path / "catalog", ["--storage", f"query={OPTIONS['query']}"]
        assert main(["catalog", f"{server.url}/a.svs", "--out", str(out), *query]) == 0
        server.mood, server.befalls_all = lambda n: "403", True
        assert main(["catalog", f"{server.url}/b.svs?{OPTIONS['query']}", "--out", str(out)]) == 2
        assert main(["catalog", f"{server.url}/b.svs", "--out", str(out), "--verbose", *query]) == 2
        told = capsys.readouterr()
        assert "access denied" in told.err
        assert MARK not in told.out + told.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if MARK.encode() in path.read_bytes()]
    assert storage.read_table(str(out / "slides.parquet")).num_rows == 1
