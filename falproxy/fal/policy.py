"""The policy for calls: allowed endpoints, and the other services of fal that clients need."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from falproxy.errors import ProxyError
from falproxy.fal.target import (
    LIVE_HOST,
    LIVE_MODEL_CALLS,
    LIVE_PATHS,
    QUEUE_HOST,
    RUN_HOST,
    Operation,
    Target,
)

# The current and the older name of one service.
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
# Documents that fal serves without a key.
PUBLIC_DOCUMENTS = (
    ("fal.ai", "/api/openapi/queue/openapi.json"),
    ("rest.fal.ai", "/.well-known/jwks.json"),
)
# Documents that are the same for all accounts, and are requested without the key.
KEYLESS_DOCUMENTS = (*PUBLIC_DOCUMENTS, ("api.fal.ai", "/v1/models"))
# The method of each operation below /requests/<id>. With another one, fal could take the whole path
# for an endpoint id.
QUEUE_METHODS = {
    Operation.STATUS: "GET",
    Operation.STATUS_STREAM: "GET",
    Operation.RESULT: "GET",
    Operation.CANCEL: "PUT",
}


MATCH_LENGTH_MAX = 200  # characters of a text that is matched


class Globs:
    """Patterns for ids or URLs: `*` matches characters of one segment, `**` any characters."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.globs = tuple(pattern.removeprefix("https://") for pattern in patterns)
        self._patterns = [re.compile(to_regex(text), re.DOTALL) for text in self.globs]

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def match(self, text: str) -> bool:
        # No endpoint id is longer, and matching a long text can take seconds.
        return len(text) <= MATCH_LENGTH_MAX and any(
            pattern.fullmatch(text) for pattern in self._patterns
        )


def to_regex(glob: str) -> str:
    parts = re.split(r"(\*\*|\*)", glob)
    return "".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)


@dataclass(frozen=True, slots=True)
class Policy:
    """Allowed calls.

    endpoints: endpoint ids; empty for all.
    targets: hosts with paths, in addition to those that every client needs.
    uploads: whether clients may upload files.
    live: whether clients may open sessions of live video.
    """

    endpoints: Globs
    targets: Globs
    uploads: bool = True
    live: bool = True

    def check(self, method: str, target: Target) -> None:
        """Raises: ProxyError 403 `target_forbidden`."""
        if target.host == LIVE_HOST and not self.live:
            raise forbidden("live video is turned off")
        if target.is_ambiguous:
            if target.host + target.path in self.targets.globs:  # as it stands, not by a wildcard
                return
            raise forbidden("its path is not in plain form")
        path = normalized_path(target)
        if target.host == LIVE_HOST and target.operation in LIVE_PATHS.values():
            check_live_request(method, target)
            return
        if self.targets.match(target.host + path):
            return
        if is_model_call(method, target):
            self.check_path(path.strip("/"))
        elif not (
            QUEUE_METHODS.get(target.operation) == method
            or (method == "GET" and (target.host, path) in PUBLIC_DOCUMENTS)
            or (method == "POST" and target.host in REST_HOSTS and self._is_client_path(path))
        ):
            raise forbidden(f"{target.host} is called for models, uploads and tokens only")

    def check_path(self, path: str) -> None:
        """Check the path of a model call. Below an allowed endpoint, `/ice` is allowed as well, for
        a body that `middleware/live_calls.py` checks.

        Raises: ProxyError 403 `target_forbidden`.
        """
        app = live_app_of(path)
        self.check_endpoint(path if app is None or self.endpoints.match(path) else app)

    def check_endpoint(self, endpoint: str) -> None:
        """Raises: ProxyError 403 `target_forbidden`."""
        bare = endpoint.removesuffix("/stream").removesuffix("/realtime")
        if self.endpoints and not self.endpoints.match(bare):
            raise forbidden(f"{bare} is not among the endpoints that this proxy may call")

    def is_token_request(self, method: str, target: Target) -> bool:
        """Return whether a call creates a token, for apps that must be checked.

        Raises: ProxyError 403, the call has a query, which might override its body.
        """
        if target.is_ambiguous:
            return False
        path = normalized_path(target)
        is_token = target.host in REST_HOSTS and path in TOKEN_PATHS
        if method != "POST" or not is_token or self.targets.match(target.host + path):
            return False
        if target.query:
            raise forbidden("a request for a token must not have a query")
        return True

    def check_app(self, app: str) -> None:
        """Check an app of a token: an endpoint id, or an alias alone, as the JS client sends it.

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
    if target.host == LIVE_HOST:
        return target.operation in LIVE_MODEL_CALLS
    on_models = target.host in (RUN_HOST, QUEUE_HOST)
    return on_models and QUEUE_METHODS.get(target.operation) != method


def creates_token(method: str, target: Target) -> bool:
    """Return whether a call creates a token, with which a client calls models at fal directly."""
    on_rest = target.host in REST_HOSTS and method == "POST"
    return on_rest and normalized_path(target) in TOKEN_PATHS


def model_of(target: Target) -> str:
    """Return the endpoint id that a model call is charged by; empty if it names none."""
    if target.live_endpoint is not None or target.host == LIVE_HOST:
        return target.live_endpoint or ""
    return normalized_path(target).strip("/").removesuffix("/stream")


def live_app_of(path: str) -> str | None:
    """Return the endpoint id of a path such as `owner/alias/ice`, at which live video is asked for
    its servers if `wma.fal.run` has none; None for other paths."""
    endpoint, _, last = path.rpartition("/")
    segments = endpoint.split("/")
    minimum = 3 if segments[0] in NAMESPACES else 2
    return endpoint if last == "ice" and len(segments) >= minimum else None


def may_be_live_call(target: Target) -> bool:
    """Return whether a call is one of live video, as far as its target shows."""
    if target.host == LIVE_HOST:
        return target.operation is not Operation.OTHER
    return target.host == RUN_HOST and live_app_of(normalized_path(target).strip("/")) is not None


def check_live_request(method: str, target: Target) -> None:
    """Raises: ProxyError 403, a call of live video has another form than those of fal's client. A
    query might override its body."""
    if method != "POST" or target.query or target.is_ambiguous:
        raise forbidden("live video is called with POST, without a query")


def needs_key(method: str, target: Target) -> bool:
    """Return whether a call is sent with a fal key: all but those for public documents."""
    if target.host in (RUN_HOST, QUEUE_HOST) or method != "GET":
        return True
    return (target.host, normalized_path(target)) not in KEYLESS_DOCUMENTS


def normalized_path(target: Target) -> str:
    """Return the path as fal decodes it, without a trailing slash."""
    return unquote(target.path).rstrip("/") or "/"


def alias_globs(endpoints: Globs) -> Globs:
    """Return the aliases of endpoint patterns: the second segment, or the third after a
    namespace."""
    aliases = []
    for glob in endpoints.globs:
        segments = glob.split("/")
        index = 2 if segments[0] in NAMESPACES else 1
        aliases.append(segments[index] if len(segments) > index else segments[-1])
    return Globs(aliases)


def app_globs(endpoints: Globs) -> Globs:
    """Return the apps of endpoint patterns, as in the URLs of queued requests."""
    return Globs(app_of(glob) for glob in endpoints.globs)


def app_of(endpoint: str) -> str:
    """Return the app of an endpoint id: owner and alias, with the namespace if there is one."""
    segments = endpoint.split("/")
    return "/".join(segments[: 3 if segments[0] in NAMESPACES else 2])


def forbidden(reason: str) -> ProxyError:
    return ProxyError(403, "target_forbidden", f"This proxy does not allow that call: {reason}.")
