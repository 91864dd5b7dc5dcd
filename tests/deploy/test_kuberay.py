import functools
import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import KUBERAY, Manifest, groups, lets_in, lets_out, nbytes, pod_templates, ray_spec, render
from trainer.run.config import Config, read_config
from trainer.run.dry_run import model_size, room_of_node

CRDS = Path(__file__).parent / "crds"
KUBERNETES = kubernetes_validate.latest_version()
# Of these kinds there is no schema in the tests' packages.
WITHOUT_SCHEMA = ("kueue.x-k8s.io/", "monitoring.coreos.com/")

# The operator's pod as Helm installs it and as `kubectl apply -k` does.
OPERATORS = (
    {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"},
    {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"},
)
CLOUDS = ("aws", "gcp", "azure", "minio")
SITES = [
    ("base",),
    *((f"overlays/{name}",) for name in (*CLOUDS, "spot", "kueue")),
    ("overlays/azure", "redis", "spot", "monitoring"),
    ("overlays/aws", "spot", "staging", "job", "kueue"),
    ("overlays/gcp", "one-gpu", "monitoring", "job"),
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
    schema = json.loads(gzip.decompress((CRDS / f"ray.io_{kind.lower()}s.v1.json.gz").read_bytes()))
    schema["properties"]["metadata"] = {"type": "object", "additionalProperties": True}
    return jsonschema.Draft202012Validator(closed(schema))


@functools.cache
def follows_core_schema(manifest: str) -> None:
    """Many sites have the same manifest; the schemas are large."""
    kubernetes_validate.validate(json.loads(manifest), KUBERNETES, strict=True)


def job_config(job: Manifest) -> Config:
    """What a RayJob trains, its command line taken apart as the head's shell does."""
    printed = subprocess.run(
        ["bash", "-c", f'tilestream() {{ printf "%s\\n" "$@"; }}; {job["spec"]["entrypoint"]}'],
        capture_output=True,
        text=True,
        check=True,
    )
    command, preset, *overrides = printed.stdout.splitlines()
    assert command == "train"
    return read_config(preset, overrides)


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


def test_a_training_is_started_again_for_weeks_and_no_pod_beside_it_can_end_it(site: list[Manifest]) -> None:
    for manifest in site:
        if manifest["kind"] == "RayJob":
            assert manifest["spec"]["backoffLimit"] == 20, "Kueue queues again what it evicts, not what fails"
            assert manifest["spec"]["submissionMode"] == "HTTPMode", "the submitter's pod may be evicted"
            assert not {"submitterPodTemplate", "submitterConfig"} & manifest["spec"].keys()


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, True), (2, False), (137, True), (143, True)])
def test_what_no_retry_mends_is_not_tried_again(status: int, again: bool, tmp_path: Path) -> None:
    (job,) = of_ray(render(tmp_path, "base", "job"))
    program = tmp_path / "tilestream"
    program.write_text(f"#!/bin/sh\nexit {status}\n")
    program.chmod(0o755)
    done = subprocess.run(["/bin/sh", "-c", job["spec"]["entrypoint"]], env={"PATH": str(tmp_path)})
    assert (done.returncode != 0) == again


@pytest.mark.parametrize("component", ["spot", "redis", "one-gpu", "staging", "kueue"])
def test_a_component_that_would_have_no_effect_is_refused(component: str, tmp_path: Path) -> None:
    order = (component, "job") if component == "kueue" else ("job", component)
    with pytest.raises(AssertionError, match=r"no matches for Id Ray(Cluster|Job)"):
        render(tmp_path, "base", *order)


def test_a_stop_has_the_time_that_a_last_checkpoint_takes(site: list[Manifest]) -> None:
    for manifest in of_ray(site):
        grace, drain = dict[str, int](), dict[str, int]()
        for group in groups(manifest):
            spec, role = group["template"]["spec"], group["labels"]["tilestream-role"]
            grace[role] = spec["terminationGracePeriodSeconds"]
            (drain[role],) = [
                int(entry["value"])
                for entry in spec["containers"][0]["env"]
                if entry["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
            ]
            # Ray itself ends some seconds after its drain; then comes SIGKILL.
            assert drain[role] + 10 <= grace[role], role
        assert drain["trainer"] >= 300
        assert drain["head"] >= grace["trainer"], "the head outlives its trainers"
        if manifest["kind"] == "RayJob":
            stop = yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
            assert int(stop) >= 300


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
    own, *others = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "tilestream"}}}]}
    assert all("namespaceSelector" in peer for rule in others for peer in rule["from"])
    for operator in OPERATORS:
        assert lets_in(policy, operator, 8265)
        assert not lets_in(policy, operator, 6379)
    assert not lets_in(policy, {"app": "anybody"}, 8265)
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
            by_name = {volume["name"]: volume["emptyDir"] for volume in volumes if "emptyDir" in volume}
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


def test_each_shipped_training_has_the_room_that_its_preset_needs(site: list[Manifest]) -> None:
    for manifest in of_ray(site):
        if manifest["kind"] != "RayJob":
            continue
        config = job_config(manifest)
        trainers = groups(manifest)[2]
        container = trainers["template"]["spec"]["containers"][0]
        limits, volumes = container["resources"]["limits"], trainers["template"]["spec"]["volumes"]
        sizes = {volume["name"]: nbytes(volume["emptyDir"]["sizeLimit"]) for volume in volumes}
        room = room_of_node(config, model_size(config), int(limits["nvidia.com/gpu"]))
        store = int(trainers["rayStartParams"]["object-store-memory"])
        assert room.memory + store < nbytes(limits["memory"])
        assert room.store < store
        (environment,) = [m["data"] for m in site if m["metadata"]["name"] == "tilestream-env"]
        assert environment["HF_HOME"].startswith("/scratch/"), "not below HOME, which is /tmp"
        assert 4 * 10**9 < room.weights < sizes["scratch"] / 4
        assert 2 * room.weights < sizes["tmp"], "what is exported is written there, with a copy"
        assert sum(sizes.values()) - sizes["shm"] <= nbytes(limits["ephemeral-storage"])
        assert config.train.most_ranks <= trainers["maxReplicas"] * int(limits["nvidia.com/gpu"])
        assert int(limits["cpu"]) >= int(limits["nvidia.com/gpu"]) * config.train.rank_cpus


def test_a_trainers_object_store_holds_twenty_global_batches(site: list[Manifest]) -> None:
    for manifest in of_ray(site):
        trainers = groups(manifest)[2]
        assert int(trainers["rayStartParams"]["object-store-memory"]) > 19 * 4096 * 256 * 256 * 3


def test_long_running_pods_are_probed_and_guarded(site: list[Manifest]) -> None:
    budgets = [m["spec"] for m in site if m["kind"] == "PodDisruptionBudget"]
    classes = {m["metadata"]["name"]: m["value"] for m in site if m["kind"] == "PriorityClass"}
    assert {m["preemptionPolicy"] for m in site if m["kind"] == "PriorityClass"} == {"Never"}, "of other teams' pods"
    assert classes["tilestream-trainer"] > classes["tilestream-reader"]
    for manifest in of_ray(site):
        for group in groups(manifest):
            spec, role = group["template"]["spec"], group["labels"]["tilestream-role"]
            assert spec["priorityClassName"] in classes
            assert {"readinessProbe", "livenessProbe"} <= spec["containers"][0].keys()
            # With pods of a custom resource, Kubernetes takes nothing but a whole number of minAvailable.
            guards = [b["minAvailable"] for b in budgets if b["selector"]["matchLabels"]["tilestream-role"] == role]
            assert all(isinstance(guard, int) for guard in guards)
            if role == "trainer":
                assert guards[0] >= 1000, "a drain must never evict a rank, however many there may be"
            elif manifest["kind"] == "RayJob" and role == "head":
                assert guards == [1]
            else:
                assert guards == [], "a cluster without a training must not hold up a drain"
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
    assert "podAffinity" in trainers["template"]["spec"]["affinity"], "in one zone still"


STORAGE, CLUSTER_DNS, NODE_CREDENTIALS = "52.219.170.1", "10.96.0.10", "169.254.169.254"


@pytest.mark.parametrize("cloud", ["base", *(f"overlays/{name}" for name in CLOUDS)])
def test_pods_reach_names_storage_and_kubernetes_and_no_nodes_credentials(cloud: str, tmp_path: Path) -> None:
    (policy,) = [m for m in render(tmp_path, cloud) if m["kind"] == "NetworkPolicy"]
    # A cluster's address, NodeLocal DNSCache, Cloud DNS of GKE, a node's own of EKS Auto Mode, IPv6.
    for resolver in (CLUSTER_DNS, "169.254.20.10", "169.254.169.254", "172.20.0.10", "fd00::a"):
        assert lets_out(policy, resolver, 53, "UDP")
        assert lets_out(policy, resolver, 53, "TCP")
    for address in (STORAGE, "2600:1f18::1"):
        assert lets_out(policy, address, 443)
        assert lets_out(policy, address, 80), "slides at http://"
        assert not lets_out(policy, address, 22)
    assert lets_out(policy, "10.0.0.1", 6443)
    for credentials in (NODE_CREDENTIALS, "fd00:ec2::254"):
        assert lets_out(policy, credentials, 80) == (cloud == "overlays/gcp" and credentials == NODE_CREDENTIALS)


def test_each_clouds_own_credentials_are_within_reach(tmp_path: Path) -> None:
    def policy(cloud: str) -> Manifest:
        (found,) = [m for m in render(tmp_path, f"overlays/{cloud}") if m["kind"] == "NetworkPolicy"]
        return found

    aws, gcp, azure = map(policy, ("aws", "gcp", "azure"))
    assert lets_out(aws, "169.254.170.23", 80), "EKS Pod Identity"
    assert lets_out(aws, "fd00:ec2::23", 80)
    assert lets_out(gcp, "169.254.169.252", 988), "GKE's metadata server, with Dataplane V2 and without"
    assert lets_out(gcp, NODE_CREDENTIALS, 80)
    assert lets_out(azure, "20.190.128.1", 443), "Microsoft Entra"


def test_jobs_have_no_account_of_kubernetes_and_the_autoscaler_has(site: list[Manifest]) -> None:
    token = "/var/run/secrets/kubernetes.io/serviceaccount"
    for manifest in of_ray(site):
        for group in groups(manifest):
            assert group["template"]["spec"]["automountServiceAccountToken"] is False
            container = group["template"]["spec"]["containers"][0]
            assert token not in [mount["mountPath"] for mount in container["volumeMounts"]]
        if options := ray_spec(manifest).get("autoscalerOptions"):
            (name,) = [mount["name"] for mount in options["volumeMounts"] if mount["mountPath"] == token]
            volumes = groups(manifest)[0]["template"]["spec"]["volumes"]
            (volume,) = [volume["projected"]["sources"] for volume in volumes if volume["name"] == name]
            paths = [
                volume[0]["serviceAccountToken"],
                volume[1]["configMap"]["items"][0],
                volume[2]["downwardAPI"]["items"][0],
            ]
            assert [entry["path"] for entry in paths] == ["token", "ca.crt", "namespace"], "as Kubernetes names them"


def test_a_queued_training_has_a_fixed_size_and_waits_for_kueue(tmp_path: Path) -> None:
    site = render(tmp_path, "overlays/kueue")
    (job,) = of_ray(site)
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tilestream"
    gpus = 0
    for group in groups(job)[1:]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus += group["replicas"] * int(limits.get("nvidia.com/gpu", 0))
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    (queue,) = [m for m in site if m["kind"] == "ClusterQueue"]
    quota = {r["name"]: r["nominalQuota"] for r in queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]}
    assert gpus == job_config(job).train.most_ranks
    for resource in quota:
        wanted = sum(
            group.get("replicas", 1)
            * nbytes(group["template"]["spec"]["containers"][0]["resources"]["requests"].get(resource, 0))
            for group in groups(job)
        )
        assert wanted <= nbytes(quota[resource]), resource


def test_the_jobs_command_line_is_one_that_tilestream_takes(tmp_path: Path) -> None:
    (job,) = of_ray(render(tmp_path, "base", "job"))
    config = job_config(job)
    assert config.data.reader_labels == groups(job)[1]["labels"]
    assert config.train.rank_labels == groups(job)[2]["labels"]


def test_every_folder_of_the_manifests_is_rendered_by_these_tests() -> None:
    tested = {part for site in SITES for part in site}
    assert {f"overlays/{path.name}" for path in (KUBERAY / "overlays").iterdir()} <= tested
    assert {path.name for path in (KUBERAY / "components").iterdir()} <= tested
