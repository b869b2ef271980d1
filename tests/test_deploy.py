"""examples/deploy: each manifest against its schema, its commands against the command line, its parts against each other."""

import copy
import json
import re
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from jaxpaged import cli, cli_serve
from jaxpaged.ray import app
from jaxpaged_server.app import ENDPOINTS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples/deploy"
KUBERNETES = "1.34"
CUSTOM = {
    kind: json.loads((Path(__file__).parent / f"deploy_schemas/{kind.lower()}.json").read_text())
    for kind in ("LeaderWorkerSet", "RayService")
}
LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "jaxpaged-many-0.jaxpaged-many"}  # of a pod
CLOSING = 15  # seconds an engine may take to end, once no request runs

OBJECTS = {
    (path.name, one["kind"]): one for path in sorted(DEPLOY.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())
}
each_object = pytest.mark.parametrize("name", OBJECTS, ids="-".join)


def templates(one):
    """The pod templates of an object."""
    spec = one["spec"]
    if one["kind"] == "Deployment":
        return [spec["template"]]
    if one["kind"] == "LeaderWorkerSet":
        return [spec["leaderWorkerTemplate"][name] for name in ("leaderTemplate", "workerTemplate")]
    if one["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return []


PODS = [(f"{name[0]}-{i}", one, pod) for name, one in OBJECTS.items() for i, pod in enumerate(templates(one))]
each_pod = pytest.mark.parametrize("one, pod", [(one, pod) for _, one, pod in PODS], ids=[name for name, *_ in PODS])
SERVING = [(f"{name}", pod) for name, one, pod in PODS if one["kind"] != "RayService"]
each_server = pytest.mark.parametrize("pod", [pod for _, pod in SERVING], ids=[name for name, _ in SERVING])


def check(one):
    """Against the schema of its kind, pods and all."""
    if one["kind"] not in CUSTOM:
        return kubernetes_validate.validate(one, KUBERNETES, strict=True)
    jsonschema.validate(one, CUSTOM[one["kind"]])
    for pod in templates(one):
        metadata = {"name": "pod", **pod.get("metadata", {})}
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}, KUBERNETES,
                                     strict=True)  # fmt: skip
    return None


# -- schemas ---------------------------------------------------------------------------------------------------------------


@each_object
def test_manifests_fit_their_schemas(name):
    check(OBJECTS[name])


def set_at(one, path, value):
    """A copy in which what is at "a.b.0.c" is something else."""
    changed = copy.deepcopy(one)
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place = changed
    for step in steps:
        place = place[step]
    place[last] = value
    return changed


@pytest.mark.parametrize("name, path, value", [
    (("one-host.yaml", "Deployment"), "spec.replicas", "one"),
    (("one-host.yaml", "Deployment"), "spec.template.spec.containers.0.readinesProbe", {}),
    (("one-host.yaml", "Service"), "spec.ports.0.port", "http"),
    (("many-hosts.yaml", "LeaderWorkerSet"), "spec.leaderWorkerTemplate.restartPolicy", "Always"),
    (("many-hosts.yaml", "LeaderWorkerSet"), "spec.leaderWorkerTemplate.workers", 2),
    (("many-hosts.yaml", "LeaderWorkerSet"), "spec.leaderWorkerTemplate.workerTemplate.spec.containers.0.env", {}),
    (("ray-service.yaml", "RayService"), "spec.rayClusterConfig.workerGroupSpecs.0.rayStartParams", {"num-gpus": 1}),
    (("ray-service.yaml", "RayService"), "spec.rayClusterConfig.headGroupSpec.template.spec.container", []),
])  # fmt: skip
def test_a_mistake_in_a_manifest_is_found(name, path, value):
    with pytest.raises(jsonschema.ValidationError):
        check(set_at(OBJECTS[name], path, value))


# -- what they run ---------------------------------------------------------------------------------------------------------


def expanded(text):
    """As Kubernetes puts variables into a command."""
    return re.sub(r"\$\((\w+)\)", lambda found: LWS[found[1]], text)


def flag(pod, name):
    (container,) = pod["spec"]["containers"]
    return next((arg.partition("=")[2] for arg in container["args"] if arg.startswith(f"--{name}=")), None)


@each_server
def test_the_command_is_one_that_jaxpaged_has(pod, monkeypatch, capsys):
    (container,) = pod["spec"]["containers"]
    assert container["args"][0] == "serve"
    started = []
    monkeypatch.setattr(cli_serve, "run", lambda *given, **named: started.append(given) or 0)
    monkeypatch.setattr(sys, "argv", ["jaxpaged", *map(expanded, container["args"])])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code, capsys.readouterr().err
    config = started[0][0]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    hosts = int(LWS["LWS_GROUP_SIZE"]) if flag(pod, "nnodes") else 1
    assert config.tensor_parallel_size == gpus * hosts


def test_a_group_has_as_many_hosts_as_its_size():
    spec = OBJECTS["many-hosts.yaml", "LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert str(spec["size"]) == LWS["LWS_GROUP_SIZE"]
    own = ("--host", "--port")  # the leader's alone
    commands = [[arg for arg in spec[name]["spec"]["containers"][0]["args"] if not arg.startswith(own)]
                for name in ("leaderTemplate", "workerTemplate")]  # fmt: skip
    assert commands[0] == commands[1]


def test_the_serve_config_is_rays_and_its_arguments_are_ours():
    text = OBJECTS["ray-service.yaml", "RayService"]["spec"]["serveConfigV2"]
    (one,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert one.import_path == "jaxpaged.ray:app"
    assert isinstance(app(one.args), serve.Application)


# -- how their parts fit together ------------------------------------------------------------------------------------------


@each_server
def test_probes_ask_what_the_server_answers(pod):
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
    probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container]
    assert len(probes) == (3 if flag(pod, "port") else 0)
    for probe in probes:
        assert ("GET", probe["httpGet"]["path"]) in [(method, path) for method, path, _ in ENDPOINTS]
        assert str(ports[probe["httpGet"]["port"]]) == flag(pod, "port")


@each_server
def test_running_requests_have_the_time_they_are_promised(pod):
    (container,) = pod["spec"]["containers"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = int(flag(pod, "shutdown-timeout")) if flag(pod, "port") else 0  # a follower has no requests of its own
    assert pod["spec"]["terminationGracePeriodSeconds"] >= before + drain + CLOSING
    if not drain:
        assert before >= 10 + int(flag(pod, "shutdown-timeout")), "it is there while its leader drains"


def test_a_replica_on_ray_has_the_time_too():
    one = OBJECTS["ray-service.yaml", "RayService"]
    (application,) = yaml.safe_load(one["spec"]["serveConfigV2"])["applications"]
    worker = templates(one)[1]
    assert worker["spec"]["terminationGracePeriodSeconds"] >= application["args"]["shutdown_timeout"] + CLOSING


@each_pod
def test_volumes_secrets_and_shared_memory_are_there(one, pod):
    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", ())}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container.get("volumeMounts", ())}
    keys = {entry["valueFrom"]["secretKeyRef"]["name"] for entry in container["env"] if "valueFrom" in entry}
    assert keys == {"jaxpaged"} and any(entry["name"] == "JAXPAGED_API_KEY" for entry in container["env"])
    if "nvidia.com/gpu" in container["resources"]["limits"]:
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        claim = mounts["/cache"]["persistentVolumeClaim"]["claimName"]
        claims = [o["metadata"]["name"] for (_, kind), o in OBJECTS.items() if kind == "PersistentVolumeClaim"]
        assert claim in claims


@pytest.mark.parametrize("file", ["one-host.yaml", "many-hosts.yaml"])
def test_the_service_finds_the_pods_that_serve(file):
    service = OBJECTS[file, "Service"]["spec"]
    pods = [pod for (name, _), one in OBJECTS.items() if name == file for pod in templates(one)]
    found = [pod for pod in pods if service["selector"].items() <= pod["metadata"]["labels"].items()]
    assert len(found) == 1 and flag(found[0], "port") is not None
    names = [port["name"] for port in found[0]["spec"]["containers"][0]["ports"]]
    assert service["ports"][0]["targetPort"] in names
    annotations = found[0]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == flag(found[0], "port")
    assert ("GET", annotations["prometheus.io/path"]) in [(method, path) for method, path, _ in ENDPOINTS]


def test_the_image_is_made_of_what_there_is():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    extras = next(line for line in lines if line.startswith("ARG EXTRAS=")).partition("=")[2].split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= known.keys()
