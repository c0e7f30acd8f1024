"""Settings of one process, in groups, read once. Only this module reads the environment.

Each setting is one field: its type and default, and in its metadata the environment variable, the
parser and the text of the README's table.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from falproxy.errors import SettingsError
from falproxy.fal.endpoint import DEFAULT_MODELS, KONTEXT_ENDPOINTS, NamedEndpoint
from falproxy.fal.image_formats import FAL_FORMATS, Format
from falproxy.parsers import (
    one_of,
    parse_access_keys,
    parse_count,
    parse_flag,
    parse_formats,
    parse_globs,
    parse_list,
    parse_log_level,
    parse_models,
    parse_origin,
    parse_origins,
    parse_port,
    parse_redis_url,
    parse_seconds,
    parse_size,
    parse_url,
)

MIB = 2**20
# The key that calls to the sandbox carry when no fal key is set.
SANDBOX_KEY = "sandbox:sandbox"
# Variables of falproxy.client, which may be in the same file.
CLIENT_VARIABLES = ("FALPROXY_URL", "FALPROXY_KEY")
# Variables of the fal key, as fal's own clients read them.
KEY_VARIABLES = {
    "FAL_KEY": "your key, `id:secret`; use one with API scope",
    "FAL_KEY_ID": "the first half of the key, where it comes in two",
    "FAL_KEY_SECRET": "its second half",
}


def setting(
    variable: str,
    parse: Callable[[str], object],
    default: object,
    help: str,
    *,
    secret: bool = False,
) -> Any:
    """Define a field that is read from an environment variable.

    parse: turns the variable's text into the field's value; raises ValueError with a sentence that
        follows the variable's name.
    help: the meaning, as in the README's table.
    secret: the value never appears in a repr.
    """
    metadata = {"variable": variable, "parse": parse, "help": help}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The listening process."""

    host: str = setting("FALPROXY_HOST", str, "127.0.0.1", "address to listen on; `0.0.0.0` is all")
    port: int = setting("FALPROXY_PORT", parse_port, 8080, "port to listen on; 0 takes a free one")
    workers: int = setting(
        "FALPROXY_WORKERS", parse_count, 1, "processes of `falproxy serve` that share the port"
    )
    public_url: str | None = setting(
        "FALPROXY_PUBLIC_URL",
        parse_url,
        None,
        "URL of the proxy as clients see it, if the `Host` header does not give it",
    )
    max_body: int = setting(
        "FALPROXY_MAX_BODY", parse_size, 100 * MIB, "largest request body in bytes"
    )
    drain: float = setting(
        "FALPROXY_DRAIN", parse_seconds, 30.0, "seconds that running calls have to finish at a stop"
    )
    fast_path: bool = setting(
        "FALPROXY_FAST_PATH",
        parse_flag,
        True,
        "`0` sends every request through all middleware, also repeated ones: slower",
    )


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
        "seconds without a byte from fal until a call fails; fal lets apps run for an hour",
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
        "HTTP client to fal: `pool` is falproxy's own connection pool, `aiohttp` aiohttp's client, "
        "which is slower",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthSettings:
    """Callers, and the calls they may make."""

    access_keys: tuple[tuple[str, str], ...] = setting(
        "FALPROXY_ACCESS_KEYS",
        parse_access_keys,
        (),
        "`name:secret` of each caller, comma separated",
        secret=True,
    )
    access_key: str | None = setting(
        "CUSTOM_ACCESS_KEY", str, None, "one access key without a name", secret=True
    )
    jwt_secret: str | None = setting(
        "FALPROXY_JWT_SECRET", str, None, "secret that callers' JWTs are signed with", secret=True
    )
    jwks_url: str | None = setting(
        "FALPROXY_JWKS_URL", parse_url, None, "URL of the public keys of callers' JWTs"
    )
    jwt_audience: str = setting(
        "FALPROXY_JWT_AUDIENCE", str, "authenticated", "required audience of a JWT"
    )
    allowed_endpoints: tuple[str, ...] = setting(
        "FALPROXY_ALLOWED_ENDPOINTS",
        parse_globs,
        (),
        "patterns of endpoint ids that may be called; empty allows all",
    )
    allowed_targets: tuple[str, ...] = setting(
        "FALPROXY_ALLOWED_TARGETS",
        parse_globs,
        (),
        "patterns of further fal URLs, such as `api.fal.ai/v1/models`",
    )
    allowed_origins: tuple[str, ...] = setting(
        "FALPROXY_ALLOWED_ORIGINS", parse_origins, (), "origins of pages that may call the proxy"
    )
    uploads: bool = setting("FALPROXY_UPLOADS", parse_flag, True, "`0` refuses uploads")
    admins: tuple[str, ...] = setting(
        "FALPROXY_ADMINS",
        parse_list,
        (),
        "names of callers who see the usage of all callers, comma separated",
    )

    @property
    def is_locked(self) -> bool:
        """True when callers have to authenticate."""
        return bool(self.names_by_secret or self.jwt_secret or self.jwks_url)

    @property
    def names_by_secret(self) -> dict[str, str]:
        """Access key → name of its holder."""
        names = {secret: name for name, secret in self.access_keys}
        return names if self.access_key is None else {self.access_key: "custom"} | names

    def short_names(self, minimum: int) -> list[str]:
        """Return the holders of access keys with fewer than `minimum` characters."""
        return [name for secret, name in self.names_by_secret.items() if len(secret) < minimum]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """The check of image inputs."""

    formats: tuple[Format, ...] = setting(
        "FALPROXY_IMAGE_FORMATS",
        parse_formats,
        FAL_FORMATS,
        "image formats that are accepted; `heic` is known too",
    )
    check_remote: bool = setting(
        "FALPROXY_CHECK_REMOTE_IMAGES",
        parse_flag,
        False,
        "`1` reads the images behind URLs on all model calls",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """The result cache, and the store that several machines share."""

    enabled: bool = setting(
        "FALPROXY_CACHE", parse_flag, True, "`0` neither stores nor shares results"
    )
    endpoints: tuple[str, ...] = setting(
        "FALPROXY_CACHE_ENDPOINTS",
        parse_globs,
        KONTEXT_ENDPOINTS,
        "patterns of endpoint ids whose results are reused; `FALPROXY_CACHE=0` is for none",
    )
    ttl: float = setting(
        "FALPROXY_CACHE_TTL", parse_seconds, 3600.0, "seconds that a result serves new calls"
    )
    scope: str = setting(
        "FALPROXY_CACHE_SCOPE",
        one_of("shared", "principal"),
        "shared",
        "`principal` keeps callers' results apart",
    )
    max_entry: int = setting(
        "FALPROXY_CACHE_MAX_ENTRY", parse_size, 16 * MIB, "largest stored result in bytes"
    )
    max_size: int = setting(
        "FALPROXY_CACHE_MAX_SIZE",
        parse_size,
        1024 * MIB,
        "bytes of all results in the SQLite file; the least recently used are deleted first",
    )
    redis_url: str | None = setting(
        "REDIS_URL",
        parse_redis_url,
        None,
        "Redis for the state that several machines share; its own `maxmemory` limits it",
        secret=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DialectSettings:
    """The APIs beside the proxy route: Kontext, OpenAI, any model."""

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
        "models of `/v1/images`, `name:endpoint` each; the first that fits is taken where a client "
        "names none",
    )
    models_file: Path | None = setting(
        "FALPROXY_MODELS",
        Path,
        None,
        "a TOML file with further models and templates of `/api/images`",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSettings:
    """The record of calls and costs."""

    database_url: str | None = setting(
        "DATABASE_URL",
        str,
        None,
        "PostgreSQL for the ledger of several machines; else it is a file in `FALPROXY_DATA_DIR`",
        secret=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSettings:
    """Re-hosting of outputs."""

    backend: str = setting(
        "FALPROXY_REHOST",
        one_of("auto", "supabase", "disk", "off"),
        "auto",
        "storage of outputs: `supabase`, `disk` or `off`; `auto` is Supabase when it is "
        "configured, the disk in the sandbox, else `off`",
    )
    on_error: str = setting(
        "FALPROXY_REHOST_ON_ERROR",
        one_of("passthrough", "error"),
        "passthrough",
        "when a file cannot be stored, `passthrough` leaves fal's URL and `error` refuses the "
        "result",
    )
    supabase_url: str | None = setting(
        "SUPABASE_URL", parse_url, None, "the project's URL, `https://….supabase.co`"
    )
    supabase_key: str | None = setting(
        "SUPABASE_KEY",
        str,
        None,
        "a secret key of the project (`sb_secret_…`), or its service role's JWT",
        secret=True,
    )
    supabase_bucket: str = setting(
        "SUPABASE_BUCKET", str, "fal_images", "bucket for outputs; it is created when missing"
    )
    supabase_signed_urls: float | None = setting(
        "SUPABASE_SIGNED_URLS",
        parse_seconds,
        None,
        "lifetime of signed URLs in seconds; without it the bucket is public",
    )

    @property
    def project(self) -> "SupabaseProject | None":
        """The Supabase project; None unless both URL and key are set."""
        url, key = self.supabase_url, self.supabase_key
        if not url or not key:
            return None
        return SupabaseProject(url, key, self.supabase_bucket, self.supabase_signed_urls)


@dataclass(frozen=True, slots=True)
class SupabaseProject:
    """A Supabase project. signed_url_ttl: seconds; None for public URLs."""

    url: str
    key: str = field(repr=False)
    bucket: str
    signed_url_ttl: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one process. Durations are seconds, sizes are bytes.

    `Settings(fal_key="id:secret")` is a working proxy; each other value has a default.
    """

    fal_key: str = field(repr=False)
    ai_keys: tuple[str, ...] = setting(
        "AI_KEYS",
        parse_list,
        (),
        "several fal keys, comma separated; wins over `FAL_KEY`",
        secret=True,
    )
    sandbox: bool = setting("FALPROXY_SANDBOX", parse_flag, False, "`1` is `--sandbox`")
    data_dir: Path = setting(
        "FALPROXY_DATA_DIR", Path, Path(".falproxy"), "folder of the proxy's own files"
    )
    log_level: str = setting(
        "FALPROXY_LOG_LEVEL", parse_log_level, "info", "`debug`, `info`, `warning` or `error`"
    )
    server: ServerSettings = ServerSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    auth: AuthSettings = AuthSettings()
    images: ImageSettings = ImageSettings()
    cache: CacheSettings = CacheSettings()
    storage: StorageSettings = StorageSettings()
    ledger: LedgerSettings = LedgerSettings()
    dialects: DialectSettings = DialectSettings()

    def __post_init__(self) -> None:
        for position, key in enumerate(self.fal_keys, start=1):
            check_key(key, f"fal key {position}" if self.ai_keys else "fal key")
        if not all(self.auth.names_by_secret) or self.auth.jwt_secret == "":
            raise SettingsError("An access key or a secret is empty, which would let everybody in.")
        if self.storage.on_error == "error" and self.storage_backend == "off":
            raise SettingsError(
                "FALPROXY_REHOST_ON_ERROR=error refuses results whose files are not stored, "
                "but none are: set SUPABASE_URL and SUPABASE_KEY, or FALPROXY_REHOST=disk."
            )

    @property
    def fal_keys(self) -> tuple[str, ...]:
        """The keys that calls are sent with."""
        return self.ai_keys or (self.fal_key,)

    @property
    def storage_backend(self) -> str:
        """The storage of outputs: supabase, disk, or off."""
        if self.storage.backend != "auto":
            return self.storage.backend
        if self.storage.project is not None:
            return "supabase"
        return "disk" if self.sandbox else "off"

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Self:
        """Read the settings from the environment and a `.env` file, or from a mapping.

        Raises: SettingsError, a fal key is missing or has stray characters, or a value is invalid.
        """
        env = read_environment() if env is None else env
        check_variable_names(env, {*variables(), *CLIENT_VARIABLES})
        values = read_group(cls, env)
        groups = {name: group(**read_group(group, env)) for name, group in GROUPS.items()}
        return cls(fal_key=read_fal_key(env, values), **values, **groups)


GROUPS: Mapping[str, type] = {
    each.name: type(each.default)
    for each in fields(Settings)
    if not each.metadata and each.name != "fal_key"
}


def variables() -> dict[str, "Field[Any]"]:
    """Environment variable → its field, without the variables of the fal key."""
    return {
        each.metadata["variable"]: each
        for group in (Settings, *GROUPS.values())
        for each in settings_of(group)
    }


def settings_of(group: type) -> Iterator["Field[Any]"]:
    return (each for each in fields(group) if each.metadata)


def read_group(group: type, env: Mapping[str, str]) -> dict[str, Any]:
    """Field name → value, for the variables that are set and not empty. Raises: SettingsError."""
    values: dict[str, Any] = {}
    for each in settings_of(group):
        variable = each.metadata["variable"]
        if text := env.get(variable):
            try:
                values[each.name] = each.metadata["parse"](text)
            except ValueError as error:
                raise SettingsError(f"{variable} {error}.") from error
    return values


def check_variable_names(env: Mapping[str, str], known: set[str]) -> None:
    """Raises: SettingsError, a `FALPROXY_` variable is not a setting, such as a misspelt lock."""
    for name in sorted(env):
        if name.startswith("FALPROXY_") and name not in known:
            from difflib import get_close_matches  # slow to import, and rarely needed

            near = get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SettingsError(f"{name} is no setting of falproxy.{hint}")


def read_environment(dotenv: Path = Path(".env")) -> dict[str, str]:
    """Return the process's environment, completed by a `.env` file.

    Raises: SettingsError, the file cannot be read.
    """
    if not dotenv.exists():
        return {**os.environ}
    from dotenv import dotenv_values  # imported only where there is such a file

    try:
        values = dotenv_values(dotenv)
    except UnicodeDecodeError as error:
        raise SettingsError(f"{dotenv} is not in UTF-8: save it so.") from error
    from_file = {name: value for name, value in values.items() if value is not None}
    return from_file | os.environ


def read_fal_key(env: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """Return FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET joined, as fal's own clients do.

    values: the settings read so far, for AI_KEYS and the sandbox.
    Raises: SettingsError, there is no key.
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


def check_key(key: str, name: str) -> None:
    """Raises: SettingsError, the key could not be sent in a header. The message has a position and
    a kind of character, never a character of the key."""
    for position, character in enumerate(key, start=1):
        if not "!" <= character <= "~" or character in "\"'":
            raise SettingsError(
                f"The {name} has a stray character ({describe_character(character)}) "
                f"at position {position} of {len(key)}."
            )
    if not key:
        raise SettingsError(f"The {name} is empty.")


def describe_character(character: str) -> str:
    """Return the kind of a character, which reveals nothing of a secret."""
    if character in "\"'":
        return "a quote"
    if character.isspace():
        return "white space"
    return "not ASCII" if character > "~" else "a control character"
