"""What a pod of each cloud's overlay shows to that cloud: by servers that take nothing but its workload identity."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from streaming import storage
from streaming.storage import patience
from streaming.storage.ranges import open_ranges, read_range
from tests.deploy.manifests import Manifest, pod_templates, render

CONTENT, IDENTITY = b"a tile", "the pod's own token"
STS = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>OF-THE-ROLE</AccessKeyId>
<SecretAccessKey>b</SecretAccessKey><SessionToken>of the role</SessionToken>
<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""


class Cloud(ThreadingHTTPServer):
    """Authorities and storage of all clouds: the pod's identity gets one a token, and that the object."""

    def __init__(self) -> None:
        self.asked = list[tuple[str, str]]()
        super().__init__(("127.0.0.1", 0), _Answers)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Cloud

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if form.get("client_assertion") == [IDENTITY]:
            self.server.asked.append(("azure", form["client_id"][0]))
            return self.send(json.dumps({"access_token": "entra", "expires_in": 3600, "token_type": "Bearer"}))
        if form.get("WebIdentityToken") == [IDENTITY]:
            self.server.asked.append(("aws", form["RoleArn"][0]))
            return self.send(STS)
        return self.send("", 403)

    def do_GET(self) -> None:
        if self.path.startswith("/computeMetadata/") and self.headers["Metadata-Flavor"] == "Google":
            self.server.asked.append(("gcp", self.path.partition("?")[0]))
            return self.send(json.dumps({"access_token": "google", "expires_in": 3600, "token_type": "Bearer"}))
        if self.path == "/v1/credentials" and self.headers["Authorization"] == IDENTITY:
            self.server.asked.append(("aws", "pod identity"))
            keys = {"AccessKeyId": "OF-THE-ROLE", "SecretAccessKey": "b", "Token": "of the role"}
            return self.send(json.dumps({**keys, "Expiration": "2099-01-01T00:00:00Z"}))
        shown = self.headers["Authorization"] or ""
        is_role = "Credential=OF-THE-ROLE/" in shown and self.headers["x-amz-security-token"] == "of the role"
        if shown in ("Bearer entra", "Bearer google") or is_role:
            return self.send(CONTENT.decode())
        return self.send("", 403)

    do_HEAD = do_GET

    def send(self, text: str, status: int = 200) -> None:
        if "Range" in self.headers:  # all of it, which is what is asked for
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-{len(text) - 1}/{len(text)}")
        else:
            self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Sat, 28 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with Cloud() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def token(tmp_path: Path) -> str:
    (tmp_path / "token").write_text(IDENTITY)
    return str(tmp_path / "token")


def deployed(name: str, folder: Path) -> tuple[dict[str, str], dict[str, str], list[Manifest]]:
    """Variables of each pod of an overlay, annotations of its account, and the manifests."""
    site = render(folder, f"overlays/{name}", "job")
    (account,) = [m for m in site if m["kind"] == "ServiceAccount"]
    (environment,) = [m["data"] for m in site if m["metadata"]["name"] == "tilestream-env"]
    for manifest in site:
        for pod in pod_templates(manifest):
            assert pod.spec["serviceAccountName"] == account["metadata"]["name"], pod.where
            assert {"configMapRef": {"name": "tilestream-env"}} in pod.spec["containers"][0]["envFrom"], pod.where
    return environment, account["metadata"]["annotations"], site


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has nothing but what a pod has."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "GCE_", "STORAGE_EMULATOR_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(patience, "_first_contact_s", 5.0)  # who is refused is refused soon
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    return monkeypatch


def read_both_ways(uri: str, options: dict[str, str] | None = None) -> None:
    """By what reads catalogs and checkpoints, and by what readers read tiles with."""
    assert storage.read_bytes(uri, options) == CONTENT
    ranges = open_ranges(uri, options or {})
    assert ranges is not None
    assert read_range(ranges, 0, len(CONTENT)) == CONTENT


def test_on_aks_a_pod_shows_its_federated_token(
    cloud: Cloud, token: str, pod: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment, annotations, site = deployed("azure", tmp_path)
    client = annotations["azure.workload.identity/client-id"]
    for manifest in site:
        for template in pod_templates(manifest):
            assert template.labels["azure.workload.identity/use"] == "true", "the webhook passes over other pods"
    # What AKS's webhook adds: a client's id without a secret.
    webhook = {"AZURE_CLIENT_ID": client, "AZURE_TENANT_ID": "t", "AZURE_FEDERATED_TOKEN_FILE": token}
    webhook["AZURE_AUTHORITY_HOST"] = f"http://{cloud.host}/"
    for name, value in {**environment, **webhook, "AZURE_STORAGE_ENDPOINT": f"http://{cloud.host}"}.items():
        pod.setenv(name, value)
    read_both_ways("az://tiles/a")
    assert set(cloud.asked) == {("azure", client)}


def test_on_eks_a_pod_takes_its_accounts_role(
    cloud: Cloud, token: str, pod: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment, annotations, _ = deployed("aws", tmp_path)
    role = annotations["eks.amazonaws.com/role-arn"]
    webhook = {"AWS_ROLE_ARN": role, "AWS_WEB_IDENTITY_TOKEN_FILE": token, "AWS_ENDPOINT_URL": f"http://{cloud.host}"}
    for name, value in {**environment, **webhook}.items():
        pod.setenv(name, value)
    read_both_ways("s3://tiles/a")
    assert set(cloud.asked) == {("aws", role)}


def test_on_eks_a_pod_takes_what_pod_identity_hands_out(
    cloud: Cloud, token: str, pod: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment, _, _ = deployed("aws", tmp_path)
    agent = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"http://{cloud.host}/v1/credentials"}
    agent |= {"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": token, "AWS_ENDPOINT_URL": f"http://{cloud.host}"}
    for name, value in {**environment, **agent}.items():
        pod.setenv(name, value)
    read_both_ways("s3://tiles/a")
    assert set(cloud.asked) == {("aws", "pod identity")}


def test_on_gke_a_pod_asks_the_metadata_server(cloud: Cloud, pod: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment, annotations, _ = deployed("gcp", tmp_path)
    assert annotations["iam.gke.io/gcp-service-account"].endswith(".iam.gserviceaccount.com")
    for name, value in {**environment, "GCE_METADATA_HOST": cloud.host, "HOME": str(tmp_path)}.items():
        pod.setenv(name, value)
    # An endpoint of one's own is asked without credentials unless they are asked for.
    read_both_ways("gs://tiles/a", {"endpoint_url": f"http://{cloud.host}", "token": "google_default"})
    assert {path for _, path in cloud.asked} == {"/computeMetadata/v1/instance/service-accounts/default/token"}
