"""The files for deployment: no secret is in them, access keys are required, settings exist."""

import configparser
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from falproxy.settings import KEY_VARIABLES, variables
from tests.support.js_world import need
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
COMPOSE_FILES = ("docker-compose.yml", "deploy/compose.yml")
LOCK_FILES = ("deploy/image/requirements.txt", "deploy/image/build-requirements.txt")
FILES = [
    ROOT / "Dockerfile",
    ROOT / "docker-compose.yml",
    *(path for path in sorted(DEPLOY.rglob("*")) if path.is_file()),
    *sorted((ROOT / ".github").rglob("*.yml")),
]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, dict[str, Any]] = {
    name: yaml.safe_load((ROOT / name).read_text()) for name in COMPOSE_FILES
}
KUBERNETES = {
    document["kind"]: document
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
}
POD: dict[str, Any] = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]
RENDER: dict[str, Any] = yaml.safe_load((DEPLOY / "render.yaml").read_text())
FLY: dict[str, Any] = tomllib.loads((DEPLOY / "fly.toml").read_text())
SECRET = re.compile(r"(KEY|KEYS|SECRET|PASSWORD|TOKEN|SUPABASE_URL|REDIS_URL|DATABASE_URL)$")
# `NAME: value`, `NAME=value` or `NAME = value`, where the name is that of a variable.
ASSIGNMENT = re.compile(r"^[^#\n]*?\b([A-Z][A-Z0-9_]+)[ \t]*[:=][ \t]*(.*)", re.MULTILINE)
# Values that reveal nothing: none, a reference, or a place in the same compose project.
HARMLESS = re.compile(
    r"['\"]?("
    r"|\$\{.*|\$[A-Z_]+\".*"
    r"|redis://redis:6379/0|postgresql://falproxy:\$\{.*"
    r"|(web:|id:)?(not-a-)?secret"
    r")['\"]?"
)
READY, LIVE = "/health/ready", "/health/live"
DRAIN = 5 + 1.5 * 30 + 4.5  # seconds of a stop, with FALPROXY_STOP_DELAY and FALPROXY_DRAIN


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def proxies(name: str) -> Iterator[dict[str, Any]]:
    """Yield the services of a compose file that run falproxy."""
    services = COMPOSE[name]["services"].values()
    yield from (service for service in services if "build" in service)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_file_contains_a_secret(path: Path) -> None:
    for name, value in ASSIGNMENT.findall(path.read_text()):
        if SECRET.search(name):
            assert HARMLESS.fullmatch(value.strip()), f"{name} in {path.name}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_all_variables_in_the_files_are_settings(path: Path) -> None:
    used = re.findall(r"\bFALPROXY_[A-Z_]+", path.read_text())
    assert {*used} <= {*variables(), *KEY_VARIABLES}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_file_contains_a_path_of_a_machine_or_an_index(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"/(work|root|Users|home)/", text)
    assert "--index-url" not in text
    assert "--find-links" not in text


def test_the_guide_sets_all_variables_that_compose_requires() -> None:
    required = re.findall(r"\$\{(\w+):\?", (ROOT / "deploy/compose.yml").read_text())
    (block,) = re.findall(
        r"cat > deploy/.env <<EOF\n(.*?)EOF", (ROOT / "docs/deployment.md").read_text(), re.DOTALL
    )
    assert {*required} <= {*re.findall(r"^(\w+)=", block, re.MULTILINE)}


def test_the_image_requires_authentication() -> None:
    assert "FALPROXY_REQUIRE_AUTH=1" in DOCKERFILE


def test_the_image_runs_as_a_number_and_writes_to_its_volume_only() -> None:
    users = re.findall(r"^USER (.*)", DOCKERFILE, re.MULTILINE)
    assert [re.fullmatch(r"[1-9]\d*:0", user) is not None for user in users] == [True]
    assert "\nVOLUME /data\n" in DOCKERFILE
    assert "\nWORKDIR /data\n" in DOCKERFILE
    assert "PYTHONDONTWRITEBYTECODE=1" in DOCKERFILE


def test_all_packages_of_the_image_are_pinned_with_hashes() -> None:
    installs = re.findall(r"pip install (.*?)(?:\\|&&|$)", DOCKERFILE, re.MULTILINE)
    from_the_index = [each for each in installs if "--no-index" not in each]
    assert len(from_the_index) == len(LOCK_FILES)
    assert all("--require-hashes --only-binary :all:" in each for each in from_the_index)
    for name in LOCK_FILES:
        text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE)
        for entry in re.split(r"\n(?=\S)", text.strip()):
            assert re.match(r"[\w.-]+==\S+( ; .*)? \\\n", entry), entry
            assert "--hash=sha256:" in entry
        assert "://" not in text


def locked_versions() -> dict[str, list[str]]:
    versions: dict[str, list[str]] = {}
    for name, version in re.findall(
        r"^([\w.-]+)==([^\s;]+)", (ROOT / LOCK_FILES[0]).read_text(), re.MULTILINE
    ):
        versions.setdefault(canonicalize_name(name), []).append(version)
    return versions


def test_the_lock_file_agrees_with_the_requirements() -> None:
    """Run `make lock` if this fails."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    makefile = (ROOT / "Makefile").read_text()
    (extras,) = re.findall(r"^IMAGE_EXTRAS := (.*)", makefile, re.MULTILINE)
    texts = [config["options"]["install_requires"]]
    texts += [config["options.extras_require"][extra] for extra in extras.split()]
    versions = locked_versions()
    for line in "\n".join(texts).split("\n"):
        if not line or line.startswith(("#", "falproxy[")):
            continue
        requirement = Requirement(line)
        locked = versions.get(canonicalize_name(requirement.name), [])
        assert locked, line
        assert all(requirement.specifier.contains(Version(each)) for each in locked), line


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_publishes_on_this_machine_only(name: str) -> None:
    published = [
        port for service in COMPOSE[name]["services"].values() for port in service.get("ports", ())
    ]
    assert published
    allowed = ("127.0.0.1:", "${LISTEN:-127.0.0.1}:")
    assert [port for port in published if not port.startswith(allowed)] == []


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_requires_an_access_key_with_a_sentence(name: str) -> None:
    for service in proxies(name):
        value = service["environment"]["FALPROXY_ACCESS_KEYS"]
        match = re.match(r"\$\{FALPROXY_ACCESS_KEYS:\?([^{}$]+\.)\}", value)
        assert match is not None
        assert len(match[1].split()) > 5


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_the_proxies_of_compose_have_a_read_only_root_and_time_to_stop(name: str) -> None:
    for service in proxies(name):
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp"]
        assert service["cap_drop"] == ["ALL"]
        assert any(volume.endswith("/data") for volume in service["volumes"])
        assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN


def test_three_proxies_share_redis_and_postgres_behind_caddy() -> None:
    services = COMPOSE["deploy/compose.yml"]["services"]
    names = [name for name, service in services.items() if "build" in service]
    assert len(names) == 3
    caddyfile = (DEPLOY / "caddy/Caddyfile").read_text()
    assert f"{{$PROXIES:{' '.join(f'{name}:8080' for name in names)}}}" in caddyfile
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    targets = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    assert targets == [f"{name}:8080" for name in names]
    for name in names:
        assert {"REDIS_URL", "DATABASE_URL"} <= {*services[name]["environment"]}
    assert "volatile-lru" in services["redis"]["command"]
    assert not [port for name in names for port in services[name].get("ports", ())]


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_the_mounted_files_of_compose_exist(name: str) -> None:
    folder = (ROOT / name).parent
    for service in COMPOSE[name]["services"].values():
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (folder / volume.partition(":")[0]).exists(), volume


def test_the_pods_of_kubernetes_are_restricted() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    # Else the service `falproxy` would become FALPROXY_PORT=tcp://...
    assert POD["enableServiceLinks"] is False
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {mount["mountPath"] for mount in CONTAINER["volumeMounts"]} == {"/data", "/tmp"}


def test_the_probes_of_kubernetes_ask_for_health() -> None:
    paths = {kind: CONTAINER[f"{kind}Probe"]["httpGet"]["path"] for kind in
             ("startup", "liveness", "readiness")}  # fmt: skip
    assert paths == {"startup": LIVE, "liveness": LIVE, "readiness": READY}
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == 8080
    assert KUBERNETES["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def test_kubernetes_gives_a_pod_time_to_stop() -> None:
    environment = {each["name"]: each["value"] for each in CONTAINER["env"]}
    probe = CONTAINER["readinessProbe"]
    unnoticed = probe["periodSeconds"] * probe["failureThreshold"]
    assert int(environment["FALPROXY_STOP_DELAY"]) > unnoticed
    assert POD["terminationGracePeriodSeconds"] > int(environment["FALPROXY_STOP_DELAY"]) + DRAIN


def test_the_secret_of_kubernetes_is_made_from_a_file_that_is_not_in_the_repository() -> None:
    (generator,) = KUBERNETES["Kustomization"]["secretGenerator"]
    assert CONTAINER["envFrom"] == [{"secretRef": {"name": generator["name"]}}]
    assert generator["envs"] == ["falproxy.env"]
    assert "falproxy.env" in (ROOT / ".gitignore").read_text().split()
    example = (DEPLOY / "kubernetes/falproxy.env.example").read_text()
    names = {*re.findall(r"^(\w+)=", example, re.MULTILINE)}
    assert {"FAL_KEY", "FALPROXY_ACCESS_KEYS", "REDIS_URL", "DATABASE_URL"} <= names


def test_kustomize_lists_all_files() -> None:
    listed = {*KUBERNETES["Kustomization"]["resources"], "kustomization.yaml"}
    assert listed == {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")}


def test_kustomize_builds_all_resources(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is in no package of Debian")
    folder = shutil.copytree(DEPLOY / "kubernetes", tmp_path / "kubernetes")
    shutil.copy(folder / "falproxy.env.example", folder / "falproxy.env")
    built = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, check=True)
    documents = {each["kind"]: each for each in yaml.safe_load_all(built.stdout)}
    assert {*documents} == {
        "Namespace", "Secret", "Deployment", "Service", "HorizontalPodAutoscaler",
        "PodDisruptionBudget", "NetworkPolicy",
    }  # fmt: skip
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind, path in (
        ("Service", ("selector",)),
        ("PodDisruptionBudget", ("selector", "matchLabels")),
        ("NetworkPolicy", ("podSelector", "matchLabels")),
    ):
        selector = documents[kind]["spec"]
        for name in path:
            selector = selector[name]
        assert selector.items() <= labels.items(), kind
        assert selector, kind


def test_render_asks_for_the_keys_and_checks_readiness() -> None:
    proxy, redis = RENDER["services"]
    variables_ = {each["key"]: each for each in proxy["envVars"]}
    assert variables_["FAL_KEY"]["sync"] is False
    assert variables_["FALPROXY_ACCESS_KEYS"]["sync"] is False
    assert variables_["REDIS_URL"]["fromService"]["name"] == redis["name"]
    assert variables_["DATABASE_URL"]["fromDatabase"]["name"] == RENDER["databases"][0]["name"]
    assert proxy["healthCheckPath"] == READY
    assert proxy["maxShutdownDelaySeconds"] > DRAIN
    assert redis["maxmemoryPolicy"] == "volatile-lru"
    assert "FALPROXY_PORT" not in variables_, "Render sets PORT"
    assert redis["ipAllowList"] == RENDER["databases"][0]["ipAllowList"] == []


def test_fly_checks_readiness_on_the_port_of_the_proxy() -> None:
    service = FLY["http_service"]
    assert str(service["internal_port"]) == FLY["env"]["FALPROXY_PORT"]
    assert [check["path"] for check in service["checks"]] == [READY]
    assert int(FLY["kill_timeout"].removesuffix("s")) > DRAIN
    assert (DEPLOY / FLY["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("not installed: systemd-analyze")
    unit = (DEPLOY / "systemd/falproxy.service").read_text()
    file = tmp_path / "falproxy.service"
    file.write_text(unit.replace("/opt/falproxy/bin/falproxy", "/bin/true"))
    result = subprocess.run(
        ["systemd-analyze", "verify", file], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_unit_is_hardened_and_has_time_to_stop() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "systemd/falproxy.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert "FALPROXY_REQUIRE_AUTH=1" in service["Environment"]
    assert (service["NoNewPrivileges"], service["ProtectSystem"]) == ("yes", "strict")
    assert service["CapabilityBoundingSet"] == ""
    assert int(service["TimeoutStopSec"]) > DRAIN


def test_caddy_accepts_its_file(tmp_path: Path) -> None:
    need(Path("caddy"))
    command = ["caddy", "adapt", "--config", str(DEPLOY / "caddy/Caddyfile"), "--validate"]
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr
