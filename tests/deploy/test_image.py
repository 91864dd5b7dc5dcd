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
    lines = map(Requirement, re.findall(r"^[^ #\\][^\\\n]*", (ROOT / name).read_text(), flags=re.MULTILINE))
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
    for image in (cpu, cuda):
        assert re.findall(r"^USER (.*)$", base + image, flags=re.MULTILINE)[-1] == "1000:1000"
    assert all("pip install --no-deps" in line for line in DOCKERFILE.read_text().splitlines() if "pip install" in line)


def test_our_own_code_is_the_last_layer_and_has_the_compiler_that_triton_wants() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)[1:]
    for name in ("cpu", "cuda"):
        (stage,) = (stage for stage in stages if stage.split()[2] == name)
        copied = re.findall(r"^COPY --from=(\S+)", stage, flags=re.MULTILINE)
        assert copied == [f"{name}-libraries", "code"]
    assert "gcc" in stage
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in stage, "where GKE mounts the driver"
    (libraries,) = (stage for stage in stages if stage.split()[2] == "cuda-libraries")
    assert "streaming" not in libraries


def test_what_images_install_has_hashes_and_torch_for_cpus_comes_alone() -> None:
    for name in ("requirements-cpu.lock", "requirements-cuda.lock"):
        packages = re.split(r"\n(?=\S)", (ROOT / name).read_text().strip())
        assert all("--hash=sha256:" in package for package in packages), name
    torch = re.search(r"sed -nE '(.*)' /src/requirements-cuda.lock > /src/torch.txt", DOCKERFILE.read_text())
    setuptools = re.search(r"sed -n '(.*)' /src/requirements-cpu.lock > /src/build.txt", DOCKERFILE.read_text())
    assert torch is not None
    assert setuptools is not None

    def chosen(*words: str) -> list[str]:
        return subprocess.run(["sed", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    cuda = locked("requirements-cuda.lock")
    pinned = [f"{name}=={cuda[name]}" for name in ("torch", "torchvision")]
    assert chosen("-nE", torch[1], "requirements-cuda.lock") == pinned
    first, *hashes = chosen("-n", setuptools[1], "requirements-cpu.lock")
    assert first.startswith("setuptools==")
    assert hashes
    assert all(line.strip().startswith("--hash=") for line in hashes)


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
    elsewhere = {"torch", "torchvision"} if lock == "requirements-cpu.lock" else set[str]()
    for requirement in requirements("cluster", "embed", "train", *(["dev"] if lock == "requirements.lock" else [])):
        if requirement.name in elsewhere:
            continue
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, f"{requirement}: a floor and a ceiling"
        assert versions[requirement.name.lower()] in requirement.specifier, requirement


def test_images_hold_the_versions_that_the_tests_ran_with_and_no_development_tools() -> None:
    tested, cuda, cpu = (locked(f"requirements{name}.lock") for name in ("", "-cuda", "-cpu"))
    assert cuda.items() <= tested.items()
    assert cpu.items() <= cuda.items()
    assert {name for name in cuda if name not in cpu} == {
        name for name in cuda if name.startswith(("nvidia-", "cuda-", "triton")) or name in ("torch", "torchvision")
    }
    assert not {"pytest", "moto", "ruff"} & cuda.keys()


def test_clusters_are_said_to_be_of_the_ray_that_the_images_hold() -> None:
    text = (ROOT / "deploy/kuberay/base/raycluster.yaml").read_text()
    assert re.findall(r"rayVersion: (\S+)", text) == [str(locked("requirements-cuda.lock")["ray"])]
