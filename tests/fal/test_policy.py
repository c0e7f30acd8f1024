"""The policy: tables of allowed calls, and of refused ones in every spelling."""

import time

import pytest

from falproxy.errors import ProxyError
from falproxy.fal.policy import Globs, Policy
from falproxy.fal.target import parse_target

ID = "7e2f0b8a-0001-4000-8000-000000000000"
QUEUE = "https://queue.fal.run"
RUN = "https://fal.run"
REST = "https://rest.fal.ai"


def policy(endpoints: tuple[str, ...] = (), targets: tuple[str, ...] = (), **rest: bool) -> Policy:
    return Policy(Globs(endpoints), Globs(targets), **rest)


def is_allowed(policy: Policy, method: str, url: str) -> bool:
    try:
        policy.check(method, parse_target(url))
    except ProxyError as error:
        return {"target_forbidden": False, "target_not_fal": False}[error.code]
    return True


OPEN = policy()
LISTED = policy(("fal-ai/flux/dev", "fal-ai/flux-pro/kontext**", "fal-ai/fast-*"))

WHAT_CLIENTS_NEED = [
    ("POST", f"{RUN}/fal-ai/flux/dev"),
    ("GET", f"{RUN}/fal-ai/flux/dev?prompt=x"),
    ("POST", f"{RUN}/fal-ai/flux/dev/stream"),
    ("POST", f"{QUEUE}/fal-ai/flux/dev?fal_webhook=https%3A%2F%2Fa.b"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{ID}/status?logs=1"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{ID}/status/stream"),
    ("GET", f"{QUEUE}/fal-ai/flux/requests/{ID}"),
    ("PUT", f"{QUEUE}/fal-ai/flux/requests/{ID}/cancel"),
    ("POST", f"{REST}/storage/upload/initiate?storage_type=fal-cdn-v3"),
    ("POST", f"{REST}/storage/upload/initiate-multipart?storage_type=fal-cdn-v3"),
    ("POST", f"{REST}/storage/auth/token?storage_type=fal-cdn-v3"),
    ("POST", "https://rest.alpha.fal.ai/storage/upload/initiate"),
    ("POST", f"{REST}/tokens/"),
    ("POST", "https://rest.alpha.fal.ai/tokens/"),
    ("POST", f"{REST}/tokens/realtime"),
    ("GET", "https://fal.ai/api/openapi/queue/openapi.json?endpoint_id=fal-ai/flux/dev"),
]


@pytest.mark.parametrize(("method", "url"), WHAT_CLIENTS_NEED)
@pytest.mark.parametrize("rules", [OPEN, LISTED], ids=["open", "with a list"])
def test_what_fal_s_clients_need_is_allowed(rules: Policy, method: str, url: str) -> None:
    assert is_allowed(rules, method, url)


# fal-api.md section 7.1: calls that an open proxy must refuse, in every spelling.
ACCOUNT = [
    ("GET", "https://api.fal.ai/v1/keys"),
    ("POST", "https://api.fal.ai/v1/keys"),
    ("GET", "https://api.fal.ai/v1/account/billing?expand=credits"),
    ("GET", "https://api.fal.ai/v1/models/usage"),
    ("GET", "https://api.fal.ai/v1/models/billing-events"),
    ("GET", "https://api.fal.ai/v1/models/requests/x"),
    ("POST", "https://api.fal.ai/v1/serverless/secrets"),
    ("GET", "https://api.fal.ai/v1/meta"),
    ("GET", f"{REST}/users/current"),
    ("GET", "https://rest.alpha.fal.ai/users/current"),
    ("GET", f"{REST}/billing/user_details"),
    ("GET", f"{REST}/keys"),
    ("GET", f"{REST}/keys/"),
    ("GET", f"{REST}/%6beys"),
    ("GET", f"{REST}/KEYS"),
    ("GET", f"{REST}//keys"),
    ("GET", f"{REST}/tokens/../keys"),
    ("GET", f"{REST}/tokens/%2e%2e/keys"),
    ("GET", f"{REST}/storage/upload/initiate/..%2f..%2f..%2fkeys"),
    ("GET", f"{REST}/keys;x"),
    ("GET", f"{REST}/keys?x=/storage/upload/initiate"),
    ("GET", "https://fal.ai/api/keys"),
    ("GET", "https://auth.fal.ai/oauth/token"),
    ("POST", "https://x.gateway.alpha.fal.ai/trigger/y"),
    ("GET", "https://ws.fal.run/fal-ai/flux/dev"),
    ("POST", f"{REST}/requests/delete_io/{ID}"),
    ("PUT", f"{REST}/storage/upload/initiate"),
    ("GET", f"{REST}/storage/auth/token"),
    ("GET", f"{REST}/tokens/"),
    ("POST", f"{REST}/storage/upload/initiate/more"),
    ("POST", f"{REST}/tokens/realtime/more"),
    ("POST", "https://fal.ai/api/openapi/queue/openapi.json"),
    ("GET", f"{REST}/workflows/me/mine"),
]


@pytest.mark.parametrize(("method", "url"), ACCOUNT)
def test_account_endpoints_are_refused(method: str, url: str) -> None:
    assert not is_allowed(OPEN, method, url)


ENDPOINTS = [
    pytest.param("fal-ai/flux/dev", True, id="listed"),
    pytest.param("fal-ai/flux/dev/", True, id="listed, with a last slash"),
    pytest.param("fal-ai/flux/dev/stream", True, id="its stream"),
    pytest.param("fal-ai/flux/dev/realtime", True, id="its socket's path"),
    pytest.param("fal-ai/fl%75x/dev", False, id="listed, in escapes that hide it"),
    pytest.param("fal-ai/fast-" + "x" * 300, False, id="longer than any endpoint"),
    pytest.param("fal-ai/flux-pro/kontext/max/multi", True, id="across segments by **"),
    pytest.param("fal-ai/fast-sdxl", True, id="within a segment by *"),
    pytest.param("fal-ai/fast-sdxl/inpainting", False, id="not across segments by *"),
    pytest.param("fal-ai/flux/schnell", False, id="a sibling"),
    pytest.param("fal-ai/flux", False, id="the app alone"),
    pytest.param("fal-ai/flux/dev/image-to-image", False, id="below a listed one"),
    pytest.param("fal-ai/flux/dev2", False, id="longer by a letter"),
    pytest.param("x/fal-ai/flux/dev", False, id="deeper"),
    pytest.param("FAL-AI/flux/dev", False, id="in capitals"),
    pytest.param("fal-ai/veo3", False, id="a costly one"),
    pytest.param("", False, id="none at all"),
]


@pytest.mark.parametrize(("endpoint", "allowed"), ENDPOINTS)
@pytest.mark.parametrize("host", [RUN, QUEUE])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_list_of_endpoints(host: str, method: str, endpoint: str, allowed: bool) -> None:
    assert is_allowed(LISTED, method, f"{host}/{endpoint}") is allowed


@pytest.mark.parametrize("verb", ["", "/status", "/status/stream", "/cancel", "/response"])
def test_the_urls_of_requests_are_checked_against_the_list(verb: str) -> None:
    """With another method fal could take the whole path for an endpoint's."""
    url = f"{QUEUE}/fal-ai/veo3/requests/{ID}{verb}"
    assert not is_allowed(LISTED, "POST", url)


def test_uploads_can_be_switched_off() -> None:
    rules = policy(uploads=False)
    assert not is_allowed(rules, "POST", f"{REST}/storage/upload/initiate")
    assert not is_allowed(rules, "POST", f"{REST}/storage/auth/token")
    assert is_allowed(rules, "POST", f"{REST}/tokens/")


@pytest.mark.parametrize(
    ("glob", "url", "allowed"),
    [
        ("api.fal.ai/v1/models", "https://api.fal.ai/v1/models?limit=5", True),
        ("https://api.fal.ai/v1/models", "https://api.fal.ai/v1/models", True),
        ("api.fal.ai/v1/models", "https://api.fal.ai/v1/models/usage", False),
        ("api.fal.ai/v1/models/**", "https://api.fal.ai/v1/models/usage", True),
        ("api.fal.ai/v1/*", "https://api.fal.ai/v1/models/usage", False),
        ("*.fal.ai/v1/models", "https://api.fal.ai/v1/models", True),
        ("fal.run/me/**", "https://fal.run/me/private", True),
        ("fal.run/me/**", "https://fal.run/you/private", False),
    ],
)
def test_targets_can_be_allowed_by_name(glob: str, url: str, allowed: bool) -> None:
    assert is_allowed(policy(("nothing/else",), (glob,)), "GET", url) is allowed


@pytest.mark.parametrize(
    ("endpoints", "app", "allowed"),
    [
        pytest.param((), "flux", True, id="any alias where there is no list"),
        pytest.param((), "fal-ai/flux/dev", True, id="any endpoint where there is no list"),
        pytest.param((), "", False, id="empty"),
        pytest.param((), "  ", False, id="blank"),
        pytest.param((), "*", False, id="a wildcard"),
        pytest.param((), "fal-ai/*", False, id="a wildcard inside"),
        pytest.param((), "?", False, id="another wildcard"),
        pytest.param((), "%2a", False, id="an escaped wildcard"),
        pytest.param((), "\uff0a", False, id="a wide wildcard"),
        pytest.param((), "/", False, id="a slash"),
        pytest.param((), "fal-ai/", False, id="an owner alone"),
        pytest.param(("fal-ai/flux/**",), "fal-ai/flux/../veo3", False, id="dot segments"),
        pytest.param(("fal-ai/flux/**",), "fal-ai/flux/%2e%2e/veo3", False, id="escaped dots"),
        pytest.param(("workflows/me/foo",), "foo", True, id="the alias behind a namespace"),
        pytest.param(("workflows/me/foo",), "me", False, id="the owner behind a namespace"),
        pytest.param(("fal-ai/flux/dev",), "flux", True, id="the alias of a listed endpoint"),
        pytest.param(("fal-ai/flux/**",), "flux", True, id="the alias of a listed pattern"),
        pytest.param(("fal-ai/**",), "flux", True, id="an alias that a pattern leaves open"),
        pytest.param(("fal-ai/flux/dev",), "fal-ai", False, id="the owner is no alias"),
        pytest.param(("fal-ai/flux/dev",), "veo3", False, id="another alias"),
        pytest.param(("fal-ai/flux/dev",), "fal-ai/flux/dev", True, id="a listed endpoint"),
        pytest.param(("fal-ai/flux/dev",), "fal-ai/flux/dev/realtime", True, id="its socket"),
        pytest.param(("fal-ai/flux/dev",), "fal-ai/flux", False, id="the whole app of one"),
        pytest.param(("fal-ai/flux/dev",), "fal-ai/veo3", False, id="another endpoint"),
    ],
)
def test_the_apps_of_a_token(endpoints: tuple[str, ...], app: str, allowed: bool) -> None:
    rules = policy(endpoints)
    if allowed:
        rules.check_app(app)
    else:
        with pytest.raises(ProxyError, match="does not allow"):
            rules.check_app(app)


@pytest.mark.timed
def test_long_paths_are_matched_quickly() -> None:
    endpoints = Globs(("fal-ai/flux-*-*-*", "*/*-lora*-trainer", "**/flux/**/dev/**"))
    started = time.perf_counter()
    for filler in ("-", "a", "/flux", "/dev", "-lora"):
        for length in (100, 1_000, 30_000):
            assert not endpoints.match("fal-ai/flux-" + (filler * length)[:length] + "/x")
    assert time.perf_counter() - started < 1
