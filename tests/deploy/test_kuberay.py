import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import KUBERAY, Manifest, groups, nbytes, pod_templates, ray_spec, render

CRDS = Path(__file__).parents[2].parent / "shared" / "kuberay-crds"
KUBERNETES = kubernetes_validate.latest_version()
# Of these kinds there is no schema in the tests' packages.
WITHOUT_SCHEMA = ("kueue.x-k8s.io/", "monitoring.coreos.com/")

CLOUDS = ("aws", "gcp", "azure", "minio")
SITES = [
    ("base",),
    *((f"overlays/{name}",) for name in (*CLOUDS, "spot", "kueue")),
    ("overlays/azure", "redis", "spot", "monitoring"),
    ("overlays/aws", "job", "kueue", "spot", "redis"),
]


@pytest.fixture(scope="module", params=SITES, ids="+".join)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return render(tmp_path_factory.mktemp("site"), *request.param)


def closed(schema: Any) -> Any:
    """A CRD's schema that refuses unknown fields, as the API server prunes them."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        schema["additionalProperties"] = False
    return schema


@functools.cache
def crd_validator(kind: str) -> jsonschema.Draft202012Validator:
    if not CRDS.exists():
        pytest.skip(f"no KubeRay CRDs at {CRDS}: Ray's kinds are not validated")
    crd = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=yaml.CSafeLoader)
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "additionalProperties": True}
    return jsonschema.Draft202012Validator(closed(schema))


@functools.cache
def follows_core_schema(manifest: str) -> None:
    """Many sites have the same manifest; the schemas are large."""
    kubernetes_validate.validate(json.loads(manifest), KUBERNETES, strict=True)


def of_ray(site: list[Manifest]) -> list[Manifest]:
    return [manifest for manifest in site if manifest["apiVersion"] == "ray.io/v1"]


def test_core_kinds_follow_their_schemas(site: list[Manifest]) -> None:
    for manifest in site:
        if manifest["apiVersion"] != "ray.io/v1" and not manifest["apiVersion"].startswith(WITHOUT_SCHEMA):
            follows_core_schema(json.dumps(manifest))
        for pod in pod_templates(manifest):
            core = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod.spec}
            follows_core_schema(json.dumps(core))


def test_ray_kinds_follow_kuberays_schemas(site: list[Manifest]) -> None:
    ray_kinds = of_ray(site)
    assert len(ray_kinds) == 1, "a cluster of one's own or a job's, not both"
    for manifest in ray_kinds:
        crd_validator(manifest["kind"]).validate(manifest)


def test_the_schema_check_refuses_a_misspelt_field(tmp_path: Path) -> None:
    manifest = of_ray(render(tmp_path, "base"))[0]
    manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(jsonschema.ValidationError, match="enviroment"):
        crd_validator("RayCluster").validate(manifest)


def test_every_container_is_bounded_pinned_and_confined(site: list[Manifest]) -> None:
    for manifest in site:
        for pod in pod_templates(manifest):
            assert pod.spec["securityContext"]["runAsNonRoot"] is True, pod.where
            assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod.where
            assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys(), pod.where
            assert not any("hostPath" in volume for volume in pod.spec.get("volumes", [])), pod.where
            containers = [*pod.spec["containers"], *pod.spec.get("initContainers", [])]
            for container in containers:
                assert_confined(container, f"{pod.where} {container['name']}")
                repository, _, tag = container["image"].rpartition(":")
                assert repository, f"{pod.where}: {container['image']} has no tag"
                assert "latest" not in tag, pod.where
        if manifest["kind"] in ("RayCluster", "RayJob"):
            options = ray_spec(manifest).get("autoscalerOptions")
            assert (options is not None) == ray_spec(manifest)["enableInTreeAutoscaling"]
            if options:
                assert options["version"] == "v2"
                assert_confined(options, "autoscaler")


def assert_confined(container: Manifest, where: str) -> None:
    for bound in ("requests", "limits"):
        assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"][bound].keys(), f"{where}: {bound}"
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True, where
    assert security["allowPrivilegeEscalation"] is False, where
    assert security["capabilities"] == {"drop": ["ALL"]}, where


def test_a_training_whose_head_is_lost_is_started_again_on_a_new_cluster(site: list[Manifest]) -> None:
    for manifest in site:
        if manifest["kind"] == "RayJob":
            queued = "kueue.x-k8s.io/queue-name" in manifest["metadata"].get("labels", {})
            assert manifest["spec"]["backoffLimit"] == (0 if queued else 3), "Kueue requeues it by itself"


def test_no_secret_is_written_in_a_manifest(site: list[Manifest]) -> None:
    secret = re.compile("password|secret|token|access_key|account_key", re.IGNORECASE)
    for manifest in site:
        assert manifest["kind"] != "Secret", "Secrets are made by hand or by the operator"
        if manifest["kind"] == "ConfigMap":
            assert not [key for key in manifest["data"] if secret.search(key)]
        for pod in pod_templates(manifest):
            for container in pod.spec["containers"]:
                for entry in container.get("env", []):
                    assert "value" not in entry or not secret.search(entry["name"]), f"{pod.where} {entry['name']}"
        if manifest["kind"] in ("RayCluster", "RayJob"):
            redis = ray_spec(manifest).get("gcsFaultToleranceOptions")
            assert redis is None or "valueFrom" in redis["redisPassword"]


def test_only_the_clusters_own_pods_and_the_operator_get_in(site: list[Manifest]) -> None:
    (policy,) = [m for m in site if m["kind"] == "NetworkPolicy" and m["metadata"]["name"] == "tilestream"]
    assert policy["spec"]["podSelector"] == {}, "every pod of the namespace"
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    own, operator, *prometheus = policy["spec"]["ingress"]
    assert all(entry["ports"] == [{"port": 8080, "protocol": "TCP"}] for entry in prometheus)
    assert own == {"from": [{"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "tilestream"}}}]}
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]
    selector = operator["from"][0]["podSelector"]["matchLabels"]
    assert selector == {"app.kubernetes.io/name": "kuberay-operator"}
    for manifest in site:
        for pod in pod_templates(manifest):
            assert pod.labels["app.kubernetes.io/part-of"] == "tilestream", pod.where


def test_nobody_works_on_the_head_and_nobody_joins_without_a_token(site: list[Manifest]) -> None:
    for manifest in of_ray(site):
        spec = ray_spec(manifest)
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"


def test_readers_and_trainers_are_told_apart_by_labels_and_scale_apart(site: list[Manifest]) -> None:
    for manifest in of_ray(site):
        head, readers, trainers = groups(manifest)
        assert [g["labels"]["tilestream-role"] for g in (head, readers, trainers)] == ["head", "reader", "trainer"]
        for group in (readers, trainers):
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        gpus = [
            "nvidia.com/gpu" in g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in groups(manifest)
        ]
        assert gpus == [False, False, True]
        for group in groups(manifest):
            # The autoscaler of version 2 replaces pods itself.
            assert group["template"]["spec"]["restartPolicy"] == "Never"


def test_object_stores_fit_into_shared_memory_and_shared_memory_into_the_container(site: list[Manifest]) -> None:
    for manifest in of_ray(site):
        for group in groups(manifest):
            container, volumes = group["template"]["spec"]["containers"][0], group["template"]["spec"]["volumes"]
            by_name = {volume["name"]: volume["emptyDir"] for volume in volumes}
            by_path = {mount["mountPath"]: by_name[mount["name"]] for mount in container["volumeMounts"]}
            store = int(group["rayStartParams"]["object-store-memory"])
            shm = by_path["/dev/shm"]
            assert shm["medium"] == "Memory"
            assert store < nbytes(shm["sizeLimit"]) <= nbytes(container["resources"]["limits"]["memory"]) / 2
            scratch = by_path["/scratch"]
            assert group["rayStartParams"]["object-spilling-directory"] == "/scratch"
            on_disk = sum(nbytes(v["sizeLimit"]) for v in by_name.values() if v.get("medium") != "Memory")
            assert (
                nbytes(scratch["sizeLimit"]) <= on_disk <= nbytes(container["resources"]["limits"]["ephemeral-storage"])
            )
            assert {"/tmp", "/tmp/ray"} <= by_path.keys(), "the root file system is read-only"


def test_a_trainers_object_store_holds_twenty_global_batches(site: list[Manifest]) -> None:
    for manifest in of_ray(site):
        trainers = groups(manifest)[2]
        assert int(trainers["rayStartParams"]["object-store-memory"]) > 19 * 4096 * 256 * 256 * 3


def test_long_running_pods_are_probed_and_guarded(site: list[Manifest]) -> None:
    budgets = [m["spec"] for m in site if m["kind"] == "PodDisruptionBudget"]
    classes = {m["metadata"]["name"]: m["value"] for m in site if m["kind"] == "PriorityClass"}
    assert classes["tilestream-trainer"] > classes["tilestream-reader"]
    for manifest in of_ray(site):
        for group in groups(manifest):
            spec, role = group["template"]["spec"], group["labels"]["tilestream-role"]
            assert spec["priorityClassName"] in classes
            assert {"readinessProbe", "livenessProbe"} <= spec["containers"][0].keys()
            (guard,) = [b for b in budgets if b["selector"]["matchLabels"]["tilestream-role"] == role]
            # With pods of a custom resource, Kubernetes takes nothing but a whole number of minAvailable.
            assert isinstance(guard["minAvailable"], int)
            if role == "trainer":
                assert guard["minAvailable"] >= group["maxReplicas"], "a drain must never evict a rank"
        readers = groups(manifest)[1]["template"]["spec"]
        (spread,) = readers["topologySpreadConstraints"]
        assert spread["topologyKey"] == "kubernetes.io/hostname"
        assert spread["labelSelector"]["matchLabels"]["tilestream-role"] == "reader"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_spot_is_for_readers_alone_whatever_the_cloud_adds(cloud: str, tmp_path: Path) -> None:
    head, readers, trainers = groups(of_ray(render(tmp_path, f"overlays/{cloud}", "spot"))[0])

    def operators(group: Manifest) -> set[str]:
        affinity = group["template"]["spec"]["affinity"]["nodeAffinity"]
        terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        return {expression["operator"] for term in terms for expression in term["matchExpressions"]}

    assert operators(readers) == {"In"}
    assert operators(head) == operators(trainers) == {"NotIn"}
    assert "podAffinity" in readers["template"]["spec"]["affinity"], "near the trainers still"


@pytest.mark.parametrize(
    ("cloud", "annotation"),
    [
        ("aws", "eks.amazonaws.com/role-arn"),
        ("gcp", "iam.gke.io/gcp-service-account"),
        ("azure", "azure.workload.identity/client-id"),
    ],
)
def test_clouds_give_access_by_workload_identity(cloud: str, annotation: str, tmp_path: Path) -> None:
    site = render(tmp_path, f"overlays/{cloud}", "job")
    (account,) = [m for m in site if m["kind"] == "ServiceAccount"]
    assert annotation in account["metadata"]["annotations"]
    for manifest in site:
        for pod in pod_templates(manifest):
            assert pod.spec["serviceAccountName"] == account["metadata"]["name"], pod.where


def test_a_queued_training_has_a_fixed_size_and_waits_for_kueue(tmp_path: Path) -> None:
    site = render(tmp_path, "overlays/kueue")
    (job,) = of_ray(site)
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tilestream"
    for group in groups(job)[1:]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    (queue,) = [m for m in site if m["kind"] == "ClusterQueue"]
    quota = {r["name"]: r["nominalQuota"] for r in queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]}
    wanted = sum(g.get("replicas", 1) * int(g["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
                 for g in groups(job))  # fmt: skip
    assert wanted <= int(quota["cpu"])


def test_the_jobs_command_line_is_one_that_tilestream_takes(tmp_path: Path) -> None:
    from trainer.run.config import read_config

    (job,) = of_ray(render(tmp_path, "base", "job"))
    program, command, preset, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("tilestream", "train")
    config = read_config(preset, overrides)
    assert config.data.reader_labels == groups(job)[1]["labels"]
    assert config.train.rank_labels == groups(job)[2]["labels"]
    assert config.train.ranks <= groups(job)[2]["maxReplicas"]


def test_every_folder_of_the_manifests_is_rendered_by_these_tests() -> None:
    tested = {part for site in SITES for part in site}
    assert {f"overlays/{path.name}" for path in (KUBERAY / "overlays").iterdir()} <= tested
    assert {path.name for path in (KUBERAY / "components").iterdir()} <= tested
