"""`/openapi.json`: the document is right, and the proxy keeps to it."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from aiohttp import ClientResponse, ClientSession, FormData, web
from aiohttp.test_utils import TestServer
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

import falproxy
from conftest import CANARY
from falproxy import Settings
from falproxy.app import HANDLER_ARGS
from falproxy.media.fetch import FETCHER
from falproxy.sandbox import Sandbox
from falproxy.sandbox import create_app as create_sandbox
from falproxy.web.openapi import PATH

DIALECT = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
# What fal's clients send through speaks fal's own API. The document, and the pages for people.
NOT_DESCRIBED = re.compile(r"/api/fal/.*|/openapi\.json|/docs(/.*)?|/|/dashboard|/web/.*")
# Every check of what comes back, and that what is wrong by the document is refused.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "allow_header_conformance",
    "unsupported_method", "missing_required_header", "negative_data_rejection",
)  # fmt: skip
FUZZING_SECONDS = 100.0


@dataclass(frozen=True, slots=True)
class Place:
    """A running proxy with the sandbox behind it. origin: with the prefix that it is below."""

    origin: str
    app: web.Application
    session: ClientSession

    async def document(self, **headers: str) -> Any:
        async with self.session.get(self.origin + PATH, headers=headers) as response:
            assert response.status == 200
            assert response.content_type == "application/json"
            return await response.json()


@asynccontextmanager
async def open_place(data_dir: Path, prefix: str = "", **given: Any) -> AsyncIterator[Place]:
    sandbox = Sandbox(speed=1000)
    async with TestServer(create_sandbox(sandbox)) as fal, ClientSession() as session:
        sandbox.public_url = f"http://127.0.0.1:{fal.port}"
        named: dict[str, Any] = {"upstream_origin": sandbox.public_url, "data_dir": data_dir}
        settings = Settings(fal_key=CANARY, **(named | {"rehost": "disk"} | given))
        app = web.Application(handler_args=HANDLER_ARGS)
        if prefix:
            falproxy.setup(app, settings, prefix=prefix)
        else:
            app = falproxy.create_app(settings)
        async with TestServer(app) as server:
            app[FETCHER].trust(f"{sandbox.public_url}/")
            yield Place(f"http://127.0.0.1:{server.port}{prefix}", app, session)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with open_place(tmp_path) as opened:
        yield opened


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def with_components(schema: Any, document: Any) -> Any:
    return {**DIALECT, **schema, "components": document["components"]}


async def test_it_is_openapi_3_1(place: Place) -> None:
    document = await place.document()
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == falproxy.__version__
    assert [str(error) for error in OPENAPI_31_VALIDATOR.iter_errors(document)] == []


async def test_its_schemas_are_json_schema(place: Place) -> None:
    document = await place.document()
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate({**DIALECT, **schema})


async def test_all_that_it_refers_to_is_there(place: Place) -> None:
    document = await place.document()
    names = {
        (kind, name)
        for kind, name in re.findall(r'"#/components/(\w+)/([^"]+)"', json.dumps(document))
    }
    for kind, name in names:
        assert name in document["components"][kind]


async def test_every_operation_says_what_it_is(place: Place) -> None:
    document = await place.document()
    tags = {tag["name"] for tag in document["tags"]}
    found = [operation for _, _, operation in operations(document)]
    assert len({operation["operationId"] for operation in found}) == len(found)
    for operation in found:
        assert operation["summary"]
        assert operation["description"]
        assert set(operation["tags"]) <= tags
        assert "200" in operation["responses"]


async def test_every_example_fits_its_schema(place: Place) -> None:
    document = await place.document()
    seen = 0
    for _, _, operation in operations(document):
        bodies = [operation["requestBody"]] if "requestBody" in operation else []
        for part in [*bodies, *operation["responses"].values()]:
            for media in part.get("content", {}).values():
                schema = with_components(media["schema"], document)
                for example in media.get("examples", {}).values():
                    jsonschema_rs.validate(schema, example["value"])
                    seen += 1
    assert seen > 100


async def test_the_routes_are_what_is_described(place: Place) -> None:
    """Both ways: no path is left out, and none is made up."""
    document = await place.document()
    routes = {resource.canonical for resource in place.app.router.resources()}
    assert {path for path in routes if not NOT_DESCRIBED.fullmatch(path)} == set(document["paths"])


async def send(place: Place, path: str, operation: Any, body: Any) -> ClientResponse:
    """A request as the document suggests it. body: a media type and an example for it."""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
    if body is None:
        return await place.session.get(place.origin + path)
    kind, example = body
    if kind == "multipart/form-data":
        form = FormData(default_to_multipart=True)
        for name, value in example.items():
            form.add_field(name, value)
        return await place.session.post(place.origin + path, data=form)
    return await place.session.post(place.origin + path, json=example)


async def test_every_example_works(place: Place) -> None:
    document = await place.document()
    sent = 0
    for path, _, operation in operations(document):
        if (
            any("{" + name + "}" in path for name in ("id", "name"))
            and "post" not in (document["paths"][path])
        ):
            continue  # of what was made before: the next test
        content = operation.get("requestBody", {}).get("content", {None: {}})
        for kind, media in content.items():
            for example in media.get("examples", {"": {"value": None}}).values():
                body = None if kind is None else (kind, example["value"])
                response = await send(place, path, operation, body)
                text = await response.text()
                assert response.status == 200, f"{path}: {text}"
                answered = operation["responses"]["200"]["content"]
                assert response.content_type in answered
                if response.content_type == "application/json":
                    schema = with_components(answered["application/json"]["schema"], document)
                    jsonschema_rs.validate(schema, json.loads(text))
                sent += 1
    assert sent == 21


async def test_what_was_made_can_be_asked_for(place: Place) -> None:
    """As the document's link says, and by the address of the picture."""
    document = await place.document()
    order = {"model": "flux-schnell", "inputs": {"prompt": "a lighthouse"}}
    late = {"Prefer": "respond-async"}
    url = f"{place.origin}/api/images/generate"
    async with place.session.post(url, json=order, headers=late) as response:
        operation = document["paths"]["/api/images/generate"]["post"]
        assert response.status == 202
        assert set(response.headers) & set(operation["responses"]["202"]["headers"])
        job = await response.json()
    async with asyncio.timeout(10):
        while job["status"] != "completed":
            job = await (
                await place.session.get(f"{place.origin}/api/images/jobs/{job['jobId']}")
            ).json()
            await asyncio.sleep(0.01)
    async with place.session.get(job["imageUrl"]) as response:
        file = document["paths"]["/files/{name}"]["get"]
        assert response.content_type in file["responses"]["200"]["content"]
        name = response.url.name
    assert re.search(file["parameters"][0]["schema"]["pattern"], name)


async def test_it_names_the_models_of_the_registry(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[models.mine]\nendpoint = "me/mine"\nrequired = ["prompt"]\n')
    async with open_place(tmp_path, models_file=own) as place:
        schemas = (await place.document())["components"]["schemas"]
    named = schemas["GenerateRequest"]["properties"]["model"]["enum"]
    assert {"flux-dev", "mine"} <= set(named)


async def test_a_locked_proxy_says_how_to_get_in_and_names_no_models(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[models.mine]\nendpoint = "me/mine"\nrequired = ["prompt"]\n')
    async with open_place(
        tmp_path, models_file=own, access_key="s3cret", models=(("hers", "me/hers"),)
    ) as place:
        document = await place.document()
    assert set(document["components"]["securitySchemes"]) == {"key", "bearer"}
    for path, _, operation in operations(document):
        is_guarded = not path.startswith(("/health", "/files"))
        assert ("security" in operation) is is_guarded
        assert ("401" in operation["responses"]) is is_guarded
    text = json.dumps(document)
    assert not any(word in text for word in ("s3cret", '"mine"', "hers"))


async def test_an_open_proxy_asks_for_no_key(place: Place) -> None:
    document = await place.document()
    assert "securitySchemes" not in document["components"]
    assert not any("401" in operation["responses"] for _, _, operation in operations(document))


async def test_files_are_described_where_they_are_served(tmp_path: Path) -> None:
    async with open_place(tmp_path, rehost="off") as place:
        assert "/files/{name}" not in (await place.document())["paths"]


async def test_its_server_is_where_the_client_sees_the_proxy(place: Place) -> None:
    assert (await place.document())["servers"] == [{"url": place.origin}]
    seen = await place.document(**{"Host": "ai.example.com", "X-Forwarded-Proto": "https"})
    assert seen["servers"] == [{"url": "https://ai.example.com"}]


async def test_its_server_has_the_prefix_of_the_proxy(tmp_path: Path) -> None:
    async with open_place(tmp_path, "/deep/er") as place:
        (server,) = (await place.document())["servers"]
        assert server["url"].endswith("/deep/er")
        async with place.session.get(f"{server['url']}/health/live") as response:
            assert response.status == 200


async def test_its_server_is_the_public_url_where_that_is_set(tmp_path: Path) -> None:
    async with open_place(tmp_path, public_url="https://pictures.example.com/ai") as place:
        document = await place.document()
    assert document["servers"] == [{"url": "https://pictures.example.com/ai"}]


async def test_who_has_it_does_not_get_it_again(place: Place) -> None:
    async with place.session.get(place.origin + PATH) as response:
        tag = response.headers["ETag"]
        assert response.headers["Cache-Control"] == "no-cache"
    known = {"If-None-Match": tag}
    async with place.session.get(place.origin + PATH, headers=known) as response:
        assert (response.status, await response.read()) == (304, b"")
    async with place.session.get(
        place.origin + PATH, headers={**known, "Host": "elsewhere.example.com"}
    ) as response:
        assert response.status == 200


@pytest.mark.timeout(FUZZING_SECONDS + 20)
async def test_the_proxy_keeps_to_it_whatever_is_sent(place: Place, tmp_path: Path) -> None:
    """schemathesis: examples, limits of every parameter, and what chance makes of a fixed seed."""
    tags = [tag["name"] for tag in (await place.document())["tags"]]
    # Processes, since its own workers are threads, in which Python 3.11 now and then fails to
    # parse (python/cpython#106905).
    async with asyncio.timeout(FUZZING_SECONDS), asyncio.TaskGroup() as group:
        runs = [group.create_task(fuzz(place.origin + PATH, tag, tmp_path)) for tag in tags]
    reports = [run.result() for run in runs]
    assert sum(int(cases) for cases in re.findall(r"(\d+) generated", "".join(reports))) > 500


async def fuzz(url: str, tag: str, directory: Path) -> str:
    """What schemathesis says of the operations with a tag, when it has nothing against them."""
    command = (
        sys.executable, "-m", "schemathesis.cli", "run", url, f"--include-tag={tag}",
        "--seed=1", "--max-examples=5", "--phases=examples,coverage,fuzzing",
        f"--checks={','.join(CHECKS)}", "--generation-database=none", "--no-shrink",
        "--continue-on-failure", "--request-timeout=20", "--suppress-health-check=all",
        "--warnings=off", "--no-color",
    )  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()
    return output.decode()
