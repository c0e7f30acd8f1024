"""Settings: what one process runs with, read once. Only this module reads the environment."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from falproxy.storage_backends import REHOST_VALUES, SupabaseProject, select_backend

MIB = 2**20
# What the sandbox is called with when there is no key.
SANDBOX_KEY = "sandbox:sandbox"
# What falproxy.client reads, which may stand in the same file.
CLIENT_VARIABLES = ("FALPROXY_URL", "FALPROXY_KEY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one process runs with. Durations are seconds, sizes are bytes."""

    fal_key: str = field(repr=False)  # secrets never reach a log through repr
    ai_keys: tuple[str, ...] = field(default=(), repr=False)  # several fal keys, which take turns
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1  # processes that share the port
    log_level: str = "info"
    max_body: int = 100 * MIB
    connect_timeout: float = 5.0
    upstream_timeout: float = 3600.0  # silence; as long as fal lets an app run
    fast_path: bool = True  # our own connections to fal; no takes aiohttp's client
    upstream_origin: str | None = None  # the sandbox's origin; None sends to the target itself
    drain: float = 30.0
    sandbox: bool = False
    public_url: str | None = None  # how clients reach the proxy; None is what they say themselves
    data_dir: Path = Path(".falproxy")
    access_keys: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # (name, secret)
    access_key: str | None = field(default=None, repr=False)  # one secret without a name
    jwt_secret: str | None = field(default=None, repr=False)
    jwks_url: str | None = None
    jwt_audience: str = "authenticated"
    allowed_endpoints: tuple[str, ...] = ()  # globs; none allows all
    allowed_targets: tuple[str, ...] = ()  # globs over host and path, beside what clients need
    allowed_origins: tuple[str, ...] = ()
    uploads: bool = True
    admins: tuple[str, ...] = ()  # principals who see what others did; nobody does otherwise
    image_formats: tuple[Format, ...] = FAL_FORMATS
    check_remote_images: bool = False
    cache: bool = True
    cache_endpoints: tuple[str, ...] = (
        KONTEXT_ENDPOINTS  # globs; what may be asked for without paying again
    )
    cache_ttl: float = 3600.0
    cache_scope: str = "shared"  # or "principal": nobody gets another's results
    cache_max_entry: int = 16 * MIB
    cache_max_size: int = 1024 * MIB
    redis_url: str | None = field(default=None, repr=False)
    wait: float = 300.0  # that a facade waits for a result
    models: tuple[NamedEndpoint, ...] = DEFAULT_MODELS  # of the OpenAI facade: (name, endpoint)
    models_file: Path | None = None  # the user's own models and templates
    database_url: str | None = field(default=None, repr=False)  # the ledger's; None is a file
    rehost: str = "auto"  # "supabase" where that is configured, "disk" in the sandbox, else "off"
    rehost_on_error: str = "passthrough"  # or "error": no result is given out with fal's addresses
    supabase_url: str | None = None
    supabase_key: str | None = field(default=None, repr=False)
    supabase_bucket: str = "fal_images"
    supabase_signed_urls: float | None = None  # seconds that they are good for; None is public

    def __post_init__(self) -> None:
        for position, key in enumerate(self.fal_keys, start=1):
            check_key(key, f"fal key {position}" if self.ai_keys else "fal key")
        if not all(self.names_by_secret) or self.jwt_secret == "":
            raise SettingsError("An access key or a secret is empty, which would let everybody in.")
        if self.rehost_on_error == "error" and self.rehost_to == "off":
            raise SettingsError(
                "FALPROXY_REHOST_ON_ERROR=error refuses results whose files are not stored, "
                "but none are: set SUPABASE_URL and SUPABASE_KEY, or FALPROXY_REHOST=disk."
            )

    @property
    def fal_keys(self) -> tuple[str, ...]:
        """The keys that calls are sent with."""
        return self.ai_keys or (self.fal_key,)

    @property
    def rehost_to(self) -> str:
        """Name of the storage backend for outputs, or `off`."""
        backend = select_backend(self.rehost, self)
        return "off" if backend is None else backend.name

    @property
    def project(self) -> SupabaseProject | None:
        """Where SUPABASE_URL and SUPABASE_KEY lead; either alone leads nowhere."""
        url, key = self.supabase_url, self.supabase_key
        if not url or not key:
            return None
        return SupabaseProject(url, key, self.supabase_bucket, self.supabase_signed_urls)

    @property
    def is_locked(self) -> bool:
        """Whether callers have to say who they are."""
        return bool(self.names_by_secret or self.jwt_secret or self.jwks_url)

    def short_names(self, minimum: int) -> list[str]:
        """The holders of access keys with fewer characters."""
        return [name for secret, name in self.names_by_secret.items() if len(secret) < minimum]

    @property
    def names_by_secret(self) -> dict[str, str]:
        """The holders of access keys."""
        names = {secret: name for name, secret in self.access_keys}
        return names if self.access_key is None else {self.access_key: "custom"} | names

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Self:
        """From the environment and a `.env` file, unless told what they say.

        Raises SettingsError: no key, one with stray characters, or a value without sense."""
        parsers: dict[str, tuple[str, Callable[[str], object]]] = {
            "AI_KEYS": ("ai_keys", parse_list),
            "FALPROXY_HOST": ("host", str),
            "FALPROXY_PORT": ("port", parse_port),
            "FALPROXY_WORKERS": ("workers", parse_count),
            "FALPROXY_LOG_LEVEL": ("log_level", parse_log_level),
            "FALPROXY_MAX_BODY": ("max_body", parse_size),
            "FALPROXY_CONNECT_TIMEOUT": ("connect_timeout", parse_seconds),
            "FALPROXY_UPSTREAM_TIMEOUT": ("upstream_timeout", parse_seconds),
            "FALPROXY_UPSTREAM_ORIGIN": ("upstream_origin", parse_origin),
            "FALPROXY_FAST_PATH": ("fast_path", parse_flag),
            "FALPROXY_DRAIN": ("drain", parse_seconds),
            "FALPROXY_SANDBOX": ("sandbox", parse_flag),
            "FALPROXY_PUBLIC_URL": ("public_url", parse_url),
            "FALPROXY_DATA_DIR": ("data_dir", Path),
            "FALPROXY_ACCESS_KEYS": ("access_keys", parse_access_keys),
            "CUSTOM_ACCESS_KEY": ("access_key", str),
            "FALPROXY_JWT_SECRET": ("jwt_secret", str),
            "FALPROXY_JWKS_URL": ("jwks_url", parse_url),
            "FALPROXY_JWT_AUDIENCE": ("jwt_audience", str),
            "FALPROXY_ALLOWED_ENDPOINTS": ("allowed_endpoints", parse_globs),
            "FALPROXY_ALLOWED_TARGETS": ("allowed_targets", parse_globs),
            "FALPROXY_ALLOWED_ORIGINS": ("allowed_origins", parse_origins),
            "FALPROXY_UPLOADS": ("uploads", parse_flag),
            "FALPROXY_ADMINS": ("admins", parse_list),
            "FALPROXY_IMAGE_FORMATS": ("image_formats", parse_formats),
            "FALPROXY_CHECK_REMOTE_IMAGES": ("check_remote_images", parse_flag),
            "FALPROXY_CACHE": ("cache", parse_flag),
            "FALPROXY_CACHE_ENDPOINTS": ("cache_endpoints", parse_globs),
            "FALPROXY_CACHE_TTL": ("cache_ttl", parse_seconds),
            "FALPROXY_CACHE_SCOPE": ("cache_scope", one_of("shared", "principal")),
            "FALPROXY_CACHE_MAX_ENTRY": ("cache_max_entry", parse_size),
            "FALPROXY_CACHE_MAX_SIZE": ("cache_max_size", parse_size),
            "REDIS_URL": ("redis_url", parse_redis_url),
            "FALPROXY_WAIT": ("wait", parse_seconds),
            "SUPPORTED_MODELS": ("models", parse_models),
            "FALPROXY_MODELS": ("models_file", Path),
            "DATABASE_URL": ("database_url", str),
            "FALPROXY_REHOST": ("rehost", one_of(*REHOST_VALUES)),
            "FALPROXY_REHOST_ON_ERROR": ("rehost_on_error", one_of("passthrough", "error")),
            "SUPABASE_URL": ("supabase_url", parse_url),
            "SUPABASE_KEY": ("supabase_key", str),
            "SUPABASE_BUCKET": ("supabase_bucket", str),
            "SUPABASE_SIGNED_URLS": ("supabase_signed_urls", parse_seconds),
        }
        env = read_environment() if env is None else env
        check_variable_names(env, {*parsers, *CLIENT_VARIABLES})
        given: dict[str, Any] = {
            name: parse_variable(variable, env[variable], parse)
            for variable, (name, parse) in parsers.items()
            if env.get(variable)
        }
        return cls(fal_key=read_fal_key(env, given), **given)


def check_variable_names(env: Mapping[str, str], known: set[str]) -> None:
    """Raises SettingsError: a FALPROXY_ name that nothing reads, such as a lock misspelt."""
    for name in sorted(env):
        if name.startswith("FALPROXY_") and name not in known:
            from difflib import get_close_matches  # most starts get along without it

            near = get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SettingsError(f"{name} is no setting of falproxy.{hint}")


def read_environment(dotenv: Path = Path(".env")) -> dict[str, str]:
    """The process's environment over what a `.env` file says. Raises: SettingsError, it cannot be
    read."""
    if not dotenv.exists():
        return {**os.environ}
    from dotenv import dotenv_values  # where there is no such file, it would be for nothing

    try:
        values = dotenv_values(dotenv)
    except UnicodeDecodeError as error:
        raise SettingsError(f"{dotenv} is not in UTF-8: save it so.") from error
    from_file = {name: value for name, value in values.items() if value is not None}
    return from_file | os.environ


def read_fal_key(env: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """FAL_KEY, or FAL_KEY_ID and FAL_KEY_SECRET, as fal's own clients read them."""
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
    """Raises SettingsError: the key could not be sent in a header. It says where, never what."""
    for position, character in enumerate(key, start=1):
        if not "!" <= character <= "~" or character in "\"'":
            raise SettingsError(
                f"The {name} has a stray character ({describe_character(character)}) "
                f"at position {position} of {len(key)}."
            )
    if not key:
        raise SettingsError(f"The {name} is empty.")


def describe_character(character: str) -> str:
    """A kind of character, in words that give nothing of a secret away."""
    if character in "\"'":
        return "a quote"
    if character.isspace():
        return "white space"
    return "not ASCII" if character > "~" else "a control character"


def parse_variable(variable: str, value: str, parse: Callable[[str], object]) -> object:
    try:
        return parse(value)
    except ValueError as error:
        raise SettingsError(f"{variable} {error}.") from error
