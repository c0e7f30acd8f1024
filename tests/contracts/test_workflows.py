"""The workflows run what CONTRIBUTING describes, with few permissions."""

import configparser
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

FOLDER = ROOT / ".github/workflows"
# `on` is a boolean in YAML 1.1.
WORKFLOWS: dict[str, dict[str, Any]] = {
    path.stem: {("on" if key is True else key): value for key, value in document.items()}
    for path in sorted(FOLDER.glob("*.yml"))
    for document in [yaml.safe_load(path.read_text())]
}
JOBS = [
    pytest.param(job, id=f"{workflow}-{name}")
    for workflow, document in WORKFLOWS.items()
    for name, job in document["jobs"].items()
]
Job = dict[str, Any]


def commands(job: Job) -> Iterator[str]:
    for step in job.get("steps", ()):
        yield from step.get("run", "").splitlines()


def supported_versions() -> list[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return re.findall(r":: Python :: (3\.\d+)", config["metadata"]["classifiers"])


def test_pull_requests_run_all_checks_on_all_versions() -> None:
    workflow = WORKFLOWS["test"]
    assert "pull_request" in workflow["on"]
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == supported_versions()
    assert [*commands(job)] == ["make check", "make test"]


def test_pull_requests_run_all_checks_with_the_lowest_dependencies() -> None:
    job = WORKFLOWS["test"]["jobs"]["lowest"]
    assert job["container"] == f"python:{supported_versions()[0]}-bookworm"
    assert [*commands(job)] == ["make lowest", "make check", "make test"]


def test_the_commands_of_make_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for workflow in WORKFLOWS.values():
        for job in workflow["jobs"].values():
            for command in commands(job):
                if command.startswith("make "):
                    assert command.removeprefix("make ") in targets


def test_nothing_is_published_before_the_tests_have_passed() -> None:
    release = WORKFLOWS["release"]
    assert release["on"] == {"push": {"tags": ["v*"]}}
    jobs = release["jobs"]
    assert jobs["test"]["uses"].endswith("/workflows/test.yml")
    for name in ("pypi", "image"):
        assert {"test", "build"} <= {*jobs[name]["needs"]}
    assert {*jobs["release"]["needs"]} == {"pypi", "image"}


def test_the_image_is_for_two_architectures_with_sbom_and_provenance() -> None:
    *_, step = WORKFLOWS["release"]["jobs"]["image"]["steps"]
    assert step["with"]["platforms"].split(",") == ["linux/amd64", "linux/arm64"]
    assert step["with"]["sbom"] is True
    assert step["with"]["provenance"] == "mode=max"


def test_dependencies_are_renewed_and_audited_weekly() -> None:
    weekly = WORKFLOWS["weekly"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", weekly["on"]["schedule"][0]["cron"])
    assert "make lock" in [*commands(weekly["jobs"]["update"])]
    assert any(line.startswith("pip-audit ") for line in commands(weekly["jobs"]["audit"]))
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    assert {update["schedule"]["interval"] for update in updates} == {"weekly"}


@pytest.mark.parametrize("job", JOBS)
def test_jobs_end(job: Job) -> None:
    assert "uses" in job or job["timeout-minutes"] <= 60


@pytest.mark.parametrize("job", JOBS)
def test_actions_are_pinned(job: Job) -> None:
    for step in job.get("steps", ()):
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@(v\d+|release/v\d+|[0-9a-f]{40})", step["uses"])


@pytest.mark.parametrize("job", JOBS)
def test_the_token_is_not_left_to_later_steps(job: Job) -> None:
    for step in job.get("steps", ()):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_only_read_unless_a_job_needs_more(name: str) -> None:
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    text = (FOLDER / f"{name}.yml").read_text()
    assert {*re.findall(r"secrets\.(\w+)", text)} <= {"GITHUB_TOKEN"}


@pytest.mark.parametrize("job", JOBS)
def test_commands_take_no_input_of_strangers(job: Job) -> None:
    """A title or a branch name in `${{ }}` would be part of the script."""
    assert not [line for line in commands(job) if "${{" in line]
