import json
from pathlib import Path

import pytest
import yaml

from streaming.operate.capacity import StageCosts, costs_of_size
from trainer.cli import main

PRICES = Path(__file__).parents[2] / "deploy" / "prices.yaml"
COMMAND = ("capacity", "vits14", "--gpus", "64", "--tiles-per-second-per-gpu", "40", "--latency-ms", "30")


def numbers(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*COMMAND, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_bill_is_the_capacity_times_the_price_list(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prices = yaml.safe_load(PRICES.read_text()) | {"read_gb": 0.09, "cross_zone_gb": 0.02}
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(prices))
    found = numbers(capsys, "--prices", str(tmp_path / "prices.yaml"))
    assert found["tiles_s"] == 64 * 40
    hour = {cost["what"]: cost["an_hour"] for cost in found["costs"]}
    assert hour["GPUs"] == 64 * prices["gpu_hour"]
    assert hour["reader nodes"] == found["reader_nodes"] * prices["reader_node_hour"]
    assert hour["GETs"] == pytest.approx(found["requests_s"] * 3.6 * prices["requests_1000"])
    assert hour["bytes out of the storage"] == pytest.approx(found["nbytes_s"] * 3600 / 1e9 * 0.09)
    assert hour["pixels to the trainers"] == pytest.approx(found["network_nbytes_s"] * 3600 / 1e9 * 0.02)
    assert hour["all"] == pytest.approx(sum(value for what, value in hour.items() if what != "all"))
    million = next(cost["a_million_tiles"] for cost in found["costs"] if cost["what"] == "all")
    assert million == pytest.approx(hour["all"] / (64 * 40 * 3600 / 1e6))


def test_the_table_names_what_is_needed_and_the_first_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--prices", str(PRICES)]) == 0
    printed = capsys.readouterr().out
    for what in ("readers", "reader nodes", "GETs/s", "bytes out of the storage", "object store", "costs, USD"):
        assert what in printed
    assert printed.splitlines()[-1].startswith("first limit: ")


def test_without_a_rate_a_gpus_own_is_estimated_and_its_source_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", "debug", "--gpus", "2", "--prices", str(PRICES)]) == 0
    printed = capsys.readouterr().out
    assert "tiles/s, estimated: 40% of the 989 TFLOP/s of an H100; give what yours does" in printed
    assert "built in, measured on 2026-11-28" in printed
    assert main(["capacity", "debug", "--gpus", "2", "--prices", str(PRICES), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run, (*_, all_costs) = found["run"], found["costs"]
    assert run["hours"] == pytest.approx(run["tiles"] / found["tiles_s"] / 3600)
    assert run["cost"] == pytest.approx(run["hours"] * all_costs["an_hour"])


def test_what_trains_on_cpus_is_not_reckoned_with_a_gpu_s_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", "debug"]) == 2
    assert "debug: it trains on CPUs (train.gpu)" in capsys.readouterr().err
    assert main(["capacity", "debug", "--tiles-per-second-per-gpu", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiles_s"] == 50


def test_slower_storage_and_larger_tiles_take_more_readers(capsys: pytest.CaptureFixture[str]) -> None:
    near = numbers(capsys)
    assert numbers(capsys, "--latency-ms", "300")["readers"] > near["readers"]
    large = numbers(capsys, "--data.tile_size", "512")
    assert large["network_nbytes_s"] == pytest.approx(4 * near["network_nbytes_s"])
    assert large["readers"] > near["readers"]
    assert costs_of_size(StageCosts(), 256) == StageCosts()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gpu_hour": -1}, "gpu_hour is -1"),
        ({"gpu_hour": "four"}, "gpu_hour is 'four'"),
        ({"tpu_hour": 1}, "unknown: tpu_hour"),
        ({"reader_node_cores": 0}, "reader_node_cores is 0"),
    ],
)
def test_a_price_list_that_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: dict, told: str
) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(PRICES.read_text()) | change))
    assert main([*COMMAND, "--prices", str(path)]) == 2
    assert told in capsys.readouterr().err


def test_measured_costs_take_the_place_of_the_built_in_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"requests": 4.0}))
    assert numbers(capsys, "--costs", str(path))["requests_s"] == 64 * 40 * 4
    path.write_text(json.dumps({"request": 4.0}))
    assert main([*COMMAND, "--costs", str(path)]) == 2
    assert "'request'" in capsys.readouterr().err
