import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from streaming.delivery.exported_metrics import METRICS, STAGES
from tests.deploy.manifests import KUBERAY, Manifest, render

FOLDER = KUBERAY / "components" / "monitoring"
# Grafana fills these in.
VARIABLES = {"$__rate_interval": "5m", "$gpu_hour": "4", "$reader_node_hour": "1.6", "$requests_1000": "0.0004"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Manifests by kind (the last of each) with monitoring on top."""
    manifests = render(tmp_path_factory.mktemp("site"), "overlays/aws", "monitoring")
    return {m["kind"]: m for m in manifests if m["metadata"]["name"] != "tilestream-env"}


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "dashboard.json").read_text())


def dashboard_queries() -> list[str]:
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    for variable, value in VARIABLES.items():
        queries = [query.replace(variable, value) for query in queries]
    return queries


def rules() -> list[dict[str, Any]]:
    return yaml.safe_load((FOLDER / "alerts.yaml").read_text())["spec"]["groups"][0]["rules"]


def exported_samples() -> set[str]:
    """Sample names that the code's declarations lead to; Ray puts `ray_` before."""
    return {
        f"ray_{name}{suffix}"
        for name, metric in METRICS.items()
        for suffix in (("_bucket", "_sum", "_count") if metric.bounds else ("",))
    }


def test_dashboard_and_alerts_ask_for_nothing_that_the_code_does_not_export() -> None:
    queries = [*dashboard_queries(), *(rule["expr"] for rule in rules())]
    asked = {name for query in queries for name in re.findall(r"ray_\w+", query)}
    assert asked
    assert asked <= exported_samples()
    stages = {stage for query in queries for stage in re.findall(r'stage="(\w+)"', query)}
    assert stages <= set(STAGES)


def test_the_dashboard_shows_every_metric_and_answers_the_four_questions() -> None:
    shown = {name for query in dashboard_queries() for name in re.findall(r"ray_(\w+)", query)}
    for name, metric in METRICS.items():
        assert any(other in shown for other in ((name,) if not metric.bounds else (f"{name}_bucket",))), name
    titles = " ".join(panel["title"].lower() for panel in dashboard()["panels"])
    for question in ("is the trainer waiting", "for which stage", "on which node", "costs an hour"):
        assert question in titles
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))


def test_the_overlay_provisions_the_dashboard_and_lets_prometheus_in(site: dict[str, Manifest]) -> None:
    assert json.loads(site["ConfigMap"]["data"]["tilestream.json"]) == dashboard()
    assert site["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    ports = [entry.get("ports") for entry in site["NetworkPolicy"]["spec"]["ingress"]]
    assert ports == [None, [{"port": 8265, "protocol": "TCP"}], [{"port": 8080, "protocol": "TCP"}]]
    for kind in ("PodMonitor", "PrometheusRule"):  # kube-prometheus-stack passes over what is not labelled so
        assert site[kind]["metadata"]["labels"] == {"release": "kube-prometheus-stack"}
    (endpoint,) = site["PodMonitor"]["spec"]["podMetricsEndpoints"]
    spec = site["RayCluster"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert ports[endpoint["port"]] == int(group["rayStartParams"]["metrics-export-port"]) == 8080


PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: apt-get install prometheus")
def test_prometheus_takes_every_query(tmp_path: Path) -> None:
    recorded = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(dashboard_queries())]
    groups = [{"name": "dashboard", "rules": recorded}, {"name": "alerts", "rules": rules()}]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": groups}))
    checked = subprocess.run([str(PROMTOOL), "check", "rules", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: apt-get install prometheus")
@pytest.mark.parametrize(
    ("alert", "bad", "good"),
    [
        ("TilestreamStalled", {"batches": "7x90", "step": "7x90"}, {"batches": "0+1x90", "step": "7x90"}),
        ("TilestreamTrainerWaits", {"wait_sum": "0+12x90", "wait_count": "0+60x90"},
         {"wait_sum": "0+1x90", "wait_count": "0+60x90"}),
        ("TilestreamTilesFail", {"failed": "0+10x90", "tiles": "0+1000x90"},
         {"failed": "0+1x90", "tiles": "0+1000x90"}),
        ("TilestreamStorageSlow", {"fetch": "0+100x90", "requests": "0+100x90"},
         {"fetch": "0+10x90", "requests": "0+100x90"}),
        ("TilestreamStorageBreaksOff", {"retries": "0+10x90", "requests": "0+100x90"},
         {"retries": "0+1x90", "requests": "0+100x90"}),
        ("TilestreamStorageThrottles", {"held": "0+50x90", "requests": "0+100x90"},
         {"held": "0+1x90", "requests": "0+100x90"}),
        ("TilestreamLossNaN", {"loss": "5" + " NaN" * 90}, {"loss": "5x90"}),
    ],
)  # fmt: skip
def test_an_alert_fires_in_its_trouble_and_only_then(
    alert: str, bad: dict[str, str], good: dict[str, str], tmp_path: Path
) -> None:
    series = {
        "step": "ray_tilestream_step",
        "batches": "ray_tilestream_batches_total",
        "loss": "ray_tilestream_loss",
        "wait_sum": 'ray_tilestream_batch_wait_seconds_sum{instance="a",WorkerId="1"}',
        "wait_count": 'ray_tilestream_batch_wait_seconds_count{instance="a",WorkerId="1"}',
        "failed": 'ray_tilestream_tiles_replaced_total{reason="failed"}',
        "tiles": "ray_tilestream_tiles_total",
        "fetch": 'ray_tilestream_stage_seconds_total{stage="fetch"}',
        "requests": "ray_tilestream_fetch_requests_total",
        "retries": "ray_tilestream_fetch_retries_total",
        "held": "ray_tilestream_fetch_held_seconds_total",
    }
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "alerts", "rules": rules()}]}))

    def fires(values: dict[str, str]) -> bool:
        """Whether the alert fires after 80 minutes of samples, one a minute."""
        query = {
            "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})',
            "eval_time": "80m",
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        case = {
            "interval": "1m",
            "input_series": [{"series": series[name], "values": text} for name, text in values.items()],
            "promql_expr_test": [query],
        }
        cases = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [case]}
        (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases))
        command = [str(PROMTOOL), "test", "rules", "cases.yaml"]
        tested = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        # Promtool fails as well where it cannot read the case: then there is no such line.
        assert tested.returncode == 0 or "exp:" in tested.stderr + tested.stdout, tested.stderr
        return tested.returncode == 0

    assert fires(bad)
    assert not fires(good)
