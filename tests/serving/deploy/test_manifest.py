"""kubernetes.yaml: names that point at each other, probes, and what its containers may do."""

import re

import pytest

from persona.serving.server.config import ServerConfig
from persona.serving.server.middleware import OPEN

WRITABLE = {"vllm"}
"""Containers whose root file system is not read-only."""
WORKLOADS = ("gateway", "vllm", "postgres", "valkey", "store-upgrade")


@pytest.fixture(scope="session", params=WORKLOADS)
def workload(request, manifest):
    """Each Deployment, StatefulSet and Job in turn."""
    return manifest.workloads()[request.param]


@pytest.fixture(scope="session")
def pod(workload):
    return workload["spec"]["template"]["spec"]


@pytest.fixture(scope="session")
def container(pod):
    (container,) = pod["containers"]
    return container


def labels(workload):
    return workload["spec"]["template"]["metadata"]["labels"]


def test_all_stands_in_one_namespace(manifest):
    assert set(manifest.workloads()) == set(WORKLOADS)
    namespace = manifest.documents[0]["metadata"]["name"]
    assert {document["metadata"].get("namespace") for document in manifest.documents[1:]} == {namespace}
    names = [(document["kind"], document["metadata"]["name"]) for document in manifest.documents]
    assert len(set(names)) == len(names)


def test_selectors_match_their_own_pods(workload):
    if workload["kind"] == "Job":
        assert "selector" not in workload["spec"]
    else:
        assert workload["spec"]["selector"]["matchLabels"] == labels(workload)


def test_services_and_budgets_select_one_workload(manifest):
    workloads = manifest.workloads()
    for service in manifest.of("Service"):
        found = [w for w in workloads.values() if labels(w) == service["spec"]["selector"]]
        assert [w["metadata"]["name"] for w in found] == [service["metadata"]["name"]]
        ports = {port["name"] for port in found[0]["spec"]["template"]["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in manifest.of("PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"] == labels(workloads[budget["metadata"]["name"]])
    assert {b["metadata"]["name"] for b in manifest.of("PodDisruptionBudget")} == {"gateway", "vllm"}


def test_the_autoscaler_alone_says_how_many_gateways(manifest):
    (scaler,) = manifest.of("HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    deployment = manifest.one(target["kind"], target["name"])
    assert deployment["apiVersion"] == target["apiVersion"] and "replicas" not in deployment["spec"]
    assert 2 <= scaler["spec"]["minReplicas"] < scaler["spec"]["maxReplicas"]
    # Utilisation is of what was requested.
    assert "cpu" in deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]


def test_volumes_are_mounted_and_mounts_have_volumes(workload, pod, container, manifest):
    claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
    volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
    assert {mount["name"] for mount in container.get("volumeMounts", ())} == claims | set(volumes)
    for volume in volumes.values():
        if "secret" in volume:
            assert manifest.one("Secret", volume["secret"]["secretName"])
        if "configMap" in volume:
            assert manifest.one("ConfigMap", volume["configMap"]["name"])
        if "persistentVolumeClaim" in volume:
            assert manifest.one("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])


def test_secrets_hold_the_keys_that_are_read(container, manifest):
    known = set()
    for variable in container.get("env", ()):
        if "valueFrom" in variable:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["key"] in manifest.one("Secret", reference["name"])["stringData"]
        # A variable sees only those before it.
        assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= known
        known.add(variable["name"])
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container.get("args", ())))) <= known
    for source in container.get("envFrom", ()):
        assert manifest.one("ConfigMap", source["configMapRef"]["name"])["data"]


def test_every_secret_has_to_be_filled_in_and_is_read(manifest):
    read = {v["valueFrom"]["secretKeyRef"]["key"] for c in manifest.containers() for v in c["env"] if "valueFrom" in v}
    passwords = manifest.one("Secret", "persona-passwords")["stringData"]
    files = manifest.one("Secret", "persona-files")["stringData"]
    assert set(passwords) == read and {*passwords.values(), *files.values()} == {"FILL-IN"}
    (container,) = [c for c in manifest.containers() if c["name"] == "gateway"]
    folder = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "files")
    settings = manifest.one("ConfigMap", "gateway")["data"]
    named = {settings["PERSONA_KEYS_FILE"], settings["PERSONA_SECRET_FILE"]}
    assert named == {f"{folder}/{name}" for name in files}


def test_urls_name_services_and_their_ports(manifest):
    ports = {s["metadata"]["name"]: s["spec"]["ports"][0]["port"] for s in manifest.of("Service")}
    usual = {"postgres": 5432}
    values = [v["value"] for c in manifest.containers() for v in c["env"] if "value" in v]
    values += manifest.one("ConfigMap", "gateway")["data"].values()
    found = [hit for value in values for hit in re.findall(r"://(?:[^/@]*@)?([a-z]+)(?::(\d+))?", value)]
    assert {host for host, _ in found} == {"vllm", "postgres", "valkey"}
    for host, port in found:
        assert ports[host] == int(port or usual[host])


def test_servers_listen_on_the_ports_they_declare(container):
    declared = {port["containerPort"] for port in container.get("ports", ())}
    ports = re.findall(r"--port[= ](\d+)", " ".join(container.get("args", ())))
    assert {int(port) for port in ports} <= declared
    if ports:
        assert re.search(r"--host[= ]0\.0\.0\.0", " ".join(container["args"])), "not on the loopback alone"


def test_probes_ask_routes_that_there_are(container):
    names = {port["name"] for port in container.get("ports", ())}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container.get(kind, {})
        if "httpGet" in probe:
            path = probe["httpGet"]["path"]
            assert path in OPEN and path.startswith("/persona/") == (container["name"] == "gateway")
            assert probe["httpGet"]["port"] in names
            # `ready` answers after the budget at the latest.
            assert probe["timeoutSeconds"] > ServerConfig.model_fields["budget_ms"].default / 1000
        if "tcpSocket" in probe:
            assert probe["tcpSocket"]["port"] in names


def test_a_shared_fault_neither_restarts_nor_removes_gateways(manifest):
    (gateway,) = [c for c in manifest.containers() if c["name"] == "gateway"]
    paths = {kind: gateway[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    health = "/persona/v1/health"
    assert paths == {"startup": "/persona/v1/ready", "readiness": health, "liveness": health}


def test_pods_may_do_little(pod, container):
    assert pod["enableServiceLinks"] is False and pod["automountServiceAccountToken"] is False
    whole, own = pod["securityContext"], container["securityContext"]
    assert whole["runAsNonRoot"] is True and whole["runAsUser"] > 0
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}
    assert own.get("readOnlyRootFilesystem", False) is (container["name"] not in WRITABLE)
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def test_network_policies_name_pods_that_there_are(manifest):
    policies, guarded = manifest.of("NetworkPolicy"), set()
    for policy in policies:
        (rule,) = policy["spec"]["ingress"]
        apps = [_apps(policy["spec"]["podSelector"]), *(_apps(one["podSelector"]) for one in rule["from"])]
        assert set().union(*apps) <= set(WORKLOADS)
        guarded |= apps[0]
    assert guarded == {"vllm", "postgres", "valkey"}


def _apps(selector):
    if "matchLabels" in selector:
        return {selector["matchLabels"]["app"]}
    (expression,) = selector["matchExpressions"]
    assert (expression["key"], expression["operator"]) == ("app", "In")
    return set(expression["values"])
