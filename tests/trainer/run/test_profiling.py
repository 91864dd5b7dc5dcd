"""What a run says of its own speed: a trace of some steps, and the share of a card's operations that it takes."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.trainer.run.test_resume import TINY
from trainer.cli import main
from trainer.recipe.flops import step_flops
from trainer.run import pace
from trainer.run.config import read_config
from trainer.run.fitted import fitted
from trainer.run.pace import Peak, peak_flops


def test_a_trace_has_as_many_steps_as_were_asked_for_and_the_metrics_their_share_of_the_peak(
    catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pace.PEAKS, "cpu", Peak(bfloat16=0.5, float32=0.25))
    more = ("--train.steps", "8", "--train.accumulate", "2", "--run.out", str(tmp_path / "run"))
    given = [*TINY, *more, "--data.catalog", catalog]
    assert main(["train", "debug", "--debug", "--profile", "2", *given]) == 0
    trace = tmp_path / "run/profile/steps-00000006-to-00000007.json.gz"
    assert f"trace of steps 6 to 7: {trace}" in capsys.readouterr().err
    with gzip.open(trace) as file:
        names = Counter(str(event["name"]) for event in json.load(file)["traceEvents"])
    assert names["Optimizer.step#AdamW.step"] == 2
    assert names["aten::scaled_dot_product_attention"] >= 2 * 2 * 12, "both rounds of them"
    config, _ = fitted(read_config("debug", given))
    flops = step_flops(config.recipe, 4).total
    for row in pq.read_table(tmp_path / "run/metrics.parquet").to_pylist():
        assert row["flops_utilisation"] == pytest.approx(row["tiles_per_s"] / 4 * flops / 0.25e12)


def test_a_short_run_is_traced_at_its_end_and_no_steps_are_refused(
    catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*TINY, "--train.steps", "2", "--data.catalog", catalog, "--run.out", str(tmp_path / "run")]
    assert main(["train", "debug", "--debug", "--profile", "0", *given]) == 2
    assert "--profile 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", "debug", "--debug", "--profile", "1", *given]) == 0
    assert [path.name for path in (tmp_path / "run/profile").iterdir()] == ["steps-00000002-to-00000002.json.gz"]
    assert "flops_utilisation" not in pq.read_schema(tmp_path / "run/metrics.parquet").names, "of what is no known card"


@pytest.mark.parametrize(
    ("card", "bfloat16", "float32"),  # by the cards' data sheets, without sparsity
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA A10G", None, None),  # another card than the A10
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(card: str, bfloat16: float | None, float32: float | None) -> None:
    assert peak_flops(card, "bf16-mixed") == (bfloat16 and pytest.approx(1e12 * bfloat16))
    assert peak_flops(card, "32-true") == (float32 and pytest.approx(1e12 * float32))
