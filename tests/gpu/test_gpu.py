"""What a GPU must do as a CPU does. Without one, each check is made of a CPU in its place: so its code is tested."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_parts.checks import CHECKS, STEPS, TERMS, Check, compared, run_check
from benchmarks.gpu_parts.speed import Clock

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Lightning's, of a GPU that is not used, and the compiler's own
]


@pytest.fixture(params=["cpu", "cuda"])
def on_gpu(request: pytest.FixtureRequest) -> bool:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return request.param == "cuda"


@pytest.mark.parametrize("name", CHECKS)
def test_it_does_what_a_cpu_does(name: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not on_gpu:
        torch.compiler.set_default_backend("aot_eager")  # what generates code takes minutes
    try:
        check = run_check(name, on_gpu)
    finally:
        torch.compiler.set_default_backend(None)
    assert check.holds, check


def test_a_check_that_breaks_fails_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(on_gpu: bool) -> Check:
        raise RuntimeError("out of\n order")

    monkeypatch.setitem(CHECKS, "broken", broken)
    assert run_check("broken", False) == Check("broken", False, "RuntimeError: out of order")


def test_losses_of_which_one_is_another_are_told_apart() -> None:
    rows = [dict.fromkeys(TERMS, 2.0 + step) for step in range(STEPS)]
    assert compared("", rows, rows, 1e-6).holds
    other = [*rows[:-1], {**rows[-1], "ibot": 2.1 + STEPS - 1}]
    assert not compared("", other, rows, 1e-3).holds
    assert compared("", other, rows, 1e-2).holds


def test_the_clock_counts_from_the_last_warm_step_and_what_lies_between_steps() -> None:
    clock = Clock(gpu=False)
    clock._marks = [(0.0, 5.0), (6.0, 7.0), (7.5, 8.0), (8.0, 9.0), (99.0, 100.0)]
    assert clock.seconds(skip=2) == (2.0, 0.5)


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("no GPU here")
    assert gpu.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu"] is None


def test_speeds_and_traces_of_both_networks_come_from_constant_tiles_and_from_the_stream(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--small", "--only", "speed", "--json", "--out", str(tmp_path / "traces"), "--folder", str(tmp_path)]
    assert gpu.main(given) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(speed["model"], speed["source"]) for speed in found["speeds"]} == {
        *(("ViT-S/14", "constant"), ("ViT-L/14", "constant"), ("ViT-S/14", "stream")),
    }
    for speed in found["speeds"]:
        assert speed["tiles_per_s"] > 0
        assert speed["memory_gb"] > 0
        assert 0 <= speed["idle_share"] < 1
    assert [Path(trace).is_file() for trace in found["traces"]] == [True, True]
