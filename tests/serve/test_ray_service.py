"""deploy/ray-service.yaml: what KubeRay and Ray Serve are told."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "ray-service.yaml"
HAS_RAY = importlib.util.find_spec("ray") is not None


def spec() -> dict[str, Any]:
    document = yaml.safe_load(MANIFEST.read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    return document["spec"]


def serve_config() -> dict[str, Any]:
    return yaml.safe_load(spec()["serveConfigV2"])


def pods() -> dict[str, dict[str, Any]]:
    cluster = spec()["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"]} | {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_one_application_is_served_at_the_root_by_our_builder():
    (application,) = serve_config()["applications"]
    assert application["route_prefix"] == "/"
    module, _, name = application["import_path"].partition(":")
    assert (ROOT / Path(*module.split(".")).with_suffix(".py")).is_file()
    assert f"def {name}(" in (ROOT / Path(*module.split(".")).with_suffix(".py")).read_text()


def test_its_environment_is_that_of_the_server():
    from fastvlm_convert.serve.settings import PREFIX, Settings

    variables = serve_config()["applications"][0]["runtime_env"]["env_vars"]
    given = {name.removeprefix(PREFIX).lower(): value for name, value in variables.items()}
    settings = Settings.model_validate(given)
    assert settings.env == "production"
    assert settings.engine == "ray"
    assert settings.max_workers == 4


def test_a_replica_fits_into_a_pod_and_a_pod_into_its_limits():
    variables = serve_config()["applications"][0]["runtime_env"]["env_vars"]
    cluster = spec()["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    needed = int(variables["FAST_VLM_SLOTS"]) * int(variables["FAST_VLM_THREADS"])
    assert int(workers["rayStartParams"]["num-cpus"]) == needed
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["cpu"] == str(needed)
    assert workers["maxReplicas"] == int(variables["FAST_VLM_MAX_WORKERS"])
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


@pytest.mark.parametrize("name", ["head", "bundles"])
def test_pods_are_confined_and_have_the_bundle_and_the_keys_read_only(name):
    pod = pods()[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]} == {"bundle", "api-keys"}
    assert all(mount["readOnly"] for mount in mounts.values())
    assert "limits" in container["resources"]


def test_its_versions_of_ray_are_one():
    version = spec()["rayClusterConfig"]["rayVersion"]
    assert f"/ray:{version}-py311" in (ROOT / "deploy" / "ray.Dockerfile").read_text()


def test_the_image_has_no_findings():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed: make setup")
    done = subprocess.run([linter, ROOT / "deploy" / "ray.Dockerfile"], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install -e '.[ray]' -c constraints.txt")
def test_ray_takes_it():
    from ray.serve.schema import ServeDeploySchema

    config = serve_config()
    taken = ServeDeploySchema.model_validate(config)
    assert taken.applications[0].args == config["applications"][0]["args"]
    with pytest.raises(ValueError, match="applicatons"):
        ServeDeploySchema.model_validate({**config, "applicatons": []})  # unknown fields are refused
