"""Kubernetes manifests and the compose file: valid, consistent with each other and with the server."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from fastvlm_convert.serve.settings import Settings
from tests.commands import ROOT
from tests.deploy.files import DEPLOY, MANIFESTS, PREFIX, compose, container, load, manifest, pod, settings_of

VALIDATE = [str(Path(sys.executable).parent / "kubernetes-validate"), "--strict"]
# compose-spec/compose-spec, Apache-2.0, as of October 2021 and therefore without `name` of the whole file.
COMPOSE_SCHEMA = json.loads((ROOT / "tests" / "data" / "compose-spec.schema.json").read_text())
OURS = ("deployment", "service", "hpa", "pdb", "networkpolicy")


def validate(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*VALIDATE, *map(str, paths)], capture_output=True, text=True)


def test_kubernetes_takes_them():
    done = validate(*(path for path in MANIFESTS if path.stem in OURS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" passed ") == len(OURS)


def test_a_field_that_kubernetes_does_not_have_is_noticed(tmp_path):
    text = (DEPLOY / "kubernetes" / "deployment.yaml").read_text()
    wrong = tmp_path / "deployment.yaml"
    wrong.write_text(text.replace("readOnlyRootFilesystem", "readonlyRootFilesystem"))
    assert wrong.read_text() != text
    assert validate(wrong).returncode != 0


def test_the_kustomization_has_every_manifest():
    listed = load(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert set(listed["resources"]) == {f"{name}.yaml" for name in OURS}
    assert [image["name"] for image in listed["images"]] == [container()["image"]]


def test_the_compose_file_is_valid():
    file = load(DEPLOY / "compose.yaml")
    assert file.pop("name") == "fastvlm"
    validator = jsonschema.Draft201909Validator(COMPOSE_SCHEMA)
    assert list(validator.iter_errors(file)) == []
    assert list(validator.iter_errors({"services": {"server": {"read_onyl": True}}}))


@pytest.mark.parametrize("where", ["image", "compose", "kubernetes"])
def test_its_settings_are_settings_and_go_together(where, monkeypatch):
    given = settings_of(where)
    assert {name.removeprefix(PREFIX).lower() for name in given} <= set(Settings.model_fields)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.env, settings.host, settings.port) == ("production", "0.0.0.0", 8000)
    assert settings.api_key_file is not None
    assert len(settings.model_fields_set) == len(given)


def test_running_answers_are_finished_before_the_end():
    drain = float(settings_of("kubernetes")["FAST_VLM_DRAIN_SECONDS"])
    pause = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod()["terminationGracePeriodSeconds"] > drain + pause
    drain = float(settings_of("compose")["FAST_VLM_DRAIN_SECONDS"])
    assert int(compose()["stop_grace_period"].removesuffix("s")) > drain


def test_probes_ask_the_right_questions():
    """A server that drains or loads is alive, and must not be restarted."""
    probes = {kind: container()[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert ports == {"http": int(settings_of("kubernetes")["FAST_VLM_PORT"])}


def test_a_pod_may_do_nothing_that_it_does_not_need():
    """The restricted profile of Kubernetes' Pod Security Standards, and a root that cannot be written."""
    security = pod()["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] == 10001
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["automountServiceAccountToken"] is False
    writable = {mount["name"] for mount in container()["volumeMounts"] if not mount.get("readOnly")}
    (tmp,) = (volume for volume in pod()["volumes"] if volume["name"] in writable)
    assert tmp["emptyDir"]["sizeLimit"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod())


def test_a_composed_server_may_do_nothing_that_it_does_not_need():
    service = compose()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "10001:10001"
    assert all(volume["read_only"] for volume in service["volumes"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert {"cpus", "mem_limit", "pids_limit"} <= set(service)


def test_keys_are_secrets():
    """Where the server looks for them, the secret is."""
    (name,) = compose()["secrets"]
    assert settings_of("compose")["FAST_VLM_API_KEY_FILE"] == f"/run/secrets/{name}"
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    (secret,) = (volume for volume in pod()["volumes"] if "secret" in volume)
    key_file = Path(settings_of("kubernetes")["FAST_VLM_API_KEY_FILE"])
    assert str(key_file.parent) == mounts[secret["name"]]
    command = re.search(r"create secret generic (\S+) --from-file=(\S+)", kustomization_text())
    assert command.groups() == (secret["secret"]["secretName"], key_file.name)


def kustomization_text() -> str:
    return (DEPLOY / "kubernetes" / "kustomization.yaml").read_text()


def test_threads_and_cores_agree():
    """The server cannot see a container's share of the cores."""
    settings = settings_of("kubernetes")
    threads = int(settings["FAST_VLM_SLOTS"]) * int(settings["FAST_VLM_THREADS"])
    assert {given["cpu"] for given in container()["resources"].values()} == {str(threads)}


def test_manifests_find_each_other():
    labels = manifest("deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("deployment")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("service")["spec"]["selector"] == labels
    assert manifest("pdb")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("networkpolicy")["spec"]["podSelector"]["matchLabels"] == labels
    hpa = manifest("hpa")["spec"]
    target = {key: manifest("deployment")[key] for key in ("apiVersion", "kind")}
    assert hpa["scaleTargetRef"] == {**target, "name": manifest("deployment")["metadata"]["name"]}
    assert manifest("pdb")["spec"]["minAvailable"] < hpa["minReplicas"] <= hpa["maxReplicas"]
    assert "replicas" not in manifest("deployment")["spec"]  # they are the autoscaler's
    (port,) = manifest("service")["spec"]["ports"]
    (rule,) = manifest("networkpolicy")["spec"]["ingress"]
    assert {port["targetPort"], rule["ports"][0]["port"]} == {container()["ports"][0]["name"]}


def test_the_server_may_ask_nobody():
    policy = manifest("networkpolicy")["spec"]
    assert policy["egress"] == []
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}


def test_every_manifest_is_one_document():
    for path in MANIFESTS:
        assert len(list(yaml.safe_load_all(path.read_text()))) == 1, path
