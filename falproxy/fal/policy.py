"""What may be called: endpoints by a list, and of fal's other services only what clients need."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from falproxy.errors import ProxyError
from falproxy.fal.target import QUEUE_HOST, RUN_HOST, Operation, Target

# One service under its present and its older name.
REST_HOSTS = ("rest.fal.ai", "rest.alpha.fal.ai")
UPLOAD_PATHS = (
    "/storage/upload/initiate",
    "/storage/upload/initiate-multipart",
    "/storage/auth/token",
)
NAMESPACES = ("workflows", "comfy")
# An endpoint id, or an alias alone.
APP = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)
TOKEN_PATHS = ("/tokens", "/tokens/realtime")
# Documents that anybody may read at fal, without a key.
PUBLIC_DOCUMENTS = (
    ("fal.ai", "/api/openapi/queue/openapi.json"),
    ("rest.fal.ai", "/.well-known/jwks.json"),
)
# The one method that makes a URL below /requests/<id> what it says; with any other, fal could
# take the whole path for an endpoint's.
QUEUE_METHODS = {
    Operation.STATUS: "GET",
    Operation.STATUS_STREAM: "GET",
    Operation.RESULT: "GET",
    Operation.CANCEL: "PUT",
}


MATCH_LENGTH_MAX = 200


class Globs:
    """Patterns over ids or addresses: `*` stands for characters of one segment, `**` for any."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.globs = tuple(pattern.removeprefix("https://") for pattern in patterns)
        self._patterns = [re.compile(to_regex(text), re.DOTALL) for text in self.globs]

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def match(self, text: str) -> bool:
        # Longer ones are no endpoint of fal's, and could keep a pattern busy for seconds.
        return len(text) <= MATCH_LENGTH_MAX and any(
            pattern.fullmatch(text) for pattern in self._patterns
        )


def to_regex(glob: str) -> str:
    parts = re.split(r"(\*\*|\*)", glob)
    return "".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)


@dataclass(frozen=True, slots=True)
class Policy:
    """endpoints: the ids that may be called, empty for all. targets: addresses (host and path)
    that may be called beside what every client needs. uploads: whether files may be announced.
    """

    endpoints: Globs
    targets: Globs
    uploads: bool = True

    def check(self, method: str, target: Target) -> None:
        """Raises: ProxyError 403 `target_forbidden`."""
        path = normalized_path(target)
        if self.targets.match(target.host + path):
            return
        if is_model_call(method, target):
            self.check_endpoint(path.strip("/"))
        elif not (
            QUEUE_METHODS.get(target.operation) == method
            or (method == "GET" and (target.host, path) in PUBLIC_DOCUMENTS)
            or (method == "POST" and target.host in REST_HOSTS and self._is_client_path(path))
        ):
            raise forbidden(f"{target.host} is called for models, uploads and tokens only")

    def check_endpoint(self, endpoint: str) -> None:
        """Raises: ProxyError 403 `target_forbidden`."""
        bare = endpoint.removesuffix("/stream").removesuffix("/realtime")
        if self.endpoints and not self.endpoints.match(bare):
            raise forbidden(f"{bare} is not among the endpoints that this proxy may call")

    def is_token_request(self, method: str, target: Target) -> bool:
        """Whether the call makes a token, whose apps have to be looked at.

        Raises: ProxyError 403, the call has a query, which could say more than its body.
        """
        path = normalized_path(target)
        is_token = target.host in REST_HOSTS and path in TOKEN_PATHS
        if method != "POST" or not is_token or self.targets.match(target.host + path):
            return False
        if target.query:
            raise forbidden("a token is asked for without a query")
        return True

    def check_app(self, app: str) -> None:
        """An app of a token: an endpoint id, or as the JS client says it an alias alone.

        Raises: ProxyError 403 `target_forbidden`.
        """
        if not APP.fullmatch(app):
            raise forbidden("a token has to name its apps")
        if "/" in app:
            self.check_endpoint(app)
        elif self.endpoints and not alias_globs(self.endpoints).match(app):
            raise forbidden(f"{app} is not among the apps that this proxy makes tokens for")

    def _is_client_path(self, path: str) -> bool:
        return path in TOKEN_PATHS or (self.uploads and path in UPLOAD_PATHS)


def is_model_call(method: str, target: Target) -> bool:
    on_models = target.host in (RUN_HOST, QUEUE_HOST)
    return on_models and QUEUE_METHODS.get(target.operation) != method


def normalized_path(target: Target) -> str:
    """The path as fal decodes it, without a last slash."""
    return unquote(target.path).rstrip("/") or "/"


def alias_globs(endpoints: Globs) -> Globs:
    """The aliases in endpoint patterns: the second segment, or the third behind a namespace."""
    found = []
    for text in endpoints.globs:
        parts = text.split("/")
        place = 2 if parts[0] in NAMESPACES else 1
        found.append(parts[place] if len(parts) > place else parts[-1])
    return Globs(found)


def app_globs(endpoints: Globs) -> Globs:
    """The apps in endpoint patterns, as the URLs of queued requests name them."""
    return Globs(app_of(text) for text in endpoints.globs)


def app_of(endpoint: str) -> str:
    """The app of an endpoint id: owner and alias, behind a namespace if there is one."""
    parts = endpoint.split("/")
    return "/".join(parts[: 3 if parts[0] in NAMESPACES else 2])


def forbidden(reason: str) -> ProxyError:
    return ProxyError(403, "target_forbidden", f"This proxy does not allow that call: {reason}.")
