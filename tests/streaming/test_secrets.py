"""A secret given as an option reaches the storage, and nothing that is written or told."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from ray.data._internal.metadata_exporter import sanitize_for_struct

from streaming import storage
from streaming.reading.reader import ReaderOptions
from streaming.secrets import Secret, hidden, revealed, without_values
from streaming.storage.places import place_of
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
    signed = f"https://account.blob.core.windows.net/?sv=2024&sig={MARK}"
    assert MARK not in repr(hidden({"endpoint_url": signed}))
    assert told["region"] == "eu-west-1"
    assert revealed(told) == {**OPTIONS, "region": "eu-west-1"}
    assert hidden(told) == told == pickle.loads(pickle.dumps(told)) == copy.deepcopy(told)
    assert all(isinstance(told[name], Secret) for name in OPTIONS)
    reader = ReaderOptions(storage_options=OPTIONS)
    # What Ray writes of an operator's arguments where its events are exported.
    for text in (repr(told), repr(reader), str(sanitize_for_struct(reader)), str(asdict(reader))):
        assert MARK not in text


def test_mirrors_that_open_a_storage_are_hidden_and_others_told(monkeypatch: pytest.MonkeyPatch) -> None:
    mirrors = {"s3://a": f"s3://b?region=x&secret={MARK}", "s3://c": "gs://d?token=anon", "s3://e": "/data/e"}
    told = hidden({"mirrors": mirrors})
    assert MARK not in repr(told)
    assert revealed(told) == {"mirrors": mirrors}
    assert place_of("s3://a/x.svs", told).uri == "s3://b/x.svs"
    assert revealed(place_of("s3://a/x.svs", told).options) == {"region": "x", "secret": MARK}
    monkeypatch.setenv("TILESTREAM_MIRRORS", ",".join(f"{source}={target}" for source, target in mirrors.items()))
    config = parse_config({}, [])
    assert config.data.slide_options == told
    assert parse_config(yaml.safe_load(config.to_yaml()), []).data.mirrors == {
        name: mirrors[name] for name in ("s3://c", "s3://e")
    }
    assert main(["train", "--fields"]) == 0


def test_a_command_line_is_shown_without_its_secrets() -> None:
    arguments = ["tilestream", "stream", f"https://h/c?X-Amz-Signature={MARK}", "--storage", "region=x"]
    arguments += [
        "--storage",
        f"secret={MARK}",
        f"--storage=key={MARK}",
        "--storage",
        f"endpoint_url=http://u:{MARK}@h",
    ]
    arguments += [
        "--mirrors",
        f"s3://a=s3://b?secret={MARK}",
        f"--mirrors=s3://a=s3://b?secret={MARK}",
        "--storage",
        MARK,
    ]
    arguments += ["--data.storage_options", f"{{secret: {MARK}}}", f"--data.storage_options.secret={MARK}"]
    arguments += [
        "--data.mirrors",
        f"{{s3://a: s3://b?secret={MARK}}}",
        "--data.storage_options.secret",
        MARK,
        "--steps",
        "0:2",
    ]
    assert without_values(arguments) == [
        *("tilestream", "stream", "https://h/c", "--storage", "region=x", "--storage", "secret=***"),
        *(
            "--storage=key=***",
            "--storage",
            "endpoint_url=***",
            "--mirrors",
            "s3://a=s3://b",
            "--mirrors=s3://a=s3://b",
        ),
        *("--storage", "***", "--data.storage_options", "***", "--data.storage_options.secret=***"),
        *("--data.mirrors", "***", "--data.storage_options.secret", "***", "--steps", "0:2"),
    ]


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
    capsys: pytest.CaptureFixture[str], slides: list[Path], in_this_process: None, tmp_path: Path
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


SIGNED = f"SERVER/a?X-Amz-Signature={MARK}"


@pytest.fixture(scope="module")
def denying() -> Iterator[str]:
    """A server that says no to all."""
    with FaultyServer(b"", lambda n: "403", befalls_all=True) as server:
        yield server.url


@pytest.mark.parametrize(
    "arguments",
    [
        ("catalog", SIGNED, "--out", "c"),
        (
            "catalog",
            "s3://b/a",
            "--out",
            "c",
            "--storage",
            f"endpoint_url=http://user:{MARK}@HOST",
            "--storage",
            f"key={MARK}",
            "--storage",
            f"secret={MARK}",
            "--verbose",
        ),
        ("catalog", "SLIDE", "--out", SIGNED),
        ("catalog", "SLIDE", "--out", "c", "--metadata", SIGNED),
        ("catalog", "SLIDE", "--out", "c", "--masks", SIGNED),
        ("catalog", "idc:gtex", "--out", "c", "--idc-index", SIGNED),
        ("catalog", "SLIDE", "--out", "c", "--storage", MARK),
        ("catalog", "SLIDE", "--out", "c", "--storage", f"={MARK}"),
        ("catalog", "s3://b/a", "--out", "c", "--storage", f"secrett={MARK}"),
        ("catalog", "SLIDE", "--out", "c", "--storge", f"secret={MARK}"),
        ("catalog", "SLIDE", "--out", "c", f"--secret={MARK}"),
        ("catalog", "SLIDE", "--out", "c", "--mirrors", f"b=s3://c?secret={MARK}"),
        (
            "catalog",
            "s3://b/a",
            "--out",
            "c",
            "--mirrors",
            f"s3://b=s3://c?secret={MARK}&endpoint_url=SERVER",
        ),
        ("catalog", "gs://b/a", "--out", "c", "--storage", f"token=ya29.{MARK}", "--verbose"),
        ("catalog", "s3://b/a", "--out", "c", "--storage", f"proxy=user:{MARK}@::", "--verbose"),
        ("catalog", "s3://b/a", "--out", "c", "--storage", f"endpoint_url=user:{MARK}@host", "--verbose"),
        ("catalog", f"ftp://user:{MARK}@HOST/a.svs", "--out", "c"),
        ("stream", SIGNED, "--verbose"),
        ("train", SIGNED),
        ("train", "broken.yaml"),
        ("train", "odd.yaml"),
        ("train", "typo.yaml"),
        ("train", "debug", "--data.storage_options", MARK),
        ("train", "debug", "--data.storage_options", f"{{secret: {MARK}"),
        ("train", "debug", "--data.storage_option", f"{{secret: {MARK}}}"),
        ("train", "debug", "--data.mirrors", f"s3://c?secret={MARK}"),
        ("train", "debug", "--data.catalog", SIGNED, "--verbose"),
        ("train", "debug", "--data.catalog", "CATALOG", "--run.out", SIGNED),
        ("train", "debug", "--data.catalog", "CATALOG", "--run.out", "run", "--model.weights", SIGNED),
        ("embed", SIGNED, "SLIDE", "--out", "e"),
        ("evaluate", SIGNED, "tiles", "--out", "e"),
        ("evaluate", "test_vit", SIGNED),
        ("export", SIGNED, "--out", "m"),
        ("report", SIGNED, "--out", "r.html"),
        ("replay", SIGNED, "--step", "1"),
        ("picture", "map", SIGNED, "--out", "m.html"),
        ("lazyslide", SIGNED, "--out", "m"),
        ("sweep", "debug", "--data.catalog", SIGNED, "--evaluate", SIGNED, "--out", "s"),
        ("capacity", "debug", "--gpus", "1", "--tiles-per-second-per-gpu", "9", "--costs", SIGNED),
        ("capacity", "debug", "--gpus", "1", "--tiles-per-second-per-gpu", "9", "--prices", SIGNED),
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_an_error_tells_no_secret(
    arguments: tuple[str, ...],
    slides: list[Path],
    catalog: str,
    denying: str,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text(f"data:\n  storage_options: {{secret: {MARK}\nrun: [")
    (tmp_path / "odd.yaml").write_text(f"data:\n  storage_options: {MARK}")
    (tmp_path / "typo.yaml").write_text(f"data:\n  storage_option: {{secret: {MARK}}}")
    real = {"SLIDE": str(slides[0]), "CATALOG": catalog, "SERVER": denying, "HOST": denying.removeprefix("http://")}
    for name, value in real.items():
        arguments = tuple(argument.replace(name, value) for argument in arguments)
    try:
        status = main([*arguments])
    except SystemExit as left:
        status = left.code
    told = capsys.readouterr()
    assert status == 2
    assert MARK not in told.out + told.err
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    assert not [path for path in written if MARK.encode() in path.read_bytes()]
