"""docker/kubernetes/: what can be held without a cluster. The manifests are what Kubernetes' published schemas say
(strictly, for the oldest and the newest release that is supported), fit together, run under the restricted profile,
and say to pgpark what pgpark understands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import pytest

from pgpark.config import load
from tests.cluster.manifests import BUILDS, KUBERNETES, built, environment, of_kind, templates, the
from tests.cluster.resources import SCHEMAS
from tests.command_lines import Command, parse, scripted, variables

RELEASES = ("1.31", "1.37")
_STOP_SECS = 14  # what a worker may need beyond its grace, if the database is slow: see test_docker.py


@pytest.mark.parametrize("build", BUILDS)
def test_resources_are_what_their_schemas_say(build: str) -> None:
    kubernetes_validate = _kubernetes_validate()
    for found in built(build):
        if found["kind"] in SCHEMAS:
            jsonschema.validate(found, SCHEMAS[found["kind"]])
            continue
        for release in RELEASES:
            kubernetes_validate.validate(found, release, strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    kubernetes_validate = _kubernetes_validate()
    worker = json.loads(json.dumps(the("base", "Deployment", "pgpark-worker")))
    worker["spec"]["template"]["spec"]["terminationGracePeriod"] = 75
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(worker, RELEASES[-1], strict=True)
    scaled = json.loads(json.dumps(the("example", "ScaledObject", "pgpark-worker")))
    scaled["spec"]["triggers"][0]["metadata"]["targetQueryValue"] = 8  # a number where text is wanted
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(scaled, SCHEMAS["ScaledObject"])


@cache
def _kubernetes_validate() -> Any:
    if "PGPARK_TEST_NEEDS_TOOLS" not in os.environ:
        pytest.importorskip("kubernetes_validate")
    import kubernetes_validate.utils

    kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)  # megabytes, each time
    return kubernetes_validate


def test_every_file_below_is_part_of_the_example() -> None:
    used = {KUBERNETES / "example/kustomization.yaml"}
    for file in KUBERNETES.rglob("kustomization.yaml"):
        used |= {
            (file.parent / name).resolve() for name in re.findall(r"[\w-]+\.(?:yaml|json)", _code(file.read_text()))
        }
        used |= {file}
    assert {file for file in KUBERNETES.rglob("*") if file.is_file() and file.suffix != ".md"} == used
    kustomization = (KUBERNETES / "example/kustomization.yaml").read_text()
    for folder in KUBERNETES.iterdir():
        if folder.is_dir() and folder.name != "example":
            assert f"  - ../{folder.name}\n" in kustomization


def _code(text: str) -> str:
    return re.sub(r"#.*", "", text)


@pytest.mark.parametrize("build", BUILDS)
def test_names_that_are_referred_to_exist(build: str) -> None:
    accounts, deployments = of_kind(build, "ServiceAccount"), of_kind(build, "Deployment")
    for name, pod in templates(build):
        assert pod["serviceAccountName"] in accounts, name
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in of_kind(build, "ConfigMap")
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes), name
            assert environment(build, container)
            ports = {port["name"] for port in container.get("ports", [])}
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                if kind in container:
                    assert container[kind]["httpGet"]["port"] in ports, name
    for deployment in deployments.values():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for kind in ("ScaledObject", "HorizontalPodAutoscaler"):
        for scaler in of_kind(build, kind).values():
            target = deployments[scaler["spec"]["scaleTargetRef"]["name"]]
            assert "replicas" not in target["spec"], "two would decide how many there are"
    for scaler in of_kind(build, "ScaledObject").values():
        for trigger in scaler["spec"]["triggers"]:
            assert trigger["authenticationRef"]["name"] in of_kind(build, "TriggerAuthentication")


@pytest.mark.parametrize("build", BUILDS)
def test_whatever_selects_pods_finds_some_and_their_ports(build: str) -> None:
    pods = [found["spec"]["template"] for found in of_kind(build, "Deployment").values()]
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"):
        for name, found in of_kind(build, kind).items():
            spec = found["spec"]
            wanted = spec.get("selector", spec.get("podSelector", {}))
            wanted = wanted.get("matchLabels", wanted)
            chosen = [pod for pod in pods if wanted.items() <= pod["metadata"]["labels"].items()]
            assert len(chosen) == 1 or (name == "pgpark-closed" and len(chosen) == len(pods)), name
            there = {port["name"] for pod in chosen for each in pod["spec"]["containers"] for port in each["ports"]}
            asked = [port.get("targetPort", port.get("port")) for port in spec.get("ports", [])]
            asked += [end["port"] for end in spec.get("podMetricsEndpoints", [])]
            asked += [port["port"] for rule in spec.get("ingress", []) for port in rule["ports"]]
            assert set(asked) <= there, name
    for monitor in of_kind(build, "ServiceMonitor").values():
        service = the(build, "Service", "pgpark-gateway")
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert {end["port"] for end in monitor["spec"]["endpoints"]} <= {
            port["name"] for port in service["spec"]["ports"]
        }


@pytest.mark.parametrize("build", BUILDS)
def test_pods_run_under_the_restricted_profile_and_write_nothing_but_tmp(build: str) -> None:
    assert the(build, "Namespace", "pgpark")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in templates(build):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == 10001, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False  # a Service pgpark-serve would set PGPARK_SERVE_PORT
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for volume in pod["volumes"]:
            assert set(volume) - {"name"} <= {"configMap", "emptyDir"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert writable == {"/tmp"}


@pytest.mark.parametrize("build", BUILDS)
def test_secrets_are_referred_to_and_never_given(build: str) -> None:
    assert not of_kind(build, "Secret")
    for name, pod in templates(build):
        (container,) = pod["containers"]
        dsn = {variable["name"]: variable for variable in container["env"]}["PGPARK_DSN"]
        assert dsn["valueFrom"]["secretKeyRef"]["name"] == "pgpark-database", name
        assert "value" not in dsn


@pytest.mark.parametrize("build", BUILDS)
def test_images_have_a_tag_that_stays(build: str) -> None:
    for name, pod in templates(build):
        for container in pod["containers"]:
            image, _, tag = container["image"].rpartition(":")
            assert "/" in image and tag not in {"", "latest"}, f"{name}: {container['image']}"


def _commands(build: str) -> Iterator[Command]:
    for name, pod in templates(build):
        for container in pod["containers"]:
            given = environment(build, container)
            if container.get("command") == ["sh", "-ec"]:
                for arguments in scripted(container["args"][0].replace("/etc/pgpark/", f"{KUBERNETES / build}/")):
                    yield Command(name, arguments, given)
            else:
                assert "command" not in container  # the image's: tini and pgpark
                yield Command(name, container["args"], given)


@pytest.mark.parametrize("build", BUILDS)
def test_pgpark_understands_every_command_and_every_variable(build: str) -> None:
    known = set(variables())
    seen = set()
    for command in _commands(build):
        parse(command, KUBERNETES)
        seen.add(command.arguments[0])
        assert {name for name in command.environment if name.startswith("PGPARK_")} <= known
    assert seen == {"migrate", "apply", "grant", "worker", "serve"}


@pytest.mark.parametrize("build", BUILDS)
def test_kubernetes_waits_longer_than_a_worker_needs_to_stop(build: str) -> None:
    (worker,) = (command for command in _commands(build) if command.arguments[0] == "worker")
    pod = the(build, "Deployment", "pgpark-worker")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > parse(worker, KUBERNETES)["grace"] + _STOP_SECS


@pytest.mark.parametrize("build", BUILDS)
def test_no_probe_that_kills_asks_the_database(build: str) -> None:
    for name, pod in templates(build):
        for container in pod["containers"]:
            probes = {kind: container[kind]["httpGet"]["path"] for kind in container if kind.endswith("Probe")}
            assert probes.pop("readinessProbe", "/ready") == "/ready"
            if "migrate" not in name:
                assert probes == {"startupProbe": "/health", "livenessProbe": "/health"}


@pytest.mark.parametrize("build", BUILDS)
def test_the_pool_is_in_the_config_and_as_large_as_the_most_workers(build: str) -> None:
    worker = next(data for name, data in _configs(build) if name.startswith("pgpark-worker"))
    pools = next(data for name, data in _configs(build) if name.startswith("pgpark-pools"))
    pool = load(json.loads(pools["scheduler-config.json"])).pools[worker["PGPARK_WORKER_POOL"]]
    for scaler in of_kind(build, "ScaledObject").values():
        (trigger,) = scaler["spec"]["triggers"]
        assert trigger["metadata"]["query"] == f"select pgpark.park_demand('{worker['PGPARK_WORKER_POOL']}')"
        assert trigger["metadata"]["targetQueryValue"] == worker["PGPARK_WORKER_UNITS"]
        most = -(-pool["max_units"] // int(worker["PGPARK_WORKER_UNITS"]))
        assert scaler["spec"]["maxReplicaCount"] == most


def _configs(build: str) -> list[tuple[str, dict[str, str]]]:
    return [(name, found["data"]) for name, found in of_kind(build, "ConfigMap").items()]


@pytest.mark.parametrize("build", BUILDS)
def test_a_node_can_be_emptied_whether_or_not_the_database_is_there(build: str) -> None:
    budget = the(build, "PodDisruptionBudget", "pgpark-gateway")["spec"]
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    replicas = the(build, "Deployment", "pgpark-gateway")["spec"].get("replicas")
    least = [found["spec"]["minReplicas"] for found in of_kind(build, "HorizontalPodAutoscaler").values()]
    assert budget["minAvailable"] < (replicas or min(least))


@pytest.mark.parametrize("build", BUILDS)
def test_the_gateway_may_go_out_to_names_and_the_database_and_the_guide_says_so(build: str) -> None:
    rules = the(build, "NetworkPolicy", "pgpark-gateway")["spec"]["egress"]
    ports = {port["port"] for rule in rules for port in rule["ports"]}
    assert ports == {53, 5432}
    assert "port 5432" in (KUBERNETES.parents[1] / "docs" / "operations" / "containers.md").read_text()


@pytest.mark.parametrize("build", BUILDS)
def test_the_migration_can_be_applied_alone(build: str) -> None:
    """With what it mounts; namespace, account and Secret are there from the first time."""
    ours = {"app.kubernetes.io/component": "migrate"}
    chosen = [found for found in built(build) if ours.items() <= found["metadata"].get("labels", {}).items()]
    (config,) = (found["metadata"]["name"] for found in chosen if found["kind"] == "ConfigMap")
    (job,) = (found for found in chosen if found["kind"] == "Job")
    (volume,) = (volume for volume in job["spec"]["template"]["spec"]["volumes"] if "configMap" in volume)
    assert volume["configMap"]["name"] == config
    assert len(chosen) == 2


def test_a_gpu_is_a_whole_one_and_no_worker_waits_for_a_spare_one() -> None:
    deployment = the("example", "Deployment", "pgpark-worker")["spec"]
    (container,) = deployment["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in container["resources"]["requests"]  # the same as its limit, or refused
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True  # the patch keeps what it does not name
