"""The package as it is installed: built here, in environments that have what its extras ask for and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.trainer.publish.test_export import saved

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What a node of readers does without.
TRAINING = {"torch", "torchvision", "timm", "lightning", "pytorch-lightning", "scikit-learn", "matplotlib", "h5py"}

Commands = Callable[..., subprocess.CompletedProcess[str]]


def distributions(*extras: str) -> set[str]:
    """Names of all that pip would install with these extras, as it is installed here."""
    found, open_ends = set[tuple[str, str]](), [("tilestream", extra) for extra in ("", *extras)]
    while open_ends:
        name, extra = open_ends.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        optional = PROJECT["optional-dependencies"]
        if name == "tilestream":  # as the file says, which may be newer than what is installed
            texts = optional[extra] if extra else PROJECT["dependencies"]
        else:
            texts = metadata.requires(name) or []
        for wanted in map(Requirement, texts):
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                open_ends += [(canonicalize_name(wanted.name), more) for more in ("", *wanted.extras)]
    return {name for name, _ in found} - {"tilestream"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what is in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("streaming", "trainer"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", out]
    subprocess.run([*build, source], check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Commands]:
    """Makes an environment of the wheel and what its extras ask for; gives what runs commands in it."""

    def install(*extras: str) -> Commands:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=False, symlinks=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        for name in distributions(*extras):
            for file in metadata.files(name) or []:
                if file.parts[0] == ".." or not file.locate().exists():
                    continue  # programs, and compiled modules that are recorded and were never made
                place = packages / file
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    place.symlink_to(file.locate())
        pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "-q", "--no-deps"]
        subprocess.run([*pip, "--no-index", wheel], check=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}

        def run(*words: object) -> subprocess.CompletedProcess[str]:
            program, *rest = map(str, words)
            command = [str(folder / "bin" / program), *rest]
            return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)

        return run

    return install


@pytest.fixture(scope="module")
def reader(installed: Callable[..., Commands]) -> Commands:
    """Commands on a node that has no extra at all."""
    return installed()


def test_a_node_of_readers_needs_nothing_that_trains() -> None:
    assert not TRAINING & distributions()
    assert not TRAINING & distributions("cluster")
    assert distributions("embed") & TRAINING == TRAINING - {"lightning", "pytorch-lightning"}
    assert distributions("train") >= distributions("embed") | {"lightning", "pytorch-lightning"}
    assert distributions("dev") >= distributions("train") | distributions("cluster")


def test_the_wheel_has_its_licence_its_types_and_its_presets(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (about,) = (name for name in names if name.endswith("METADATA"))
        text = file.read(about).decode()
    assert {"streaming/py.typed", "trainer/py.typed", "trainer/configs/debug.yaml"} <= names
    assert f"{Path(about).parent}/licenses/LICENSE" in names
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert not {name for name in names if name.startswith(("tests", "benchmarks"))}


def test_what_is_cited_is_this_package() -> None:
    # The fields that the Citation File Format 1.2.0 demands, and what both files tell.
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["message"]
    told = {"title": PROJECT["name"], "abstract": PROJECT["description"], "authors": PROJECT["authors"]}
    same = {name: PROJECT[name] for name in ("version", "license", "keywords")}
    assert {name: cited[name] for name in (*told, *same)} == told | same


def test_the_sizes_on_the_first_page_are_those_of_what_is_installed() -> None:
    told = (ROOT / "README.md").read_text()
    for line, extras in ((r"make demo .*?([\d.]+) GB", ("dev",)), (r"'\.\[train\]' .*?([\d.]+) GB", ("train",)),
                         (r"install \. .*?([\d.]+) GB", ())):  # fmt: skip
        (gb,) = re.findall(line, told)
        files = [file.locate() for name in distributions(*extras) for file in metadata.files(name) or []]
        assert sum(os.path.getsize(file) for file in files if os.path.exists(file)) / 1e9 == pytest.approx(
            float(gb), rel=0.2
        ), extras


def test_the_version_is_said_once_and_images_are_of_it() -> None:
    version = PROJECT["version"]
    files = subprocess.run(["git", "ls-files", "deploy", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    tags = [
        tag
        for name in files.stdout.split()
        if (ROOT / name).suffix in (".md", ".yaml", "")
        for tag in re.findall(r"(?:tilestream:|newTag: )([\d.]+)-(?:cpu|cuda)", (ROOT / name).read_text())
    ]
    assert set(tags) == {version}
    assert not [path for path in (*ROOT.glob("streaming/**/*.py"), *ROOT.glob("trainer/**/*.py"))
                if f'"{version}"' in path.read_text()]  # fmt: skip


@pytest.mark.slow
def test_slides_are_catalogued_streamed_and_looked_after_where_nothing_that_trains_is_installed(
    reader: Commands, slides: list[Path], tmp_path: Path
) -> None:
    missing = reader("python", "-c", "import torch")
    assert missing.returncode
    assert "No module named 'torch'" in missing.stderr
    assert reader("tilestream", "--version").stdout == f"tilestream {PROJECT['version']}\n"
    made = reader("tilestream", "catalog", slides[0], slides[1], "--out", tmp_path / "catalog")
    assert (made.returncode, "2 slides: 2 added" in made.stdout) == (0, True), made.stderr
    stream = reader("tilestream", "stream", tmp_path / "catalog", "--steps", "0:2", "--batch", "8", "--mpp", "0.5")
    assert (stream.returncode, "16 tiles of 2 steps" in stream.stdout) == (0, True), stream.stderr
    looked = reader("tilestream", "doctor", "--no-ray", "--catalog", tmp_path / "catalog")
    assert "ok    libraries" in looked.stdout, looked.stderr
    assert "ok    tiles" in looked.stdout


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("train", "debug"), "train"),
        (("embed", "runs/a", "slides", "--out", "out"), "embed"),
        (("capacity", "debug", "--gpus", "1", "--tiles-per-second-per-gpu", "1"), "embed"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_command_whose_extra_is_missing_names_it(reader: Commands, words: tuple[str, ...], extra: str) -> None:
    refused = reader("tilestream", *words)
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stderr.splitlines()
    assert re.match(rf"tilestream {words[0]}: \w+ is not installed here; .* `{extra}` brings it: .*\[{extra}\]", line)


@pytest.mark.long
def test_a_model_is_scored_and_exported_without_lightning(
    installed: Callable[..., Commands], coloured: Path, tmp_path: Path
) -> None:
    run, embed = saved(tmp_path / "run"), installed("embed")
    assert "No module named 'lightning'" in embed("python", "-c", "import lightning").stderr
    for words in (
        ("evaluate", run, coloured, "--task", "knn", "--k", "3", "--out", tmp_path / "scores"),
        ("export", run, "--out", tmp_path / "model"),
        ("capacity", "vits14", "--gpus", "8", "--tiles-per-second-per-gpu", "40"),
    ):
        done = embed("tilestream", *words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "model/config.json").exists()
