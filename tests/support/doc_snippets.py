"""The code blocks of the documentation, and how tests run them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.support.offline_fal import png
from tests.support.paths import ROOT

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "llms.txt")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Languages that tests run, and those that are no code.
LANGUAGES = ("sh", "python", "js", "toml", "nginx", "caddy")
NO_CODE = {"": "output", "http": "headers of a response", "mermaid": "a diagram"}


@dataclass(frozen=True, slots=True)
class Snippet:
    """A code block. document: path in the repository."""

    document: str
    language: str
    text: str

    @property
    def name(self) -> str:
        """Return a name for test reports."""
        first_line = self.text.partition("\n")[0]
        return f"{Path(self.document).name}: {first_line[:50]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a snippet is run, beside the defaults of its language.

    after: part of an earlier snippet of the document, which is run first.
    before, then: code around the snippet.
    output: regular expression that is found in the output.
    env: environment variables.
    """

    after: str = ""
    before: str = ""
    then: str = ""
    output: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


IMAGE_URL = r"http://(localhost|127\.0\.0\.1):\d+/files/\w+\.jpg"
FAL_IMPORT = 'import { fal } from "@fal-ai/client";\n'
FILE = f"const file = new Blob([new Uint8Array({[*png()]})], {{ type: 'image/png' }});\n"
ASGI = """
from contextlib import asynccontextmanager
import falproxy
fal = falproxy.asgi(falproxy.Settings.from_env())
"""
FASTAPI = """
import falproxy
from fastapi import HTTPException
from fastapi.requests import HTTPConnection
def current_user(connection): ...
"""
DJANGO = "import falproxy\nasync def fal_user(request): ...\nasync def django(*args): ...\n"
AI_SDK = """
import { experimental_generateSpeech, generateImage } from "ai";
const prompt = "a heron";
const { image } = await generateImage({ model: fal.image("fal-ai/flux/schnell"), prompt });
console.log(image.mediaType);
const model = fal.speech("fal-ai/no-speech");
await experimental_generateSpeech({ model, text: prompt, maxRetries: 0 })
  .catch((error) => console.log(error.statusCode, error.responseHeaders["x-request-id"]));
"""

# Document and a part of the snippet → how it is run. All others run with the defaults.
RUNS: dict[tuple[str, str], Run] = {
    ("README.md", "api/fal/run/fal-ai/flux/dev"): Run(output=IMAGE_URL),
    ("README.md", "proxyUrl"): Run(before=FILE, then="console.log(data.images[0].url);"),
    ("README.md", "SyncClient"): Run(output=IMAGE_URL),
    ("README.md", "from openai"): Run(output=IMAGE_URL),
    ("docs/getting-started.md", "x-fal-target-url"): Run(output=IMAGE_URL),
    ("docs/getting-started.md", "onQueueUpdate"): Run(
        before=FILE, then="console.log(data.images[0].url);", output=rf"COMPLETED\n{IMAGE_URL}"
    ),
    ("docs/getting-started.md", "fal.run("): Run(output=IMAGE_URL),
    ("docs/getting-started.md", "SyncClient"): Run(output=IMAGE_URL),
    ("docs/getting-started.md", "AsyncClient"): Run(output=IMAGE_URL),
    ("docs/getting-started.md", "falproxy.client.install"): Run(output=IMAGE_URL),
    ("docs/getting-started.md", "Bearer change-me-please"): Run(
        after="FALPROXY_ACCESS_KEYS=web:change-me-please\n", output=IMAGE_URL
    ),
    ("docs/getting-started.md", "falproxy doctor"): Run(env={"FALPROXY_SANDBOX": "1"}),
    ("docs/security.md", "curl -i -X OPTIONS"): Run(
        after="FALPROXY_ALLOWED_ORIGINS=",
        output=r"204 No Content[^$]*Access-Control-Allow-Origin: https://app\.example\.com",
    ),
    ("docs/configuration.md", "falproxy doctor"): Run(env={"FALPROXY_SANDBOX": "1"}),
    ("docs/authentication-and-limits.md", "curl -i"): Run(
        after="FALPROXY_BUDGET=5/day",
        output=r'x-falproxy-cost: 0\.025[^$]*RateLimit: "rate";r=59;t=\d+, "budget";r=4975000;t=',
    ),
    ("docs/re-hosting.md", "falproxy files gc"): Run(env={"FALPROXY_REHOST": "disk"}),
    ("docs/apis.md", "api/fal/queue"): Run(output=r'"http://[\w.]+:\d+/api/fal/queue/fal-ai/flux/'),
    ("docs/apis.md", "createFal"): Run(then=AI_SDK, output=r"image/jpeg\n404 \w{32}"),
    ("docs/apis.md", "wma.fal.run/ice"): Run(output=r'\{"ice_servers": ?\[\]\}'),
    ("docs/apis.md", "/kontext"): Run(output=IMAGE_URL),
    ("docs/apis.md", "from openai"): Run(output=IMAGE_URL),
    ("docs/apis.md", "client.videos"): Run(after="from openai"),
    ("docs/apis.md", "client.audio"): Run(after="from openai"),
    ("docs/apis.md", '"options": {"width"'): Run(output=IMAGE_URL),
    ("docs/usage-and-metrics.md", "api/estimate"): Run(output=r'"cost": ?0\.05'),
    ("docs/migration.md", "/kontext/max"): Run(output=IMAGE_URL),
    ("docs/migration.md", "Bearer change-me-please"): Run(
        after="CUSTOM_ACCESS_KEY=change-me-please", output=IMAGE_URL
    ),
    ("docs/migration.md", '"model": "flux-pro"'): Run(output=IMAGE_URL),
    ("docs/deployment.md", "cat > deploy/.env"): Run(before="mkdir deploy\n"),
    ("docs/deployment.md", "build proxy-1"): Run(
        before="mkdir deploy\n", after="cat > deploy/.env"
    ),
    ("docs/embedding.md", "@asynccontextmanager"): Run(before=ASGI),
    ("docs/embedding.md", "async def fal_user"): Run(before=FASTAPI),
    ("docs/embedding.md", "await django("): Run(before=DJANGO),
    ("docs/embedding.md", "module.exports"): Run(
        before="const module = {};\n",
        then="console.log((await module.exports.rewrites())[0].destination);",
        output="http://127.0.0.1:8080/api/fal/",
    ),
    ("docs/embedding.md", 'fal.config({ proxyUrl: "/api/fal/proxy" });'): Run(before=FAL_IMPORT),
    ("docs/embedding.md", "defineConfig"): Run(before="const defineConfig = (it) => it;\n"),
    ("docs/llms.txt", "proxyUrl"): Run(output=IMAGE_URL),
    ("docs/llms.txt", "SyncClient"): Run(output=IMAGE_URL),
    ("docs/llms.txt", "from openai"): Run(output=IMAGE_URL),
    ("docs/llms.txt", "api/fal/run"): Run(output=IMAGE_URL),
}

DOCKER = "needs Docker; tests/contracts/test_deployment.py checks the files that it reads"
EXAMPLES = "tests/end_to_end/test_asgi_examples.py runs the example in servers of its own"
# Document and a part of the snippet → why no test runs it.
NOT_RUN: dict[tuple[str, str], str] = {
    ("docs/getting-started.md", "npm run dev"): "tests/end_to_end/test_js_browser.py runs it built",
    ("docs/deployment.md", "docker run"): DOCKER,
    ("docs/deployment.md", "kubectl apply"): "needs a cluster",
    ("docs/deployment.md", "fly deploy"): "needs an account of Fly",
    ("docs/deployment.md", "systemctl"): "needs root and systemd",
    ("docs/deployment.md", "sudo -u falproxy"): "needs root and the user of the unit",
    ("docs/embedding.md", "uvicorn --app-dir examples/fastapi"): EXAMPLES,
    ("docs/embedding.md", "cd examples/django"): EXAMPLES,
    ("docs/performance.md", "compare --only"): "needs the environments of `make bench`",
    (
        "docs/operations.md",
        "falproxy trace",
    ): "the id is an example; tests/cli/test_trace_command.py",
}


@cache
def all_snippets() -> tuple[Snippet, ...]:
    return (*read_snippets(),)


def read_snippets() -> Iterator[Snippet]:
    for path in DOCUMENTS:
        document = path.relative_to(ROOT).as_posix()
        for language, text in FENCE.findall(path.read_text()):
            yield Snippet(document, language, text)


def find_all(document: str, part: str) -> list[Snippet]:
    return [each for each in all_snippets() if each.document == document and part in each.text]


def find(document: str, part: str) -> Snippet:
    """Return the only snippet of a document that contains a text."""
    (snippet,) = find_all(document, part)
    return snippet


def runnable() -> list[Snippet]:
    """Return the snippets that tests run, without repetitions of the same code."""
    left_out = {find(*key) for key in NOT_RUN}
    by_code = {
        (each.language, each.text, run_of(each).after): each
        for each in all_snippets()
        if each.language not in NO_CODE and each not in left_out
    }
    return [*by_code.values()]


def run_of(snippet: Snippet) -> Run:
    for (document, part), run in RUNS.items():
        if snippet.document == document and part in snippet.text:
            return run
    return Run()
