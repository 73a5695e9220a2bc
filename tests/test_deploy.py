"""The manifests for Kubernetes are valid, and say the same as the service, its settings and its image."""

import hashlib
import json
import re
import shutil
import subprocess
import tomllib

import httpx
import kubernetes_validate
import pytest
import yaml

from bench.machine import ROOT
from bench.serving import serving
from serve.guard import OPEN
from serve.settings import PREFIX, Settings, load_settings

FOLDER = ROOT / "deploy" / "kubernetes"
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
VERSIONS = ("1.29", "1.37")
OTHERS = ("kustomization.yaml", "podmonitor.yaml")  # of no kind that Kubernetes itself knows
KEY = "a-key-for-this-test"
DIGESTS = [hashlib.sha256(KEY.encode()).hexdigest()]


def read(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


MANIFESTS = {m["kind"]: m for path in sorted(FOLDER.glob("*.yaml")) for m in read(path.name)}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
PROBES = {name: probe for name, probe in CONTAINER.items() if name.endswith("Probe")}


@pytest.fixture(scope="module")
def settings():
    """Those of serve.toml, and of a secret with a key: unknown names and values of the wrong kind are refused."""
    return load_settings(FOLDER / "serve.toml", environ={f"{PREFIX}API_KEYS": json.dumps(DIGESTS)})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", sorted({m["kind"] for m in MANIFESTS.values()} - {"Kustomization", "PodMonitor"}))
def test_manifests_are_valid(kind, version):
    kubernetes_validate.validate(MANIFESTS[kind], version, strict=True)


def test_an_unknown_field_would_not_be():
    broken = MANIFESTS["Service"] | {"spec": MANIFESTS["Service"]["spec"] | {"prots": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_kustomization_names_every_file():
    kustomization = MANIFESTS["Kustomization"]
    there = {path.name for path in FOLDER.iterdir()}
    assert {*kustomization["resources"], *OTHERS, *kustomization["configMapGenerator"][0]["files"]} == there
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert kustomization["images"] == [{"name": CONTAINER["image"], "newTag": version}]
    assert f"fused-ebm:{version} ." in DOCKERFILE


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not there")
def test_kubectl_renders_it():
    done = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rendered = {m["kind"]: m for m in yaml.safe_load_all(done.stdout)}
    assert rendered.keys() == MANIFESTS.keys() - {"Kustomization", "PodMonitor"} | {"ConfigMap"}
    pod = rendered["Deployment"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == rendered["ConfigMap"]["metadata"]["name"]
    assert rendered["ConfigMap"]["data"] == {"serve.toml": (FOLDER / "serve.toml").read_text()}


def test_everything_selects_the_pods_and_the_port(settings):
    template = MANIFESTS["Deployment"]["spec"]["template"]
    selectors = [MANIFESTS["Deployment"]["spec"]["selector"]["matchLabels"], MANIFESTS["Service"]["spec"]["selector"],
                 MANIFESTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
                 MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
                 MANIFESTS["PodMonitor"]["spec"]["selector"]["matchLabels"],
                 POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]]
    assert selectors == [template["metadata"]["labels"]] * len(selectors)
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": settings.port}]
    ports = [MANIFESTS["Service"]["spec"]["ports"][0]["targetPort"],
             MANIFESTS["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"],
             MANIFESTS["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"],
             *(probe["httpGet"]["port"] for probe in PROBES.values())]
    assert ports == ["http"] * len(ports)
    target = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", MANIFESTS["Deployment"]["metadata"]["name"])
    assert "replicas" not in MANIFESTS["Deployment"]["spec"]  # which would undo the autoscaler at every apply


def test_settings_come_from_the_file_and_secrets_from_the_environment():
    volume = next(v for v in POD["volumes"] if "configMap" in v)
    assert volume["configMap"]["name"] == MANIFESTS["Kustomization"]["configMapGenerator"][0]["name"]
    mount = next(m for m in CONTAINER["volumeMounts"] if m["name"] == volume["name"])
    assert CONTAINER["args"] == ["--config", f"{mount['mountPath']}/serve.toml"]
    names = [variable["name"].removeprefix(PREFIX).lower() for variable in CONTAINER["env"]]
    assert set(names) <= Settings.model_fields.keys()
    assert "api_keys" in names
    assert all("secretKeyRef" in variable["valueFrom"] for variable in CONTAINER["env"])
    # A service of this name would else put its address into FUSED_EBM_PORT, and no pod would start.
    assert POD["enableServiceLinks"] is False


def test_no_batch_jobs_where_a_pod_that_is_replaced_has_another_name(settings):
    assert settings.data_root is None
    assert settings.s3_read_buckets == ()


def test_a_pod_may_finish_what_it_admitted(settings):
    assert POD["terminationGracePeriodSeconds"] >= settings.linger_s + settings.drain_s + 5
    probe = PROBES["readinessProbe"]
    assert settings.linger_s >= probe["periodSeconds"] * probe["failureThreshold"]


def test_the_kernel_has_as_many_threads_as_the_pod_has_processors(settings):
    resources = CONTAINER["resources"]
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"] == str(settings.threads)


def test_a_pod_can_do_no_more_than_serve():
    assert POD["securityContext"] == {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001,
                                      "seccompProfile": {"type": "RuntimeDefault"}}
    assert CONTAINER["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                            "capabilities": {"drop": ["ALL"]}}
    assert POD["automountServiceAccountToken"] is False
    assert MANIFESTS["NetworkPolicy"]["spec"]["egress"] == []


def test_the_image_is_what_the_pod_expects(settings):
    assert "USER 10001:10001" in DOCKERFILE
    assert f"EXPOSE {settings.port}" in DOCKERFILE
    assert f"COPY models/demo {settings.model}" in DOCKERFILE
    assert 'ENTRYPOINT ["python", "-m", "serve"]' in DOCKERFILE
    # No option of the compiler that asks for the processor of the machine that builds.
    assert not re.search("march=|mtune=|CXXFLAGS", DOCKERFILE + (ROOT / "CMakeLists.txt").read_text())
    needed = {"pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE", "models", "kernels", "ebm",
              "export", "bench", "serve"}
    lines = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == needed
    assert all((ROOT / name).exists() for name in needed)


def test_the_service_answers_the_probes_and_gives_metrics_to_who_has_a_key(settings):
    given = tomllib.loads((FOLDER / "serve.toml").read_text()) | {"model": ROOT / "models" / "demo", "threads": 1}
    with serving(given.pop("model"), **given, api_keys=DIGESTS) as process, httpx.Client(
            base_url=process.url, timeout=10) as client:
        for probe in PROBES.values():
            assert probe["httpGet"]["path"] in OPEN
            assert client.get(probe["httpGet"]["path"]).status_code == 200
        path = MANIFESTS["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["path"]
        assert client.get(path).status_code == 401
        assert "fused_ebm" in client.get(path, headers={"Authorization": f"Bearer {KEY}"}).text
