"""Settings of one process, in groups.

Each setting is one field with its type and default. The field's metadata has the environment
variable, the parser, and the text of the table in docs/configuration.md.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from falproxy.auth_settings import NO_AUTHENTICATION, AuthSettings
from falproxy.environment import check_key, check_variable_names, read_environment
from falproxy.errors import SettingsError
from falproxy.fal.endpoint import DEFAULT_MODELS, KONTEXT_ENDPOINTS, NamedEndpoint
from falproxy.fal.image_formats import FAL_FORMATS, Format
from falproxy.limit_settings import NO_LIMITS, LimitSettings, parse_usd
from falproxy.parsers import (
    one_of,
    parse_connections,
    parse_count,
    parse_debug_mode,
    parse_delay,
    parse_flag,
    parse_formats,
    parse_globs,
    parse_list,
    parse_listen_hosts,
    parse_log_level,
    parse_models,
    parse_origin,
    parse_owner_retention,
    parse_path,
    parse_port,
    parse_postgres_url,
    parse_proxies,
    parse_redis_url,
    parse_retention,
    parse_seconds,
    parse_size,
    parse_tags,
    parse_url,
)
from falproxy.setting_fields import read_group, setting
from falproxy.setting_fields import setting_fields as setting_fields
from falproxy.storage_backends import REHOST_VALUES, SupabaseProject, select_backend
from falproxy.telemetry_settings import NO_TELEMETRY, TelemetrySettings
from falproxy.trusted_proxies import Network

KIB, MIB = 2**10, 2**20
# Key of calls to the sandbox when no fal key is set.
SANDBOX_KEY = "sandbox:sandbox"
# Variables of falproxy.client, which may be in the same `.env` file.
CLIENT_VARIABLES = ("FALPROXY_URL", "FALPROXY_KEY")
# Variables of the fal key, as fal's own clients read them.
KEY_VARIABLES = {
    "FAL_KEY": "your fal key, `id:secret`; a key with API scope is enough",
    "FAL_KEY_ID": "first half of the key, if you have it in two parts",
    "FAL_KEY_SECRET": "second half of the key",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The listening process."""

    host: str = setting(
        "FALPROXY_HOST",
        parse_listen_hosts,
        "127.0.0.1",
        "address to listen on, or several, comma separated; `0.0.0.0` for all interfaces, `::` for "
        "all with IPv6 and IPv4",
    )
    port: int = setting(
        "FALPROXY_PORT",
        parse_port,
        8080,
        "port to listen on; `0` picks a free one. If it is not set, `PORT` is read",
        fallbacks={"PORT": parse_port},
    )
    socket_file: Path | None = setting(
        "FALPROXY_UDS",
        parse_path,
        None,
        "path of a Unix socket to listen on, in place of host and port",
    )
    workers: int = setting(
        "FALPROXY_WORKERS",
        parse_count,
        1,
        "number of processes of `falproxy serve` that share the port",
    )
    public_url: str | None = setting(
        "FALPROXY_PUBLIC_URL",
        parse_url,
        None,
        "URL of the proxy as clients see it, if the `Host` header of their requests is not right",
    )
    trusted_proxies: tuple[Network, ...] = setting(
        "FALPROXY_TRUSTED_PROXIES",
        parse_proxies,
        (),
        "addresses and networks of the proxies and load balancers in front of this one, comma "
        "separated, such as `10.0.0.0/8`; their `X-Forwarded-For` names the client",
    )
    max_body: int = setting(
        "FALPROXY_MAX_BODY", parse_size, 100 * MIB, "largest request body in bytes"
    )
    max_head: int = setting(
        "FALPROXY_MAX_HEAD", parse_size, 64 * KIB, "largest request line with headers in bytes"
    )
    head_timeout: float = setting(
        "FALPROXY_HEAD_TIMEOUT",
        parse_seconds,
        15.0,
        "seconds until the headers of a request are complete, on a new connection too",
    )
    idle_timeout: float = setting(
        "FALPROXY_IDLE_TIMEOUT",
        parse_seconds,
        75.0,
        "seconds that a connection is kept between two requests; more than the load balancer's",
    )
    max_connections: int = setting(
        "FALPROXY_MAX_CONNECTIONS",
        parse_connections,
        10_000,
        "open connections of clients to one process; fewer if the limit on open files is low",
    )
    drain: float = setting(
        "FALPROXY_DRAIN",
        parse_seconds,
        30.0,
        "seconds that running calls have to finish at shutdown",
    )
    stop_delay: float = setting(
        "FALPROXY_STOP_DELAY",
        parse_delay,
        5.0,
        "seconds in which a stopping process still accepts calls, while `/health/ready` returns "
        "503 and clients are asked to reconnect; at most half of `FALPROXY_DRAIN`",
    )
    fast_path: bool = setting(
        "FALPROXY_FAST_PATH",
        parse_flag,
        True,
        "`0` sends repeated requests through all middleware too; slower, for troubleshooting",
    )

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(self.host.split(","))

    @property
    def delay(self) -> float:
        """Seconds between the stop signal and the end of listening, at most."""
        return min(self.stop_delay, self.drain / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """Calls to fal."""

    connect_timeout: float = setting(
        "FALPROXY_CONNECT_TIMEOUT", parse_seconds, 5.0, "seconds to open a connection to fal"
    )
    timeout: float = setting(
        "FALPROXY_UPSTREAM_TIMEOUT",
        parse_seconds,
        3600.0,
        "seconds without data from fal after which a call fails; fal apps may run for an hour",
    )
    origin: str | None = setting(
        "FALPROXY_UPSTREAM_ORIGIN",
        parse_origin,
        None,
        "send calls to this origin instead of fal, such as a sandbox",
    )
    transport: str = setting(
        "FALPROXY_TRANSPORT",
        one_of("pool", "aiohttp"),
        "pool",
        "HTTP client for calls to fal: `pool` is falproxy's own connection pool; `aiohttp` is "
        "aiohttp's client, without the fast path; slower, for troubleshooting",
    )
    tags: tuple[str, ...] = setting(
        "FALPROXY_TAGS",
        parse_tags,
        (),
        "`principal`, `user` or both: tag model calls with them, so that fal's usage reports can "
        "be split; sends these names to fal",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """The check of image inputs."""

    formats: tuple[Format, ...] = setting(
        "FALPROXY_IMAGE_FORMATS",
        parse_formats,
        FAL_FORMATS,
        "accepted image formats; `heic` can be added",
    )
    check_remote: bool = setting(
        "FALPROXY_CHECK_REMOTE_IMAGES",
        parse_flag,
        False,
        "`1` checks images behind URLs on all model calls",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """The result cache, and the store that several machines can share."""

    enabled: bool = setting("FALPROXY_CACHE", parse_flag, True, "`0` turns the result cache off")
    endpoints: tuple[str, ...] = setting(
        "FALPROXY_CACHE_ENDPOINTS",
        parse_globs,
        KONTEXT_ENDPOINTS,
        "patterns of endpoint ids whose results are cached; `FALPROXY_CACHE=0` for none",
    )
    ttl: float = setting(
        "FALPROXY_CACHE_TTL", parse_seconds, 3600.0, "seconds that a cached result is reused"
    )
    scope: str = setting(
        "FALPROXY_CACHE_SCOPE",
        one_of("shared", "principal"),
        "shared",
        "`shared` reuses results across callers, `principal` only for the same caller",
    )
    max_entry: int = setting(
        "FALPROXY_CACHE_MAX_ENTRY", parse_size, 16 * MIB, "largest cached result in bytes"
    )
    max_size: int = setting(
        "FALPROXY_CACHE_MAX_SIZE",
        parse_size,
        1024 * MIB,
        "size of the SQLite cache in bytes; the least recently used results are deleted first",
    )
    owner_retention: float = setting(
        "FALPROXY_OWNER_RETENTION",
        parse_owner_retention,
        30 * 86400.0,
        "age at which the owner of a queued request is forgotten, at least `1d`; fal deletes "
        "requests after 30 days",
    )
    redis_url: str | None = setting(
        "REDIS_URL",
        parse_redis_url,
        None,
        "Redis for state that several machines share; its `maxmemory` limits the size, and its "
        "`maxmemory-policy` must be `volatile-lru` or `volatile-lfu`",
        secret=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DialectSettings:
    """The APIs beside the proxy route: Kontext, OpenAI images, and any model by name."""

    wait: float = setting(
        "FALPROXY_WAIT",
        parse_seconds,
        300.0,
        "seconds that `/kontext`, `/v1/images` and `/api/images` wait for a result",
    )
    models: tuple[NamedEndpoint, ...] = setting(
        "SUPPORTED_MODELS",
        parse_models,
        DEFAULT_MODELS,
        "models of `/v1/images` as `name:endpoint`, comma separated; a request without a model "
        "gets the first suitable one",
    )
    models_file: Path | None = setting(
        "FALPROXY_MODELS",
        parse_path,
        None,
        "TOML file with further models and templates for `/api/images`",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSettings:
    """The record of calls and costs."""

    database_url: str | None = setting(
        "DATABASE_URL",
        parse_postgres_url,
        None,
        "PostgreSQL for the ledger of several machines; default is a file in `FALPROXY_DATA_DIR`",
        secret=True,
    )
    retention: float | None = setting(
        "FALPROXY_LEDGER_RETENTION",
        parse_retention,
        400 * 86400.0,
        "age at which ledger records and finished jobs are deleted, such as `90d` or `12h`; `0` "
        "keeps everything",
    )
    jobs_retention: float | None = setting(
        "FALPROXY_JOBS_RETENTION",
        parse_retention,
        None,
        "age at which finished jobs of `/api/images` and `/v1/videos` are deleted; `0` deletes "
        "them with the ledger's records",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSettings:
    """Re-hosting of outputs: the copies of generated files that the proxy stores."""

    backend: str = setting(
        "FALPROXY_REHOST",
        one_of(*REHOST_VALUES),
        "auto",
        "where outputs are stored: `supabase`, `disk` or `off`; `auto` is Supabase if it is "
        "configured, the disk in the sandbox, otherwise `off`",
    )
    on_error: str = setting(
        "FALPROXY_REHOST_ON_ERROR",
        one_of("passthrough", "error"),
        "passthrough",
        "if a file cannot be stored: `passthrough` leaves fal's URL in the result, `error` "
        "refuses the result",
    )
    rehost_inputs: bool = setting(
        "FALPROXY_REHOST_INPUTS",
        parse_flag,
        False,
        "`1` stores the image inputs of model calls too, where outputs are stored",
    )
    files_retention: float | None = setting(
        "FALPROXY_FILES_RETENTION",
        parse_retention,
        None,
        "time without use after which stored files are deleted, such as `90d`; `0` keeps them",
    )
    supabase_url: str | None = setting(
        "SUPABASE_URL", parse_url, None, "URL of the Supabase project, `https://….supabase.co`"
    )
    supabase_key: str | None = setting(
        "SUPABASE_KEY",
        str,
        None,
        "secret key of the project (`sb_secret_…`), or the JWT of its service role",
        secret=True,
    )
    supabase_bucket: str = setting(
        "SUPABASE_BUCKET", str, "fal_images", "bucket for outputs; created if missing"
    )
    supabase_signed_urls: float | None = setting(
        "SUPABASE_SIGNED_URLS",
        parse_seconds,
        None,
        "lifetime of signed URLs in seconds; if not set, the bucket is public",
    )

    @property
    def project(self) -> SupabaseProject | None:
        """The Supabase project; None unless both URL and key are set."""
        url, key = self.supabase_url, self.supabase_key
        if not url or not key:
            return None
        return SupabaseProject(url, key, self.supabase_bucket, self.supabase_signed_urls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one process. Durations are seconds, sizes are bytes.

    `Settings(fal_key="id:secret")` is a working proxy; every other field has a default.
    """

    fal_key: str = field(repr=False)
    ai_keys: tuple[str, ...] = setting(
        "AI_KEYS",
        parse_list,
        (),
        "several fal keys, comma separated; overrides `FAL_KEY`",
        secret=True,
    )
    sandbox: bool = setting(
        "FALPROXY_SANDBOX", parse_flag, False, "`1` starts the sandbox, like `--sandbox`"
    )
    sandbox_balance: int | None = setting(
        "FALPROXY_SANDBOX_BALANCE",
        parse_usd,
        None,
        "USD on the sandbox's account, which refuses calls once they are spent",
    )
    data_dir: Path = setting(
        "FALPROXY_DATA_DIR",
        parse_path,
        Path(".falproxy"),
        "directory for the cache, the ledger and stored outputs",
    )
    log_level: str = setting(
        "FALPROXY_LOG_LEVEL",
        parse_log_level,
        "info",
        "`debug`, `info`, `warning` or `error`. If it is not set, `DEBUG_MODE=true` is `debug`",
        fallbacks={"DEBUG_MODE": parse_debug_mode},
    )
    server: ServerSettings = ServerSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    auth: AuthSettings = NO_AUTHENTICATION
    images: ImageSettings = ImageSettings()
    cache: CacheSettings = CacheSettings()
    storage: StorageSettings = StorageSettings()
    ledger: LedgerSettings = LedgerSettings()
    limits: LimitSettings = NO_LIMITS
    dialects: DialectSettings = DialectSettings()
    telemetry: TelemetrySettings = NO_TELEMETRY

    def __post_init__(self) -> None:
        for position, key in enumerate(self.fal_keys, start=1):
            check_key(key, f"fal key {position}" if self.ai_keys else "fal key")
        if not all(self.auth.names_by_secret) or self.auth.jwt_secret == "":
            raise SettingsError(
                "An access key or a secret is empty, which would admit all callers."
            )
        if self.storage.on_error == "error" and self.storage_backend == "off":
            raise SettingsError(
                "FALPROXY_REHOST_ON_ERROR=error refuses results whose files are not stored, "
                "but none are: set SUPABASE_URL and SUPABASE_KEY, or FALPROXY_REHOST=disk."
            )
        if self.storage.rehost_inputs and self.storage_backend == "off":
            raise SettingsError(
                "FALPROXY_REHOST_INPUTS=1 stores inputs where outputs are stored, but none are: "
                "set SUPABASE_URL and SUPABASE_KEY, or FALPROXY_REHOST=disk."
            )

    @property
    def fal_keys(self) -> tuple[str, ...]:
        """The fal keys for calls: AI_KEYS, or the one fal key."""
        return self.ai_keys or (self.fal_key,)

    @property
    def storage_backend(self) -> str:
        """Name of the storage backend in use, a key of `BACKENDS`, or `off`."""
        backend = select_backend(self.storage.backend, self)
        return "off" if backend is None else backend.name

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Self:
        """Read the settings from the environment and a `.env` file, or from a mapping.

        Raises: SettingsError, the fal key is missing or malformed, or a value is invalid.
        """
        env = read_environment() if env is None else env
        check_variable_names(env, {*variables(), *CLIENT_VARIABLES})
        values = read_group(cls, env)
        groups = {name: group(**read_group(group, env)) for name, group in GROUPS.items()}
        return cls(fal_key=read_fal_key(env, values), **values, **groups)


GROUPS: Mapping[str, type] = {
    group.name: type(group.default)
    for group in fields(Settings)
    if not group.metadata and group.name != "fal_key"
}


def variables() -> dict[str, "Field[Any]"]:
    """Return the field of each environment variable, except the variables of the fal key."""
    return {
        group_field.metadata["variable"]: group_field
        for group in (Settings, *GROUPS.values())
        for group_field in setting_fields(group)
    }


def read_fal_key(env: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """Return FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET joined, as fal's own clients do.

    values: fields of Settings that were already read; used for AI_KEYS and the sandbox.
    Raises: SettingsError, no key is set.
    """
    if key := env.get("FAL_KEY"):
        return key
    if (key_id := env.get("FAL_KEY_ID")) and (secret := env.get("FAL_KEY_SECRET")):
        return f"{key_id}:{secret}"
    if values.get("ai_keys"):
        return str(values["ai_keys"][0])
    if values.get("sandbox"):
        return SANDBOX_KEY
    raise SettingsError(
        "FAL_KEY is not set: put your key from https://fal.ai/dashboard/keys there, "
        "or start with --sandbox to work offline without an account."
    )
