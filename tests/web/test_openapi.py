"""`/openapi.json`: the document is complete and valid, and the proxy behaves as described."""

import asyncio
import gzip
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from aiohttp import ClientResponse, FormData
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

import falproxy
from falproxy.fal.registry import read_registry
from falproxy.media.content_type import CONTENT_TYPES
from falproxy.web.openapi import (
    FILL,
    FILLS,
    IF,
    PATH,
    SOURCE,
    ApiDescription,
    build_document,
    read_source,
)
from falproxy.web.openapi.schemas import component_schemas
from tests.support.running_proxy import RunningProxy, open_running_proxy
from tests.support.waiting import SOON

DIALECT = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
# The document itself, and the web pages with their files.
NOT_DESCRIBED = re.compile(
    r"/openapi\.json|/docs(/.*)?|/|/dashboard|/web/.*|/favicon\.ico|/robots\.txt"
)
# All checks of responses, and that invalid requests are refused.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "allow_header_conformance",
    "unsupported_method", "missing_required_header", "negative_data_rejection",
)  # fmt: skip
# Operations of fal's queue, which need a request id.
QUEUE_OPERATIONS = ("falProxyGet", "falProxyCancel", "falQueueGet", "falQueueCancel")
VIDEO_OPERATIONS = ("getVideo", "deleteVideo", "getVideoContent")
NEED_A_JOB = ("getJob", "cancelJob", "getFile", *QUEUE_OPERATIONS, *VIDEO_OPERATIONS)
FUZZING_SECONDS = 300  # 40 alone; other tests run at the same time
FUZZERS = 2  # processes
PUBLIC_SCHEMAS = {
    "Error", "Estimate", "EstimateRequest", "EstimatedLimit", "EstimatedLimits",
    "EstimatedRefusal", "FalError", "GenerateRequest",
    "FoundModel", "FoundModels", "Health", "JobAnswer", "JobError", "JobFile", "Jobs",
    "KontextDevRequest", "KontextImage", "KontextProRequest", "KontextResult", "LatestCall",
    "Live", "ModelAnswer", "ModelsAnswer", "NamedSums", "OpenAIEditJsonRequest",
    "OpenAIEditRequest", "OpenAIErrorDetail", "OpenAIErrorResponse", "OpenAIGenerationRequest",
    "OpenAIImageEvent", "OpenAIImagesResponse", "OpenAIModelInfo", "OpenAIModelList",
    "OpenAIPicture", "OpenAIDeletedVideo", "OpenAISpeechRequest", "OpenAIVideo",
    "OpenAIVideoError", "OpenAIVideoForm", "OpenAIVideoList", "OpenAIVideoRequest",
    "OpenAIVoiceId", "Picture", "Spread", "Sums", "TemplateAnswer", "TemplateRequest",
    "Templates", "TimedSums", "Usage", "UsageTable", "VariableAnswer",
}  # fmt: skip
# Requests for each model and each template of the registry.
MODEL_SCHEMAS = {
    "GenerateAceStepMusic", "GenerateElevenlabsSpeech", "GenerateEndpoint", "GenerateFaceSwap",
    "GenerateFastLightningSdxl", "GenerateFastSdxl", "GenerateFluxDev", "GenerateFluxLora",
    "GenerateFluxPro", "GenerateFluxSchnell", "GenerateHailuoVideo", "GenerateImageToImage",
    "GenerateKlingVideo", "GenerateKokoroSpeech", "GenerateKontext", "GenerateKontextDev",
    "GenerateKontextLora", "GenerateKontextMax", "GenerateKontextMulti",
    "GenerateKontextTextToImage", "GenerateLtxVideo", "GenerateMinimaxSpeech",
    "GenerateNanoBanana", "GenerateNanoBananaEdit", "GenerateOptions", "GenerateStableAudio",
    "GenerateStableAudioOpen", "GenerateVeoVideo", "TemplateBillboard", "TemplateDiscountBanner",
    "TemplateProductShot",
}  # fmt: skip
PUBLIC_OPERATIONS = {
    "createVideo", "listVideos", "getVideo", "deleteVideo", "getVideoContent", "createSpeech",
    "edit", "editMax", "editDev", "createImage", "createImageEdit", "listModels", "getModel",
    "generate", "generateByTemplate", "getJob", "listJobs", "cancelJob", "listTemplates",
    "listImageModels", "usage", "calls", "performance", "state", "metrics", "health",
    "healthLive", "healthReady", "getFile", "estimate", "falProxyGet",
    "falProxy", "falProxyCancel", "falRun",
    "falQueueGet", "falQueueSubmit", "falQueueCancel", "falRest",
}  # fmt: skip

# Of a proxy that accepts keys made at run time.
KEY_SCHEMAS = {"ManagedKey", "ManagedKeyFields", "ManagedKeyList", "ManagedKeyWithSecret"}
KEY_OPERATIONS = {"listKeys", "createKey", "getKey", "changeKey", "revokeKey", "rotateKey"}
KEYS = (("ann", "ann-s3cret-of-ann"),)
ADMIN = {"x-falproxy-key": "ann-s3cret-of-ann"}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[RunningProxy]:
    async with open_running_proxy(tmp_path) as opened:
        yield opened


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of a document. spec: the operation object, with references to components
    replaced by the components, except for schemas."""

    path: str
    method: str
    spec: Any


def operations(document: Any) -> list[Operation]:
    return [
        Operation(path, method, inlined(spec, document))
        for path, item in document["paths"].items()
        for method, spec in item.items()
    ]


def operation(document: Any, operation_id: str) -> Any:
    """The operation object with this id."""
    (spec,) = (
        each.spec for each in operations(document) if each.spec["operationId"] == operation_id
    )
    return spec


def inlined(node: Any, document: Any) -> Any:
    if isinstance(node, list):
        return [inlined(each, document) for each in node]
    if not isinstance(node, dict):
        return node
    ref = node.get("$ref")
    if ref is not None and not ref.startswith("#/components/schemas/"):
        return inlined(component(document, ref), document)
    return {key: inlined(value, document) for key, value in node.items()}


def component(document: Any, ref: str) -> Any:
    """The target of a reference. Raises: KeyError, it does not exist."""
    start, components, kind, name = ref.split("/")
    assert (start, components) == ("#", "components")
    return document["components"][kind][name]


def refs(node: Any) -> set[str]:
    return set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(node)))


def examples(media: Any) -> list[Any]:
    """The values of all examples of a media type object."""
    single = [media["example"]] if "example" in media else []
    return single + [example["value"] for example in media.get("examples", {}).values()]


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects inside of a value, and the value itself."""
    if isinstance(node, dict):
        yield node
        node = [*node.values()]
    if isinstance(node, list):
        for each in node:
            yield from objects(each)


def with_components(schema: Any, document: Any) -> Any:
    return {**DIALECT, **schema, "components": document["components"]}


CONFIGURATIONS = pytest.mark.parametrize(
    ("is_locked", "has_files"),
    [
        pytest.param(False, False, id="open, without files"),
        pytest.param(False, True, id="open, with files"),
        pytest.param(True, False, id="locked, without files"),
        pytest.param(True, True, id="locked, with files"),
    ],
)


def document_for(*, is_locked: bool = False, has_files: bool = True) -> Any:
    return build_document(
        ApiDescription(
            registry=read_registry(),
            models=(("flux-dev", "fal-ai/flux/dev"),),
            is_locked=is_locked,
            has_files=has_files,
            public_url=None,
            has_keys=is_locked,
        )
    )


class UniqueKeyLoader(yaml.SafeLoader):
    """Rejects a mapping with a repeated key, of which YAML loaders silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"a key is repeated in {keys}"
        return super().construct_mapping(node, deep)


def test_the_source_parses_to_plain_json() -> None:
    """YAML turns unquoted status codes, dates and ratios such as 16:9 into other types."""
    source = yaml.load(SOURCE.read_text("utf-8"), UniqueKeyLoader)
    assert source == read_source()
    assert json.loads(json.dumps(source)) == source


def test_every_reference_of_the_source_resolves_to_a_component() -> None:
    source = read_source()
    generated = {f"#/components/schemas/{name}" for name in component_schemas()}
    for ref in refs(source) - generated:
        component(source, ref)


def test_no_schema_is_both_written_and_generated() -> None:
    source: Any = read_source()
    assert not source["components"]["schemas"].keys() & component_schemas().keys()


def test_every_component_of_the_source_is_used() -> None:
    source: Any = read_source()
    used = refs(source) | refs(component_schemas())
    for kind in (
        "parameters",
        "requestBodies",
        "responses",
        "headers",
        "links",
        "examples",
        "schemas",
    ):
        for name in source["components"][kind]:
            assert f"#/components/{kind}/{name}" in used, name


def test_every_placeholder_of_the_source_is_known_and_used() -> None:
    found = [*objects(read_source())]
    assert {node[FILL] for node in found if FILL in node} == set(FILLS)
    assert {node[IF] for node in found if IF in node} == {"files", "keys", "locked"}


def test_the_source_is_in_the_package(root: Path) -> None:
    config = ConfigParser()
    config.read(root / "setup.cfg")
    assert SOURCE.name in config["options.package_data"]["falproxy.web.openapi"].split()


@CONFIGURATIONS
def test_no_placeholder_is_left(is_locked: bool, has_files: bool) -> None:
    document = document_for(is_locked=is_locked, has_files=has_files)
    keys = {key for node in objects(document) for key in node}
    ours = {key for key in keys if key.startswith("x-falproxy-")}
    headers = {"x-falproxy-cost", "x-falproxy-rehost", "x-falproxy-saved"}
    assert ours == headers


@CONFIGURATIONS
def test_it_is_openapi_3_1(is_locked: bool, has_files: bool) -> None:
    document = document_for(is_locked=is_locked, has_files=has_files)
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == falproxy.__version__
    assert [str(error) for error in OPENAPI_31_VALIDATOR.iter_errors(document)] == []


@CONFIGURATIONS
def test_every_reference_resolves_to_a_component(is_locked: bool, has_files: bool) -> None:
    document = document_for(is_locked=is_locked, has_files=has_files)
    for ref in refs(document):
        component(document, ref)


def test_names_that_clients_are_generated_from_do_not_change() -> None:
    """They are independent of the names of the classes."""
    document = document_for()
    schemas = document["components"]["schemas"]
    assert {*schemas} == PUBLIC_SCHEMAS | MODEL_SCHEMAS
    assert all(schemas[name]["title"] == name for name in schemas)
    assert {each.spec["operationId"] for each in operations(document)} == PUBLIC_OPERATIONS
    locked = document_for(is_locked=True)
    assert {*locked["components"]["schemas"]} == PUBLIC_SCHEMAS | KEY_SCHEMAS
    ids = {each.spec["operationId"] for each in operations(locked)}
    assert ids == PUBLIC_OPERATIONS | KEY_OPERATIONS


async def test_the_served_document_is_valid(proxy: RunningProxy) -> None:
    document = await proxy.document()
    assert [str(error) for error in OPENAPI_31_VALIDATOR.iter_errors(document)] == []


async def test_its_schemas_are_json_schema(proxy: RunningProxy) -> None:
    document = await proxy.document()
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate({**DIALECT, **schema})


async def test_every_operation_is_described(proxy: RunningProxy) -> None:
    document = await proxy.document()
    tags = {tag["name"] for tag in document["tags"]}
    specs = [each.spec for each in operations(document)]
    assert len({spec["operationId"] for spec in specs}) == len(specs)
    for spec in specs:
        assert spec["summary"]
        assert spec["description"]
        assert set(spec["tags"]) <= tags
        assert "200" in spec["responses"]


async def test_every_example_is_valid_for_its_schema(proxy: RunningProxy) -> None:
    document = await proxy.document()
    count = 0
    for each in operations(document):
        bodies = [each.spec["requestBody"]] if "requestBody" in each.spec else []
        for part in [*bodies, *each.spec["responses"].values()]:
            for media in part.get("content", {}).values():
                schema = with_components(media["schema"], document)
                for example in examples(media):
                    jsonschema_rs.validate(schema, example)
                    count += 1
    assert count > 100


async def test_the_example_of_an_event_is_valid_for_its_schema(proxy: RunningProxy) -> None:
    document = await proxy.document()
    content = operation(document, "createImage")["responses"]["200"]["content"]
    media = content["text/event-stream"]
    data = media["schema"]["properties"]["data"]
    assert data["contentMediaType"] == "application/json"
    (example,) = examples(media)
    schema = with_components(data["contentSchema"], document)
    jsonschema_rs.validate(schema, json.loads(example["data"]))


async def test_the_described_paths_are_the_routes(proxy: RunningProxy) -> None:
    document = await proxy.document()
    routes = {resource.canonical for resource in proxy.app.router.resources()}
    assert {path for path in routes if not NOT_DESCRIBED.fullmatch(path)} == set(document["paths"])


async def test_the_routes_of_keys_are_described_and_respond_so(tmp_path: Path) -> None:
    async with open_running_proxy(tmp_path, access_keys=KEYS, admins=("ann",)) as proxy:
        document = await proxy.document()
        routes = {resource.canonical for resource in proxy.app.router.resources()}
        described = {path for path in routes if not NOT_DESCRIBED.fullmatch(path)}
        assert described == set(document["paths"])
        for operation_id, method, path in (
            ("createKey", "POST", ""),
            ("listKeys", "GET", ""),
            ("getKey", "GET", "/web"),
            ("changeKey", "PATCH", "/web"),
            ("rotateKey", "POST", "/web/rotate"),
            ("revokeKey", "DELETE", "/web"),
        ):
            spec = operation(document, operation_id)
            media = spec.get("requestBody", {}).get("content", {}).get("application/json", {})
            body = media.get("example")
            if body is not None:
                jsonschema_rs.validate(with_components(media["schema"], document), body)
            url = f"{proxy.origin}/api/keys{path}"
            async with proxy.session.request(method, url, json=body, headers=ADMIN) as response:
                described_response = spec["responses"][str(response.status)]
                schema = described_response["content"]["application/json"]["schema"]
                jsonschema_rs.validate(with_components(schema, document), await response.json())
                assert response.ok


async def send(
    proxy: RunningProxy, each: Operation, body: tuple[str, Any] | None
) -> ClientResponse:
    """Send a request with the examples of the document.

    body: a media type and an example of it; None for a GET request.
    """
    path = each.path
    headers = {}
    for parameter in each.spec.get("parameters", ()):
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
        elif parameter["in"] == "header" and "example" in parameter:
            headers[parameter["name"]] = parameter["example"]
    if body is None:
        return await proxy.session.get(proxy.origin + path)
    media_type, example = body
    if media_type == "multipart/form-data":
        form = FormData(default_to_multipart=True)
        for name, value in example.items():
            form.add_field(name, value)
        return await proxy.session.post(proxy.origin + path, data=form)
    return await proxy.session.post(proxy.origin + path, json=example, headers=headers)


def request_bodies(spec: Any) -> list[tuple[str, Any] | None]:
    """The media types and values of all examples of a request body; None for no body."""
    content = spec.get("requestBody", {}).get("content", {})
    return [(kind, value) for kind, media in content.items() for value in examples(media)] or [None]


async def test_every_example_works(proxy: RunningProxy) -> None:
    document = await proxy.document()
    count = 0
    for each in operations(document):
        if each.spec["operationId"] in NEED_A_JOB:
            continue
        for body in request_bodies(each.spec):
            response = await send(proxy, each, body)
            received = await response.read()
            assert response.status == 200, f"{each.path}: {received.decode()}"
            content = each.spec["responses"]["200"]["content"]
            assert response.content_type in content
            if response.content_type == "application/json":
                schema = with_components(content["application/json"]["schema"], document)
                jsonschema_rs.validate(schema, json.loads(received))
            count += 1
    assert count == 36


async def test_a_job_and_its_image_can_be_read_as_described(proxy: RunningProxy) -> None:
    document = await proxy.document()
    body = {"model": "flux-schnell", "inputs": {"prompt": "a lighthouse"}}
    headers = {"Prefer": "respond-async"}
    url = f"{proxy.origin}/api/images/generate"
    async with proxy.session.post(url, json=body, headers=headers) as response:
        accepted = operation(document, "generate")["responses"]["202"]
        assert response.status == 202
        assert set(response.headers) & set(accepted["headers"])
        assert accepted["links"]["job"]["parameters"] == {"id": "$response.body#/jobId"}
        job = await response.json()
    async with asyncio.timeout(SOON):
        while job["status"] != "completed":
            job = await (
                await proxy.session.get(f"{proxy.origin}/api/images/jobs/{job['jobId']}")
            ).json()
            await asyncio.sleep(0.01)
    async with proxy.session.get(job["imageUrl"]) as response:
        spec = operation(document, "getFile")
        assert response.content_type in spec["responses"]["200"]["content"]
        name = response.url.name
    assert re.search(spec["parameters"][0]["schema"]["pattern"], name)


async def test_it_lists_the_models_and_templates_of_the_registry(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[models.mine]\nendpoint = "me/mine"\nrequired = ["prompt"]\n')
    async with open_running_proxy(tmp_path, models_file=own) as proxy:
        document = await proxy.document()
    assert {"GenerateFluxDev", "GenerateMine"} <= {
        *alternatives(document, "GenerateRequest", "oneOf")
    }
    template = operation(document, "generateByTemplate")["parameters"][0]["schema"]
    assert {"billboard", "discount-banner", "product-shot"} <= set(template["enum"])


def alternatives(document: Any, request: str, key: str) -> dict[str, Any]:
    """Return the schemas of the alternatives of a request by their titles."""
    schemas = document["components"]["schemas"]
    found = [component(document, each["$ref"]) for each in schemas[request][key]]
    return {schema["title"]: schema for schema in found}


def test_each_model_has_its_inputs() -> None:
    document, registry = document_for(), read_registry()
    found = alternatives(document, "GenerateRequest", "oneOf")
    assert [*found].pop() == "GenerateEndpoint"
    del found["GenerateEndpoint"]
    names = [schema["properties"]["model"]["enum"] for schema in found.values()]
    assert names == [[name] for name in registry.models]
    for schema, model in zip(found.values(), registry.models.values(), strict=True):
        inputs = schema["properties"]["inputs"]
        assert inputs["required"] == [*model.required]
        assert {*inputs["properties"]} >= {*model.accepted_inputs}


def is_valid(document: Any, schema: str, body: object) -> bool:
    validator = jsonschema_rs.validator_for(
        with_components({"$ref": f"#/components/schemas/{schema}"}, document)
    )
    return bool(validator.is_valid(body))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param({"model": "flux-dev", "inputs": {"prompt": "a"}}, True, id="a prompt"),
        pytest.param(
            {
                "model": "flux-lora",
                "inputs": {
                    "prompt": "a",
                    "image_url": "https://a.example/b.jpg",
                    "lora_url": "https://a.example/c.safetensors",
                    "lora_scale": 0.8,
                },
                "options": {"width": 1024, "height": 1024},
                "userId": "user123",
            },
            True,
            id="inputs of variants",
        ),
        pytest.param(
            {"model": "face-swap", "inputs": {"image_url": "a", "target_image_url": "b"}},
            True,
            id="renamed inputs",
        ),
        pytest.param({"model": "flux-dev", "inputs": {}}, False, id="a missing input"),
        pytest.param({"model": "flux-dev"}, False, id="no inputs"),
        pytest.param(
            {"model": "flux-dev", "inputs": {"prompt": "a", "seed": None, "image_size": None}},
            True,
            id="null for optional inputs",
        ),
        pytest.param(
            {"model": "flux-dev", "inputs": {"prompt": None}}, False, id="null for a required input"
        ),
        pytest.param(
            {"model": "flux-dev", "inputs": {"prompt": "a", "colour": 1}}, False, id="unknown input"
        ),
        pytest.param(
            {"model": "kontext-multi", "inputs": {"prompt": "a", "image_url": "b"}},
            False,
            id="an input of another model",
        ),
        pytest.param({"model": "none", "inputs": {"prompt": "a"}}, False, id="an unknown model"),
    ],
)
def test_requests_are_valid_by_their_model(body: object, expected: bool) -> None:
    assert is_valid(document_for(), "GenerateRequest", body) is expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param({"variables": {"product": "a soap"}}, True, id="variables"),
        pytest.param({"variables": {"headline": "Sale", "city": 7}}, True, id="another template"),
        pytest.param({"template": "product-shot"}, True, id="only the name"),
        pytest.param({"template": "billboard", "variables": {}}, False, id="a missing variable"),
        pytest.param({"variables": {"price": "7"}}, False, id="an unknown variable"),
        pytest.param({"variables": {"product": True}}, False, id="a wrong type"),
        pytest.param({"template": "product-shot", "variables": {"light": None}}, True, id="null"),
    ],
)
def test_requests_are_valid_by_a_template(body: object, expected: bool) -> None:
    assert is_valid(document_for(), "TemplateRequest", body) is expected


async def test_models_of_any_name_have_a_component(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    entry = (
        '[models."{}"]\nendpoint = "me/mine"\nrequired = ["thing"]\ndefaults = {{ thing = 7 }}\n'
    )
    names = ("flux.dev", "Flux Dev", "ü", "ö", "a/b", "openai")
    own.write_text("".join(map(entry.format, names)))
    async with open_running_proxy(tmp_path, models_file=own) as proxy:
        document = await proxy.document()
    assert [str(error) for error in OPENAPI_31_VALIDATOR.iter_errors(document)] == []
    found = alternatives(document, "GenerateRequest", "oneOf")
    assert all(re.fullmatch(r"[A-Z][A-Za-z0-9]+", title) for title in found)
    assert len({title.lower() for title in found}) == len(found)
    del found["GenerateEndpoint"]
    by_model = {schema["properties"]["model"]["enum"][0]: schema for schema in found.values()}
    assert {*names} <= {*by_model}
    assert by_model["ü"]["properties"]["inputs"]["properties"] == {
        "thing": {"description": "(default: 7)"}
    }


def test_endpoint_ids_are_models() -> None:
    document = document_for()
    for model, expected in (("fal-ai/any/model", True), ("flux-dev", True), ("flux-none", False)):
        body = {"model": model, "inputs": {"prompt": "a"}}
        assert is_valid(document, "GenerateRequest", body) is expected
    assert not is_valid(document, "GenerateRequest", {"model": "flux-dev", "inputs": {"a": 1}})


def test_the_document_stays_small() -> None:
    text = json.dumps(document_for()).encode()
    assert len(text) < 200_000
    assert len(gzip.compress(text)) < 30_000


async def test_it_lists_the_models_of_the_openai_api(tmp_path: Path) -> None:
    models = (("photo", "me/photo"), ("sketch", "me/sketch"))
    async with open_running_proxy(tmp_path, models=models) as proxy:
        (parameter,) = operation(await proxy.document(), "getModel")["parameters"]
    assert parameter["description"].endswith(" The names are photo, sketch.")
    assert parameter["example"] == "photo"


def test_all_types_of_stored_files_are_described() -> None:
    spec = operation(document_for(), "getFile")
    pattern = spec["parameters"][0]["schema"]["pattern"]
    for extension, content_type in CONTENT_TYPES.items():
        assert re.search(pattern, f"{'0' * 64}.{extension}")
        for status in ("200", "206"):
            assert content_type in spec["responses"][status]["content"]


async def test_a_locked_proxy_describes_authentication_and_lists_no_models(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[models.mine]\nendpoint = "me/mine"\nrequired = ["prompt"]\n')
    async with open_running_proxy(
        tmp_path, models_file=own, access_key="s3cret", models=(("photo", "me/sketch"),)
    ) as proxy:
        document = await proxy.document()
    assert set(document["components"]["securitySchemes"]) == {"key", "bearer"}
    for each in operations(document):
        requires_auth = not each.path.startswith(("/health", "/files"))
        assert ("security" in each.spec) is requires_auth
        assert ("401" in each.spec["responses"]) is requires_auth
    text = json.dumps(document)
    assert not any(word in text for word in ("s3cret", '"mine"', "photo", "me/sketch"))


async def test_an_open_proxy_describes_no_authentication(proxy: RunningProxy) -> None:
    document = await proxy.document()
    assert "securitySchemes" not in document["components"]
    assert not any("Unauthenticated" in name for name in document["components"]["responses"])
    for each in operations(document):
        assert "security" not in each.spec
        assert "401" not in each.spec["responses"]


async def test_files_are_described_only_if_they_are_served(tmp_path: Path) -> None:
    async with open_running_proxy(tmp_path, rehost="off") as proxy:
        assert "/files/{name}" not in (await proxy.document())["paths"]


async def test_its_server_is_the_url_that_the_client_uses(proxy: RunningProxy) -> None:
    assert (await proxy.document())["servers"] == [{"url": proxy.origin}]
    seen = await proxy.document(**{"Host": "ai.example.com", "X-Forwarded-Proto": "https"})
    assert seen["servers"] == [{"url": "https://ai.example.com"}]


async def test_its_server_includes_the_prefix(tmp_path: Path) -> None:
    async with open_running_proxy(tmp_path, "/deep/er") as proxy:
        (server,) = (await proxy.document())["servers"]
        assert server["url"].endswith("/deep/er")
        async with proxy.session.get(f"{server['url']}/health/live") as response:
            assert response.status == 200


async def test_its_server_is_the_public_url_if_that_is_set(tmp_path: Path) -> None:
    async with open_running_proxy(tmp_path, public_url="https://images.example.com/ai") as proxy:
        document = await proxy.document()
    assert document["servers"] == [{"url": "https://images.example.com/ai"}]


async def test_the_described_calls_of_fal_work(proxy: RunningProxy) -> None:
    submit = f"{proxy.origin}/api/fal/queue/fal-ai/flux/schnell"
    async with proxy.session.post(submit, json={"prompt": "a lighthouse"}) as response:
        urls = await response.json()
    for name, method, statuses in (
        ("status_url", "GET", (200, 202)),
        ("cancel_url", "PUT", (202, 400)),
    ):
        async with proxy.session.request(method, urls[name]) as response:
            assert response.status in statuses
    for name, method in (("response_url", "GET"), ("cancel_url", "PUT")):
        target = f"https://queue.fal.run{urls[name].partition('/api/fal/queue')[2]}"
        headers = {"x-fal-target-url": target}
        url = f"{proxy.origin}/api/fal/proxy"
        async with proxy.session.request(method, url, headers=headers) as response:
            assert response.status in (200, 202, 400, 499)


@CONFIGURATIONS
def test_every_operation_has_security_of_its_own_or_none(is_locked: bool, has_files: bool) -> None:
    document = document_for(is_locked=is_locked, has_files=has_files)
    assert document["security"] == []
    schemes = document["components"].get("securitySchemes", {})
    for each in operations(document):
        for requirement in each.spec.get("security", ()):
            assert {*requirement} <= {*schemes}


def test_no_two_properties_or_titles_have_the_same_identifier() -> None:
    """Generators of clients make identifiers of them, and leave out a schema with two equal."""
    schemas = document_for()["components"]["schemas"]
    titles = [schema["title"] for schema in schemas.values()]
    assert len({*titles}) == len(titles)
    for name, schema in schemas.items():
        identifiers = [re.sub(r"\W", "", key).lower() for key in schema.get("properties", ())]
        assert len({*identifiers}) == len(identifiers), name


async def test_the_document_is_compressed_for_clients_that_accept_gzip(
    proxy: RunningProxy,
) -> None:
    plain, compressed = {"Accept-Encoding": "identity"}, {"Accept-Encoding": "gzip"}
    async with proxy.session.get(proxy.origin + PATH, headers=plain) as response:
        assert "Content-Encoding" not in response.headers
        document, tag = await response.read(), response.headers["ETag"]
    async with proxy.session.get(proxy.origin + PATH, headers=compressed) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert response.headers["Vary"] == "Accept-Encoding"
        assert int(response.headers["Content-Length"]) < len(document) / 4
        assert response.headers["ETag"] != tag
        assert await response.read() == document
    headers = compressed | {"If-None-Match": response.headers["ETag"]}
    async with proxy.session.get(proxy.origin + PATH, headers=headers) as response:
        assert (response.status, await response.read()) == (304, b"")


async def test_a_current_copy_of_the_document_is_a_304(proxy: RunningProxy) -> None:
    async with proxy.session.get(proxy.origin + PATH) as response:
        tag = response.headers["ETag"]
        assert response.headers["Cache-Control"] == "no-cache"
    known = {"If-None-Match": tag}
    async with proxy.session.get(proxy.origin + PATH, headers=known) as response:
        assert (response.status, await response.read()) == (304, b"")
    async with proxy.session.get(
        proxy.origin + PATH, headers={**known, "Host": "elsewhere.example.com"}
    ) as response:
        assert response.status == 200


@pytest.mark.slow(seconds=60)
@pytest.mark.timeout(FUZZING_SECONDS + 20)
async def test_responses_to_generated_requests_are_as_described(
    proxy: RunningProxy, tmp_path: Path
) -> None:
    """schemathesis sends examples, limits of every parameter, and random data of a fixed seed."""
    # What fal responds is not for the document to describe.
    tags = [tag["name"] for tag in (await proxy.document())["tags"] if tag["name"] != "fal"]
    # Processes instead of the threads of schemathesis, in which the parser of Python 3.11
    # sometimes fails (python/cpython#106905).
    async with asyncio.timeout(FUZZING_SECONDS), asyncio.TaskGroup() as group:
        runs = [
            group.create_task(fuzz(proxy.origin + PATH, tags[number::FUZZERS], tmp_path))
            for number in range(FUZZERS)
        ]
    reports = [run.result() for run in runs]
    assert sum(int(cases) for cases in re.findall(r"(\d+) generated", "".join(reports))) > 500


async def fuzz(url: str, tags: Sequence[str], directory: Path) -> str:
    """Test the operations with these tags, and return the report of schemathesis."""
    command = (
        sys.executable, "-m", "schemathesis.cli", "run", url,
        *(f"--include-tag={tag}" for tag in tags),
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
