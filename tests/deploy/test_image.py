import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def locked(name: str) -> dict[str, Version]:
    """Versions that a lock gives to Python 3.11 on Linux, which the images have."""
    image = {"python_version": "3.11", "python_full_version": "3.11.7", "sys_platform": "linux"}
    lines = map(Requirement, (ROOT / name).read_text().splitlines())
    return {
        line.name: Version(next(iter(line.specifier)).version)
        for line in lines
        if line.marker is None or line.marker.evaluate(image)
    }


def requirements(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != project["name"]]


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    checked = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_both_images_come_from_a_base_pinned_by_digest_and_run_as_nobody_special() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)[1:]
    parents = {stage.split()[2]: stage.split()[0] for stage in stages}
    assert set(parents.values()) == {"${BASE}", "python", "base"}, "one base for all, given by the builder"
    assert parents["cpu"] == parents["cuda"] == "base"
    base, cpu, cuda = (next(s for s in stages if s.split()[2] == name) for name in ("base", "cpu", "cuda"))
    assert "\nUSER 1000:1000\n" in base
    assert "USER" not in cpu + cuda
    assert all("pip install --no-deps" in line for line in DOCKERFILE.read_text().splitlines() if "pip install" in line)


@pytest.mark.parametrize("base", ["debian:bookworm", "debian@sha256:0123"])
def test_a_base_without_a_digest_is_refused(base: str) -> None:
    check = re.search(r"^RUN (case .*?esac);", DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert check is not None
    refused = subprocess.run(["sh", "-c", check[1]], env={"BASE": base}, capture_output=True, text=True)
    assert (refused.returncode, "pin it by digest" in refused.stderr) == (
        (0, False) if "@sha256:" in base else (2, True)
    )


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-cpu.lock", "requirements-cuda.lock"])
def test_each_lock_has_every_direct_dependency_within_its_floor_and_ceiling(lock: str) -> None:
    versions = locked(lock)
    for requirement in requirements("cluster", *(["dev"] if lock == "requirements.lock" else [])):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, f"{requirement}: a floor and a ceiling"
        assert versions[requirement.name.lower()] in requirement.specifier, requirement


def test_images_hold_the_versions_that_the_tests_ran_with_and_no_development_tools() -> None:
    tested, cuda, cpu = (locked(f"requirements{name}.lock") for name in ("", "-cuda", "-cpu"))
    assert cuda.items() <= tested.items()
    assert cpu.items() <= cuda.items()
    assert {name for name in cuda if name not in cpu} == {
        name for name in cuda if name.startswith(("nvidia-", "cuda-", "triton"))
    }
    assert not {"pytest", "moto", "ruff"} & cuda.keys()
