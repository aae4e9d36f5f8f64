"""deploy/ray-service.yaml: what KubeRay and Ray Serve are told."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from fastvlm_convert.runtime.loaded import load_bundle
from fastvlm_convert.serve.settings import PREFIX, Settings
from tests.serve.needs_ray import needs_ray
from tests.serve.servers import CHAT, PICTURES, events_of, question, text_of, until

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "ray-service.yaml"


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
    assert pod["securityContext"]["runAsUser"] == 1000  # a name alone, as Ray's images have, is refused
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]} == {"bundle", "api-keys"}
    assert all(mount["readOnly"] for mount in mounts.values())
    (keys,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "api-keys"]
    assert keys["defaultMode"] == 0o440  # the server refuses keys that everybody can read
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
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


@needs_ray
def test_ray_takes_it():
    from ray.serve.schema import ServeDeploySchema

    config = serve_config()
    taken = ServeDeploySchema.model_validate(config)
    assert taken.applications[0].args == config["applications"][0]["args"]
    config["applications"][0]["import_path"] = "no_colon"
    with pytest.raises(ValueError, match="import_path"):
        ServeDeploySchema.model_validate(config)


HEAD = """
import sys
import ray
from ray import serve
from fastvlm_convert.serve.ray_app import Arguments, application

port, *bundles = sys.argv[1:]
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)  # one each, wherever this runs
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(application(Arguments(bundles=bundles, weights=["a=1", "b=0"])), name="fastvlm", route_prefix="/")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
@needs_ray
def test_the_application_answers_over_ray_s_own_http(demo_bundle: Path, ray_home: dict[str, str]):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", HEAD, str(port), f"a={demo_bundle}", f"b={demo_bundle}"]
    environment = {**os.environ, **ray_home, "FAST_VLM_SLOTS": "1", "FAST_VLM_THREADS": "1"}
    environment["FAST_VLM_TIMEOUT_SECONDS"] = "60"
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as head:
        assert head.stdout is not None
        assert "ready\n" in head.stdout
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until(lambda: client.get("/readyz").status_code == 200, 60)
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["fastvlm", "a", "b"]
            picture = PICTURES / "03.png"
            expected = load_bundle(demo_bundle).ask(picture, "Describe the image.")
            expected.finish()
            for model in ("fastvlm", "b"):
                body = question("Describe the image.", picture, model=model)
                assert text_of(client.post(CHAT, json=body)) == expected.text
            events = events_of(client.post(CHAT, json={**body, "stream": True}))
            pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
            assert "".join(pieces) == expected.text
            assert events[-1] == "[DONE]"
        head.communicate("", timeout=60)
    assert head.returncode == 0


@pytest.mark.slow
@needs_ray
def test_serve_with_the_engine_ray_answers_and_ends_when_told(demo_bundle: Path, ray_home: dict[str, str]):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastvlm_convert", "serve", f"demo={demo_bundle}", "--engine", "ray"]
    environment = {**os.environ, **ray_home, "FAST_VLM_SLOTS": "1", "FAST_VLM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--port", str(port)], env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as server:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until(lambda: _is_ready(client), 120)
            picture = PICTURES / "05.png"
            expected = load_bundle(demo_bundle).ask(picture, "Describe the image.")
            expected.finish()
            assert text_of(client.post(CHAT, json=question("Describe the image.", picture))) == expected.text
            (model,) = client.get("/health").json()["models"]
            assert model["executed_by"].startswith("onnxruntime")
        children = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
        assert server.returncode == 0
        _, left = psutil.wait_procs(children, timeout=20)
        assert [process.name() for process in left] == []


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.ConnectError:
        return False
