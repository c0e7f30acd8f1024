"""Settings are read once and checked at the start, and a secret is never in a message."""

import os
from collections import Counter
from ipaddress import ip_network
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from falproxy import create_app
from falproxy.app.components import create_cache_store, create_registry
from falproxy.environment import read_environment
from falproxy.errors import SettingsError
from falproxy.fal.image_formats import FAL_FORMATS, Format
from falproxy.setting_fields import setting_fields
from falproxy.settings import (
    GROUPS,
    KEY_VARIABLES,
    MIB,
    Settings,
    variables,
)
from falproxy.stores.ledger.writer import choose_ledger
from falproxy.windows import Window
from tests.support.settings import make_settings

KEY = {"FAL_KEY": "id:secret"}
# Variable → a valid text that differs from the default, the field, and the field's value.
SAMPLES: dict[str, tuple[str, str, object]] = {
    "FALPROXY_HOST": ("0.0.0.0", "server.host", "0.0.0.0"),
    "FALPROXY_PORT": ("0", "server.port", 0),
    "FALPROXY_UDS": ("/run/falproxy.sock", "server.socket_file", Path("/run/falproxy.sock")),
    "FALPROXY_WORKERS": ("4", "server.workers", 4),
    "FALPROXY_PUBLIC_URL": ("https://a.b/c/", "server.public_url", "https://a.b/c"),
    "FALPROXY_TRUSTED_PROXIES": (
        "10.0.0.0/8, ::1",
        "server.trusted_proxies",
        (ip_network("10.0.0.0/8"), ip_network("::1")),
    ),
    "FALPROXY_MAX_BODY": ("5M", "server.max_body", 5 * MIB),
    "FALPROXY_MAX_HEAD": ("128K", "server.max_head", 2**17),
    "FALPROXY_HEAD_TIMEOUT": ("5", "server.head_timeout", 5.0),
    "FALPROXY_IDLE_TIMEOUT": ("620", "server.idle_timeout", 620.0),
    "FALPROXY_MAX_CONNECTIONS": ("500", "server.max_connections", 500),
    "FALPROXY_DRAIN": ("5", "server.drain", 5.0),
    "FALPROXY_STOP_DELAY": ("0", "server.stop_delay", 0.0),
    "FALPROXY_FAST_PATH": ("0", "server.fast_path", False),
    "FALPROXY_CONNECT_TIMEOUT": ("2.5", "upstream.connect_timeout", 2.5),
    "FALPROXY_UPSTREAM_TIMEOUT": ("60", "upstream.timeout", 60.0),
    "FALPROXY_UPSTREAM_ORIGIN": ("http://[::1]:80/", "upstream.origin", "http://[::1]:80"),
    "FALPROXY_TRANSPORT": ("AIOHTTP", "upstream.transport", "aiohttp"),
    "FALPROXY_TAGS": ("user, principal,user", "upstream.tags", ("user", "principal")),
    "FALPROXY_ACCESS_KEYS": ("ann:x,y", "auth.access_keys", (("ann", "x"), ("key-2", "y"))),
    "CUSTOM_ACCESS_KEY": ("x", "auth.access_key", "x"),
    "FALPROXY_JWT_SECRET": ("x", "auth.jwt_secret", "x"),
    "FALPROXY_JWKS_URL": ("https://a.b/jwks", "auth.jwks_url", "https://a.b/jwks"),
    "FALPROXY_JWT_AUDIENCE": ("x", "auth.jwt_audience", "x"),
    "FALPROXY_ALLOWED_ENDPOINTS": ("a/b, c/**", "auth.allowed_endpoints", ("a/b", "c/**")),
    "FALPROXY_ALLOWED_TARGETS": ("api.fal.ai/v1/*", "auth.allowed_targets", ("api.fal.ai/v1/*",)),
    "FALPROXY_REQUIRE_AUTH": ("1", "auth.required", True),
    "FALPROXY_ALLOWED_HOSTS": ("proxy,*.A.b", "auth.allowed_hosts", ("proxy", "*.a.b")),
    "FALPROXY_ALLOWED_ORIGINS": ("https://a.b", "auth.allowed_origins", ("https://a.b",)),
    "FALPROXY_UPLOADS": ("no", "auth.uploads", False),
    "FALPROXY_LIVE": ("0", "auth.live", False),
    "FALPROXY_LIVE_MAX_SECONDS": ("90", "auth.live_max_seconds", 90.0),
    "FALPROXY_KEYS": ("1", "auth.keys", "on"),
    "FALPROXY_ADMINS": ("ann,bob", "auth.admins", ("ann", "bob")),
    "FALPROXY_RATE_LIMIT": ("60/minute", "limits.rate", (60, Window(60))),
    "FALPROXY_CONCURRENCY": ("8", "limits.concurrency", 8),
    "FALPROXY_BUDGET": ("$5/day", "limits.budget", (5_000_000, Window(86400))),
    "FALPROXY_USER_RATE_LIMIT": ("5/10s", "limits.user_rate", (5, Window(10))),
    "FALPROXY_USER_CONCURRENCY": ("2", "limits.user_concurrency", 2),
    "FALPROXY_USER_BUDGET": ("0.50/12h", "limits.user_budget", (500_000, Window(43200))),
    "FALPROXY_TOTAL_BUDGET": ("100/month", "limits.total_budget", (100_000_000, Window(None))),
    "FALPROXY_UNKNOWN_PRICE": ("0.10", "limits.unknown_price", 100_000),
    "FALPROXY_MAX_COST": ("2", "limits.max_cost", 2_000_000),
    "FALPROXY_LIMITS_ON_ERROR": ("Allow", "limits.on_error", "allow"),
    "FALPROXY_IMAGE_FORMATS": ("HEIC", "images.formats", (Format.HEIC,)),
    "FALPROXY_CHECK_REMOTE_IMAGES": ("1", "images.check_remote", True),
    "FALPROXY_CACHE": ("off", "cache.enabled", False),
    "FALPROXY_CACHE_ENDPOINTS": ("a/b, c/**", "cache.endpoints", ("a/b", "c/**")),
    "FALPROXY_CACHE_TTL": ("60", "cache.ttl", 60.0),
    "FALPROXY_CACHE_SCOPE": ("Principal", "cache.scope", "principal"),
    "FALPROXY_CACHE_MAX_ENTRY": ("1M", "cache.max_entry", MIB),
    "FALPROXY_CACHE_MAX_SIZE": ("2 GB", "cache.max_size", 2048 * MIB),
    "FALPROXY_OWNER_RETENTION": ("2d", "cache.owner_retention", 172800.0),
    "REDIS_URL": ("redis://localhost:6379/0", "cache.redis_url", "redis://localhost:6379/0"),
    "FALPROXY_WAIT": ("60", "dialects.wait", 60.0),
    "SUPPORTED_MODELS": ("a:b/c,d/e", "dialects.models", (("a", "b/c"), ("d/e", "d/e"))),
    "FALPROXY_MODELS": ("own.toml", "dialects.models_file", Path("own.toml")),
    "DATABASE_URL": ("postgresql://h/d", "ledger.database_url", "postgresql://h/d"),
    "FALPROXY_LEDGER_RETENTION": ("12h", "ledger.retention", 43200.0),
    "FALPROXY_JOBS_RETENTION": ("30d", "ledger.jobs_retention", 2592000.0),
    "FALPROXY_FILES_RETENTION": ("90d", "storage.files_retention", 7776000.0),
    "FALPROXY_REHOST": ("Disk", "storage.backend", "disk"),
    "FALPROXY_REHOST_ON_ERROR": ("Error", "storage.on_error", "error"),
    "FALPROXY_REHOST_INPUTS": ("1", "storage.rehost_inputs", True),
    "SUPABASE_URL": ("https://a.supabase.co", "storage.supabase_url", "https://a.supabase.co"),
    "SUPABASE_KEY": ("sb_secret_x", "storage.supabase_key", "sb_secret_x"),
    "SUPABASE_BUCKET": ("x", "storage.supabase_bucket", "x"),
    "SUPABASE_SIGNED_URLS": ("3600", "storage.supabase_signed_urls", 3600.0),
    "OTEL_EXPORTER_OTLP_ENDPOINT": ("http://c:4318/", "telemetry.endpoint", "http://c:4318"),
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ("http://c/t", "telemetry.traces_endpoint", "http://c/t"),
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": (
        "http://c/m",
        "telemetry.metrics_endpoint",
        "http://c/m",
    ),
    "OTEL_EXPORTER_OTLP_HEADERS": (
        "Authorization=Bearer%20x, a=b=",
        "telemetry.headers",
        (("Authorization", "Bearer x"), ("a", "b=")),
    ),
    "OTEL_TRACES_EXPORTER": ("none", "telemetry.traces_exporter", "none"),
    "OTEL_METRICS_EXPORTER": ("none", "telemetry.metrics_exporter", "none"),
    "OTEL_SERVICE_NAME": ("images", "telemetry.service_name", "images"),
    "OTEL_SDK_DISABLED": ("true", "telemetry.disabled", True),
    "AI_KEYS": ("a:b,c:d", "ai_keys", ("a:b", "c:d")),
    "FALPROXY_SANDBOX": ("1", "sandbox", True),
    "FALPROXY_SANDBOX_BALANCE": ("0.10", "sandbox_balance", 100_000),
    "FALPROXY_DATA_DIR": ("/data", "data_dir", Path("/data")),
    "FALPROXY_LOG_LEVEL": ("DEBUG", "log_level", "debug"),
}
# What a sample needs beside it.
WITH = {
    variable: {"FALPROXY_REHOST": "disk"}
    for variable in ("FALPROXY_REHOST_ON_ERROR", "FALPROXY_REHOST_INPUTS")
}


def test_every_variable_has_a_sample() -> None:
    assert {*SAMPLES} == {*variables()}


@pytest.mark.parametrize("variable", SAMPLES)
def test_every_variable_is_read_into_its_field(variable: str) -> None:
    text, field, value = SAMPLES[variable]
    read = attrgetter(field)
    assert read(Settings(fal_key="id:secret")) != value
    assert read(Settings.from_env(KEY | WITH.get(variable, {}) | {variable: text})) == value


def test_every_field_has_a_sample() -> None:
    grouped = [f"{name}.{field.name}" for name in GROUPS for field in setting_fields(GROUPS[name])]
    ungrouped = [field.name for field in setting_fields(Settings)]
    assert sorted(field for _, field, _ in SAMPLES.values()) == sorted(grouped + ungrouped)


def test_no_two_fields_share_a_variable() -> None:
    uses = Counter(
        field.metadata["variable"]
        for group in (Settings, *GROUPS.values())
        for field in setting_fields(group)
    )
    assert {variable for variable, count in uses.items() if count > 1} == set()
    assert not {*uses} & {*KEY_VARIABLES}


def test_only_the_fal_key_is_required() -> None:
    settings = Settings.from_env(KEY)
    assert settings == Settings(fal_key="id:secret")
    server = settings.server
    assert (server.host, server.port, server.max_body) == ("127.0.0.1", 8080, 100 * MIB)


@pytest.mark.parametrize(
    ("env", "field", "value"),
    [
        pytest.param({"PORT": "10000"}, "server.port", 10000, id="the port of a platform"),
        pytest.param({"PORT": "1", "FALPROXY_PORT": "2"}, "server.port", 2, id="both ports"),
        pytest.param({"PORT": "1", "FALPROXY_PORT": ""}, "server.port", 1, id="an empty port"),
        pytest.param({"PORT": ""}, "server.port", 8080, id="an empty port alone"),
        pytest.param({"DEBUG_MODE": "true"}, "log_level", "debug", id="debug mode"),
        pytest.param({"DEBUG_MODE": "1"}, "log_level", "debug", id="debug mode as a number"),
        pytest.param({"DEBUG_MODE": "False"}, "log_level", "info", id="no debug mode"),
        pytest.param(
            {"DEBUG_MODE": "true", "FALPROXY_LOG_LEVEL": "error"}, "log_level", "error",
            id="debug mode and a level",
        ),
    ],
)  # fmt: skip
def test_a_setting_of_another_system_is_read_if_ours_is_not_set(
    env: dict[str, str], field: str, value: object
) -> None:
    assert attrgetter(field)(Settings.from_env(KEY | env)) == value


def test_the_key_may_be_given_in_two_parts() -> None:
    env = {"FAL_KEY_ID": "id", "FAL_KEY_SECRET": "secret"}
    assert Settings.from_env(env).fal_key == "id:secret"


def test_the_complete_key_overrides_its_two_parts() -> None:
    env = {"FAL_KEY": "a:b", "FAL_KEY_ID": "id", "FAL_KEY_SECRET": "secret"}
    assert Settings.from_env(env).fal_key == "a:b"


def test_the_key_is_not_in_the_repr() -> None:
    assert "secret" not in repr(Settings(fal_key="id:secret"))


def test_no_password_is_in_the_repr() -> None:
    env = {**KEY, "REDIS_URL": "rediss://ann:s3cret@redis.example:6379/0"}
    settings = Settings.from_env(env)
    assert settings.cache.redis_url == env["REDIS_URL"]
    assert "s3cret" not in repr(settings)
    assert "redis.example" not in repr(settings)


def test_the_cache_is_on_for_kontext_and_shared_for_an_hour() -> None:
    cache = Settings.from_env(KEY).cache
    assert (cache.enabled, cache.scope, cache.ttl) == (True, "shared", 3600.0)
    assert (cache.max_entry, cache.max_size) == (16 * MIB, 1024 * MIB)
    assert all("kontext" in endpoint for endpoint in cache.endpoints)


SUPABASE = {"SUPABASE_URL": "https://abc.supabase.co", "SUPABASE_KEY": "sb_secret_s3cret"}


@pytest.mark.parametrize(
    ("env", "backend"),
    [
        pytest.param({}, "off", id="nothing is configured"),
        pytest.param(SUPABASE, "supabase", id="Supabase is configured"),
        pytest.param({"SUPABASE_URL": "https://abc.supabase.co"}, "off", id="only its URL"),
        pytest.param({"FALPROXY_SANDBOX": "1"}, "disk", id="the sandbox"),
        pytest.param({"FALPROXY_SANDBOX": "1"} | SUPABASE, "supabase", id="Supabase and sandbox"),
        pytest.param({"FALPROXY_REHOST": "off"} | SUPABASE, "off", id="explicitly off"),
        pytest.param({"FALPROXY_REHOST": "Disk"} | SUPABASE, "disk", id="explicitly disk"),
    ],
)
def test_the_storage_backend_follows_the_configuration(env: dict[str, str], backend: str) -> None:
    assert Settings.from_env(KEY | env).storage_backend == backend


def test_refusing_results_without_files_requires_a_storage() -> None:
    strict = KEY | {"FALPROXY_REHOST_ON_ERROR": "error"}
    with pytest.raises(SettingsError, match="SUPABASE_KEY, or FALPROXY_REHOST=disk"):
        Settings.from_env(strict)
    settings = Settings.from_env(strict | {"FALPROXY_REHOST": "disk"})
    assert settings.storage.on_error == "error"


def test_storing_inputs_requires_a_storage() -> None:
    storing = KEY | {"FALPROXY_REHOST_INPUTS": "1"}
    with pytest.raises(SettingsError, match="SUPABASE_KEY, or FALPROXY_REHOST=disk"):
        Settings.from_env(storing)
    assert Settings.from_env(storing | SUPABASE).storage.rehost_inputs


def test_the_key_of_supabase_is_not_in_the_repr() -> None:
    settings = Settings.from_env(KEY | SUPABASE | {"SUPABASE_SIGNED_URLS": "600"})
    project = settings.storage.project
    assert project is not None
    assert (project.bucket, project.signed_url_ttl) == ("fal_images", 600.0)
    assert "s3cret" not in repr(settings) + repr(project)


@pytest.mark.parametrize("env", [{}, {"FAL_KEY": ""}, {"FAL_KEY_ID": "id"}])
def test_the_error_for_a_missing_key_names_both_remedies(env: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"FAL_KEY is not set.*--sandbox"):
        Settings.from_env(env)


def test_the_sandbox_needs_no_key() -> None:
    assert Settings.from_env({"FALPROXY_SANDBOX": "1"}).sandbox


@pytest.mark.parametrize(
    ("key", "kind", "position"),
    [
        pytest.param(" id:s3cret", "white space", 1, id="leading space"),
        pytest.param("id:s3cret\n", "white space", 10, id="trailing newline, from echo"),
        pytest.param("id:s3\tcret", "white space", 6, id="a tab inside"),
        pytest.param('"id:s3cret"', "a quote", 1, id="quotes, from a shell or a YAML file"),
        pytest.param("id:s3cret\u00a0", "white space", 10, id="a no-break space, from a web page"),
        pytest.param("id:s3\u200bcret", "not ASCII", 6, id="a zero-width space"),
        pytest.param("id:s3\u0441ret", "not ASCII", 6, id="a Cyrillic letter"),
        pytest.param("id:s3\x00cret", "a control character", 6, id="a NUL"),
        pytest.param("id:s3cret\r\nx-evil: 1", "white space", 10, id="a header"),
    ],
)
def test_a_stray_character_in_the_key_is_reported_by_its_position(
    key: str, kind: str, position: int
) -> None:
    with pytest.raises(SettingsError) as error:
        Settings.from_env({"FAL_KEY": key})
    assert f"({kind}) at position {position} of {len(key)}" in str(error.value)
    assert "s3" not in str(error.value)


@pytest.mark.parametrize(
    ("variable", "value", "field", "parsed"),
    [
        ("FALPROXY_MAX_BODY", "1000", "server.max_body", 1000),
        ("FALPROXY_MAX_BODY", "1 GiB", "server.max_body", 1024 * MIB),
        ("FALPROXY_MAX_BODY", "64kb", "server.max_body", 65536),
        ("FALPROXY_SANDBOX", "off", "sandbox", False),
        ("FALPROXY_PORT", "", "server.port", 8080),
        ("FALPROXY_IMAGE_FORMATS", "jpg, PNG,jpeg", "images.formats", (Format.JPEG, Format.PNG)),
        ("FALPROXY_IMAGE_FORMATS", "", "images.formats", FAL_FORMATS),
        ("FALPROXY_CHECK_REMOTE_IMAGES", "", "images.check_remote", False),
        ("FALPROXY_CACHE", "", "cache.enabled", True),
        ("FALPROXY_CACHE_SCOPE", "shared", "cache.scope", "shared"),
        ("FALPROXY_REHOST", "Supabase", "storage.backend", "supabase"),
        ("FALPROXY_REHOST_ON_ERROR", "Passthrough", "storage.on_error", "passthrough"),
        ("REDIS_URL", "rediss://u:p%40@h:1/2", "cache.redis_url", "rediss://u:p%40@h:1/2"),
        ("REDIS_URL", "", "cache.redis_url", None),
        ("FALPROXY_LEDGER_RETENTION", "90d", "ledger.retention", 90 * 86400.0),
        ("FALPROXY_LEDGER_RETENTION", "", "ledger.retention", 400 * 86400.0),
        ("FALPROXY_LEDGER_RETENTION", "0", "ledger.retention", None),
        ("FALPROXY_LEDGER_RETENTION", "Off", "ledger.retention", None),
    ],
)
def test_a_value_arrives_in_its_final_type(
    variable: str, value: str, field: str, parsed: object
) -> None:
    assert attrgetter(field)(Settings.from_env({**KEY, variable: value})) == parsed


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FALPROXY_PORT", "65536"),
        ("FALPROXY_PORT", "-1"),
        ("FALPROXY_PORT", "http"),
        ("FALPROXY_LOG_LEVEL", "loud"),
        ("PORT", "65536"),
        ("PORT", "tcp://10.0.0.1:80"),
        ("DEBUG_MODE", "secret"),
        ("FALPROXY_MAX_BODY", "0"),
        ("FALPROXY_MAX_BODY", "-5"),
        ("FALPROXY_MAX_BODY", "5 apples"),
        ("FALPROXY_CONNECT_TIMEOUT", "0"),
        ("FALPROXY_UPSTREAM_TIMEOUT", "nan"),
        ("FALPROXY_DRAIN", "inf"),
        ("FALPROXY_UPSTREAM_ORIGIN", "127.0.0.1:8081"),
        ("FALPROXY_UPSTREAM_ORIGIN", "http://127.0.0.1/path"),
        ("FALPROXY_UPSTREAM_ORIGIN", "http://user:secret@127.0.0.1"),
        ("FALPROXY_UPSTREAM_ORIGIN", "http://[oops"),
        ("FALPROXY_SANDBOX", "maybe"),
        ("FALPROXY_PUBLIC_URL", "ftp://a.b"),
        ("FALPROXY_PUBLIC_URL", "http://localhost:99999"),
        ("FALPROXY_ALLOWED_ENDPOINTS", "a-*-*-*-*"),
        ("FALPROXY_IMAGE_FORMATS", "jpeg,bmp"),
        ("FALPROXY_IMAGE_FORMATS", "image/png"),
        ("FALPROXY_CHECK_REMOTE_IMAGES", "sometimes"),
        ("FALPROXY_CACHE", "redis"),
        ("FALPROXY_CACHE_ENDPOINTS", "/fal-ai/flux"),
        ("FALPROXY_CACHE_ENDPOINTS", "a-*-*-*-*"),
        ("FALPROXY_CACHE_TTL", "0"),
        ("FALPROXY_CACHE_TTL", "1h"),
        ("FALPROXY_CACHE_TTL", "inf"),
        ("FALPROXY_CACHE_SCOPE", "private"),
        ("FALPROXY_REHOST", "s3"),
        ("FALPROXY_REHOST_ON_ERROR", "ignore"),
        ("SUPABASE_URL", "abc.supabase.co"),
        ("SUPABASE_SIGNED_URLS", "0"),
        ("FALPROXY_CACHE_MAX_ENTRY", "0"),
        ("FALPROXY_CACHE_MAX_ENTRY", "much"),
        ("FALPROXY_CACHE_MAX_SIZE", "-1"),
        ("FALPROXY_CACHE_MAX_SIZE", "1.5G"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "http://:secret@localhost:6379"),
        ("REDIS_URL", "redis://"),
        ("REDIS_URL", "redis://:secret@local host"),
        ("REDIS_URL", "unix:///secret/redis.sock"),
        ("FALPROXY_LEDGER_RETENTION", "90"),
        ("FALPROXY_OWNER_RETENTION", "12h"),
        ("FALPROXY_OWNER_RETENTION", "0"),
        ("FALPROXY_RATE_LIMIT", "60"),
        ("FALPROXY_RATE_LIMIT", "0/minute"),
        ("FALPROXY_RATE_LIMIT", "60/month"),
        ("FALPROXY_RATE_LIMIT", "-1/minute"),
        ("FALPROXY_USER_RATE_LIMIT", "60/fortnight"),
        ("FALPROXY_CONCURRENCY", "0"),
        ("FALPROXY_USER_CONCURRENCY", "many"),
        ("FALPROXY_BUDGET", "5"),
        ("FALPROXY_BUDGET", "-5/day"),
        ("FALPROXY_BUDGET", "nan/day"),
        ("FALPROXY_USER_BUDGET", "5 EUR/day"),
        ("FALPROXY_TOTAL_BUDGET", "5/0s"),
        ("FALPROXY_UNKNOWN_PRICE", "-0.10"),
        ("FALPROXY_MAX_COST", "cheap"),
        ("FALPROXY_LIMITS_ON_ERROR", "ignore"),
        ("FALPROXY_LEDGER_RETENTION", "-1d"),
        ("FALPROXY_LEDGER_RETENTION", "a year"),
    ],
)
def test_an_invalid_value_stops_the_start_with_its_variable(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{variable} must (be|have) .*[^.]\\.$") as error:
        Settings.from_env({**KEY, variable: value})
    assert "secret" not in str(error.value)


SECRET = "s3cr3t-canary"
# Values that are wrong in some way; `*` stands for the secret.
ODD_VALUES = {
    "alone": "*",
    "with a space": "a *",
    "a fragment": "https://a.b/#*",
    "a query": "https://a.b/?*",
    "a bracket": "https://[*",
    "a password": "https://u:*@a.b/",
    "a password with a slash": "postgresql://u:*/x@127.0.0.1:1/db",
    "a password with a number sign": "postgresql://u:*#x@127.0.0.1:1/db",
    "a password with a question mark": "postgresql://u:*?x@127.0.0.1:1/db",
    "a password with a bracket": "postgresql://u:[*@127.0.0.1:1/db",
    "a port": "postgresql://u:p@127.0.0.1:*/db",
    "a port that is too large": "postgresql://u:*@127.0.0.1:99999/db",
    "a Redis port": "redis://u:p@127.0.0.1:*/0",
    "a Redis database": "redis://u:p@127.0.0.1/*",
    "a Redis option": "redis://u:p@127.0.0.1/0?socket_timeout=*",
    "a percent sign": "https://a.b/%*",
    "not ASCII": "*\u00e4",
    "a NUL": "a\0*",
    "not UTF-8": "*\udcff",
    "a line end": "*\n*",
    "a list": "*,*,,:*",
    "a list of names": "a:*,b:* c",
    "a large number": "9" * 5000 + "*",
    "digits": "9" * 5000,
    "other digits": "\u0661\u0662*",
    "an exponent": "1e999*",
    "a size": "99999999999999999999G*",
    "a wildcard": "***-*",
    "a path": "/*/*",
}


@pytest.mark.parametrize("odd", ODD_VALUES)
@pytest.mark.parametrize("variable", [*SAMPLES, *KEY_VARIABLES])
def test_no_error_has_the_value_of_a_setting(variable: str, odd: str) -> None:
    value = ODD_VALUES[odd].replace("*", SECRET)
    env = {**KEY, "FAL_KEY_ID": "", variable: value}
    if variable in ("FAL_KEY_ID", "FAL_KEY_SECRET"):
        env = {"FAL_KEY_ID": "id", "FAL_KEY_SECRET": "secret", variable: value}
    text, cause = start(env)
    assert SECRET not in text + cause
    assert "9999" not in text
    assert "\n" not in text
    if text:
        assert any(name in text for name in (variable, "fal key", "FAL_KEY")), text
        assert text.endswith(".")


def start(env: dict[str, str]) -> tuple[str, str]:
    """Return the refusal of settings and the text of its cause; empty if they are accepted."""
    try:
        settings = Settings.from_env(env)
    except SettingsError as error:
        return str(error), str(error.__cause__ or "")
    return open_everything(settings), ""


def open_everything(settings: Settings) -> str:
    """Create the components that parse settings further. Return the text of their refusals."""
    refusals = []
    for create in (
        lambda: create_app(settings),
        lambda: create_cache_store(settings),
        lambda: create_registry(settings),
        lambda: choose_ledger(settings.ledger.database_url, settings.data_dir),
    ):
        try:
            create()
        except SettingsError as error:
            refusals.append(str(error))
    return refusals[0] if refusals else ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read all files")
def test_a_dotenv_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.touch(mode=0)
    with pytest.raises(SettingsError, match="cannot be read") as error:
        read_environment(file)
    assert error.value.__cause__ is None


def test_the_environment_overrides_a_dotenv_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".env"
    file.write_text('# a comment\nFAL_KEY="id:secret"  # another\nFALPROXY_PORT=1\n')
    monkeypatch.delenv("FAL_KEY", raising=False)
    monkeypatch.setenv("FALPROXY_PORT", "2")
    env = read_environment(file)
    assert (env["FAL_KEY"], env["FALPROXY_PORT"]) == ("id:secret", "2")


def test_a_dotenv_file_is_optional(tmp_path: Path) -> None:
    assert "PATH" in read_environment(tmp_path / ".env")


def test_a_misspelled_setting_stops_the_start() -> None:
    """Otherwise a misspelled FALPROXY_ACCESS_KEYS would leave the proxy open."""
    with pytest.raises(SettingsError, match="Did you mean FALPROXY_ACCESS_KEYS"):
        Settings.from_env({**KEY, "FALPROXY_ACESS_KEYS": "ann:s3cret"})


@pytest.mark.parametrize("name", ["FALPROXY_URL", "FALPROXY_KEY"])
def test_variables_of_the_client_are_accepted(name: str) -> None:
    assert Settings.from_env({**KEY, name: "x"}) == Settings.from_env(KEY)


@pytest.mark.parametrize("value", [",", " , ", " "])
@pytest.mark.parametrize(
    "variable",
    [
        "FALPROXY_ACCESS_KEYS",
        "FALPROXY_ALLOWED_ENDPOINTS",
        "AI_KEYS",
        "FALPROXY_CACHE_ENDPOINTS",
        "FALPROXY_IMAGE_FORMATS",
    ],
)
def test_an_empty_list_stops_the_start(variable: str, value: str) -> None:
    """Two unset variables joined by a comma must not leave the proxy open."""
    with pytest.raises(SettingsError, match=f"^{variable} must name at least one"):
        Settings.from_env({**KEY, variable: value})


@pytest.mark.parametrize(
    "given", [{"access_key": ""}, {"access_keys": (("ann", ""),)}, {"jwt_secret": ""}]
)
def test_an_empty_secret_stops_the_start(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="would admit all callers"):
        make_settings(fal_key="a:b", **given)


def test_a_dotenv_file_in_another_encoding_is_reported(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("FAL_KEY=a:b\n", encoding="utf-16")
    with pytest.raises(SettingsError, match="is not in UTF-8"):
        read_environment(file)


def test_an_unknown_flat_name_is_refused() -> None:
    with pytest.raises(TypeError, match="no setting 'cache_tll'"):
        make_settings(fal_key="a:b", cache_tll=1.0)
