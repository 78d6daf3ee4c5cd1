"""compose.yaml, kubernetes.yaml, Dockerfile and README.md: valid, in agreement with the code and with each other."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import persona
from persona.cli import app
from persona.errors import PersonaError
from persona.serving.server.auth import Authenticator, read_secret
from persona.serving.server.config import ServerConfig
from persona.serving.server.flags import check_vllm_args
from persona.serving.server.middleware import OPEN
from persona.serving.vllm_offline import import_vllm

ROOT = Path(__file__).parents[3]
FILES = ("README.md", "compose.yaml", "kubernetes.yaml", "nginx.conf", "Dockerfile")
URL = re.compile(r"(?:http://|@)([a-z][\w-]*)(?::(\d+))?(?:/|$)")
"""Host and port of a URL that names a service."""
PORTS = {"postgres": 5432}
"""Ports that a URL leaves out."""


@pytest.fixture(scope="session")
def texts(deploy):
    return {name: (deploy / name).read_text(encoding="utf-8") for name in FILES}


@pytest.fixture(scope="session")
def compose(texts):
    return yaml.safe_load(texts["compose.yaml"])


@pytest.fixture(scope="session")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def settings(text):
    return set(re.findall(r"\bPERSONA_[A-Z_]*[A-Z]", text))


def default(name):
    return ServerConfig.model_fields[name].default


def test_compose_is_valid(deploy, tmp_path):
    def check(file):
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
        return subprocess.run(command, capture_output=True, text=True)

    checked = check(deploy / "compose.yaml")
    assert checked.returncode == 0, checked.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((deploy / "compose.yaml").read_text().replace("read_only:", "readonly:"))
    assert check(wrong).returncode == 1


def test_compose_uses_what_it_defines_and_defines_what_it_uses(compose, deploy):
    services = compose["services"]
    used = {kind: set() for kind in ("networks", "volumes", "configs", "secrets")}
    for service in services.values():
        for kind in ("networks", "secrets"):
            used[kind].update(service.get(kind, ()))
        used["configs"].update(config["source"] for config in service.get("configs", ()))
        sources = [re.sub(r"\$\{[^}]*\}", "$", volume).split(":")[0] for volume in service.get("volumes", ())]
        used["volumes"].update(source for source in sources if source != "$")
        assert set(service.get("depends_on", ())) <= set(services)
    assert used == {kind: set(compose[kind]) for kind in used}
    for file in (config["file"] for config in compose["configs"].values()):
        assert (deploy / file).is_file()
    build = services["gateway-1"]["build"]
    assert (deploy / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).samefile(deploy / "Dockerfile")


def test_compose_lets_nobody_past_nginx(compose):
    for name, service in compose["services"].items():
        assert ("ports" in service) == (name == "nginx")
        assert service["networks"] == (["inside", "outside"] if name == "nginx" else ["inside"])
    assert compose["networks"]["inside"]["internal"] is True


def test_compose_reaches_services_that_there_are(compose, texts):
    services = compose["services"]
    ports = {**PORTS, "vllm": 8000, "valkey": 6379}
    gateway = services["gateway-1"]
    assert ports["vllm"] == int(_flag(services["vllm"]["command"], "--port"))
    for value in gateway["environment"].values():
        for host, port in URL.findall(re.sub(r"\$\{[^}]*\}", "x", value)):
            assert host in services and int(port or ports[host]) == ports[host]
    for host, port in re.findall(r"server ([\w-]+):(\d+)", texts["nginx.conf"]):
        assert services[host]["command"] == gateway["command"] and port == _flag(gateway["command"], "--port")
    published = services["nginx"]["ports"][0].rsplit(":", 1)[1]
    assert f"listen {published};" in texts["nginx.conf"]


def test_readme_sets_all_variables_that_compose_asks_for(texts):
    asked = set(re.findall(r"\$\{([A-Z_]+)", texts["compose.yaml"]))
    written = re.search(r"cat > \.env <<END\n(.*?)\nEND", texts["README.md"], re.DOTALL).group(1)
    assert asked == {line.split("=")[0] for line in written.splitlines()}


@pytest.mark.parametrize("name", FILES)
def test_settings_exist(texts, name):
    fields = {f"PERSONA_{field.upper()}" for field in ServerConfig.model_fields}
    assert settings(texts[name]) <= fields


def test_gateways_have_the_same_settings_everywhere(compose, texts):
    services = compose["services"]
    assert services["gateway-1"] == services["gateway-2"]
    names = settings(texts["kubernetes.yaml"])
    assert names == set(services["gateway-1"]["environment"])
    assert {"PERSONA_SECRET_FILE", "PERSONA_UPSTREAM", "PERSONA_STORE", "PERSONA_CACHE_URL"} <= names
    for text in (texts["compose.yaml"], texts["kubernetes.yaml"]):
        assert re.findall(r'PERSONA_MAX_BODY: "(\d+)"', text) == [str(default("max_body"))]
    mib = re.search(r"client_max_body_size (\d+)m;", texts["nginx.conf"]).group(1)
    assert int(mib) * 2**20 == default("max_body")
    assert f"client_body_buffer_size {mib}m;" in texts["nginx.conf"], "no body is written to disk"


def _commands(texts, compose, manifest):
    """All calls of persona in the files, as lists of arguments."""
    found = [service["command"] for name, service in compose["services"].items() if _is_gateway(service["image"])]
    found += [container["args"] for container in manifest.containers() if _is_gateway(container["image"])]
    found.append(yaml.safe_load(re.search(r"^CMD (.*)$", texts["Dockerfile"], re.MULTILINE).group(1)))
    lines = re.findall(r"(?:^|`|\$URL )persona ([a-z][^`\n]*)", texts["README.md"], re.MULTILINE)
    return found + [shlex.split(line) for line in lines]


def test_persona_is_called_as_it_can_be(texts, compose, manifest):
    commands = _commands(texts, compose, manifest)
    assert ["store", "upgrade"] in commands and len(commands) >= 8
    for arguments in commands:
        command, rest = typer.main.get_command(app), list(arguments)
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, arguments
            command = command.commands[rest.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, arguments


def test_vllm_takes_its_arguments_and_they_go_with_user_tokens(compose, manifest):
    import_vllm()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (container,) = [c for c in manifest.containers() if c["name"] == "vllm"]
    service = compose["services"]["vllm"]
    assert service["command"] == container["args"]
    environment = {variable["name"]: variable.get("value", "from a secret") for variable in container["env"]}
    assert set(environment) == set(service["environment"])
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(container["args"])
    check_vllm_args(arguments, environment)
    assert arguments.served_model_name == ["llm"] and arguments.port == 8000


def test_images_are_pinned_and_of_versions_that_fit(texts, compose, manifest, project):
    images = [service["image"] for service in compose["services"].values()]
    images += [container["image"] for container in manifest.containers()]
    images += re.findall(r"^FROM (\S+)", texts["Dockerfile"], re.MULTILINE)
    (needed,) = map(Requirement, project["optional-dependencies"]["vllm"])
    for image in images:
        name, _, tag = image.rpartition(":")
        assert re.fullmatch(r"v?\d+\.\d+[\w.-]*", tag), f"{image} is not pinned"
        if name.endswith("vllm-openai"):
            assert needed.specifier.contains(tag)
        if _is_gateway(image):
            assert Version(tag) == Version(persona.__version__)
    assert {image.split(":")[0] for image in images} >= {"vllm/vllm-openai", "postgres", "valkey/valkey"}


def test_the_gateway_image_has_what_it_needs_and_no_vllm(texts, project):
    extras = re.search(r'pip install "/src\[([\w,]+)\]"', texts["Dockerfile"]).group(1).split(",")
    assert set(extras) == {"serve", "postgres", "redis"} <= set(project["optional-dependencies"])
    torch = re.search(r"whl/cpu (torch==\S+)", texts["Dockerfile"]).group(1)
    assert torch in (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8").splitlines()


def test_the_image_knows_the_user_that_it_runs_as(texts, manifest):
    (user,) = re.findall(r"^USER (\d+):\1$", texts["Dockerfile"], re.MULTILINE)
    assert f"useradd --uid {user} " in texts["Dockerfile"], "PyTorch asks for the name"
    for name in ("gateway", "store-upgrade"):
        pod = manifest.workloads()[name]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsUser"] == int(user)


def test_secrets_are_not_committed(deploy):
    ignored = (deploy / ".gitignore").read_text(encoding="utf-8").split()
    assert ignored == [".env", "secrets/"]


def test_a_gateway_does_not_start_with_placeholders(manifest, tmp_path):
    files = manifest.one("Secret", "persona-files")["stringData"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(PersonaError, match="must map tenants"):
        Authenticator(ServerConfig(adapter="unused", keys_file=tmp_path / "keys.yaml"))
    with pytest.raises(PersonaError, match="use 32 or more"):
        read_secret(tmp_path / "salt", "the secret")


def test_readme_names_files_that_there_are(texts, deploy):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", texts["README.md"])
    assert links
    for link in links:
        assert link.startswith("https://") or (deploy / link).exists(), link
    for probe in ("/persona/v1/health", "/persona/v1/ready"):
        assert probe in OPEN and probe in texts["README.md"]


def test_the_role_is_the_same_everywhere(deploy, manifest):
    role = manifest.one("ConfigMap", "postgres-role")["data"]["role.sql"]
    assert role == (deploy / "role.sql").read_text(encoding="utf-8")


def test_the_manifest_is_valid(manifest):
    version = kubernetes_validate.latest_version()
    for document in manifest.documents:
        kubernetes_validate.validate(document, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**manifest.one("Service", "gateway"), "spek": {}}, version, strict=True)


def _is_gateway(image):
    return image.rpartition(":")[0].endswith("persona-gateway")


def _flag(arguments, name):
    joined = " ".join(arguments).replace(f"{name}=", f"{name} ").split()
    return joined[joined.index(name) + 1]
