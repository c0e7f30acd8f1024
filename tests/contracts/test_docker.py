"""The files for Docker: nothing is published without an access key."""

import re
from typing import Any

import yaml

from falproxy.settings import variables
from tests.support.paths import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_compose_publishes_on_this_machine_only() -> None:
    published = [
        port for service in COMPOSE["services"].values() for port in service.get("ports", ())
    ]
    assert published
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_compose_requires_an_access_key_with_a_sentence() -> None:
    value = COMPOSE["services"]["proxy"]["environment"]["FALPROXY_ACCESS_KEYS"]
    match = re.fullmatch(r"\$\{FALPROXY_ACCESS_KEYS:\?([^{}$]+\.)\}", value)
    assert match is not None
    assert "fal balance" in match[1]


def test_the_image_requires_authentication() -> None:
    assert "FALPROXY_REQUIRE_AUTH=1" in DOCKERFILE


def test_all_variables_of_these_files_are_settings() -> None:
    used = re.findall(r"FALPROXY_\w+", DOCKERFILE + (ROOT / "docker-compose.yml").read_text())
    assert {*used} <= {*variables()}
