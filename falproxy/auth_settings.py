"""Settings of the authentication of callers, and of the calls they may make."""

from dataclasses import dataclass

from falproxy.parsers import (
    parse_access_keys,
    parse_flag,
    parse_globs,
    parse_hosts,
    parse_key_mode,
    parse_list,
    parse_origins,
    parse_seconds,
    parse_shared_secret,
    parse_url,
)
from falproxy.setting_fields import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthSettings:
    """Authentication of callers, and the calls they may make."""

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
        "FALPROXY_JWT_SECRET",
        parse_shared_secret,
        None,
        "shared secret that callers' JWTs are signed with",
        secret=True,
    )
    jwks_url: str | None = setting(
        "FALPROXY_JWKS_URL",
        parse_url,
        None,
        "URL of the key set (JWKS) that callers' JWTs are signed with",
    )
    jwt_audience: str = setting(
        "FALPROXY_JWT_AUDIENCE", str, "authenticated", "audience that a JWT must have"
    )
    required: bool = setting(
        "FALPROXY_REQUIRE_AUTH",
        parse_flag,
        False,
        "`1` refuses to start without authentication, except for the sandbox; the default of the "
        "Docker image",
    )
    allowed_endpoints: tuple[str, ...] = setting(
        "FALPROXY_ALLOWED_ENDPOINTS",
        parse_globs,
        (),
        "patterns of endpoint ids that may be called, comma separated; empty allows all",
    )
    allowed_targets: tuple[str, ...] = setting(
        "FALPROXY_ALLOWED_TARGETS",
        parse_globs,
        (),
        "patterns of further fal URLs that may be called, such as `api.fal.ai/v1/models`",
    )
    allowed_origins: tuple[str, ...] = setting(
        "FALPROXY_ALLOWED_ORIGINS",
        parse_origins,
        (),
        "origins of web pages that may call the proxy, comma separated; `*` for all, if callers "
        "need a key or token",
    )
    allowed_hosts: tuple[str, ...] = setting(
        "FALPROXY_ALLOWED_HOSTS",
        parse_hosts,
        (),
        "host names of a proxy without authentication, beside `localhost` and IP addresses, comma "
        "separated; `*.example.com` for subdomains, `*` for any name",
    )
    uploads: bool = setting("FALPROXY_UPLOADS", parse_flag, True, "`0` refuses uploads")
    live: bool = setting("FALPROXY_LIVE", parse_flag, True, "`0` refuses live video")
    live_max_seconds: float | None = setting(
        "FALPROXY_LIVE_MAX_SECONDS",
        parse_seconds,
        None,
        "seconds after which a session of live video is ended",
    )
    admins: tuple[str, ...] = setting(
        "FALPROXY_ADMINS",
        parse_list,
        (),
        "names of callers that may see the usage of all callers and manage keys, comma separated",
    )
    keys: str = setting(
        "FALPROXY_KEYS",
        parse_key_mode,
        "auto",
        "keys made at run time: `1` requires a key or token of all callers, `0` accepts no such "
        "keys; `auto` accepts them if callers must authenticate, or if there are any at start",
    )

    @property
    def is_locked(self) -> bool:
        """True when callers have to authenticate."""
        has_secrets = bool(self.names_by_secret or self.jwt_secret or self.jwks_url)
        return has_secrets or self.keys == "on"

    @property
    def names_by_secret(self) -> dict[str, str]:
        """Access key → name of its caller."""
        names = {secret: name for name, secret in self.access_keys}
        return names if self.access_key is None else {self.access_key: "custom"} | names

    def short_names(self, minimum: int) -> list[str]:
        """Return the callers whose access keys have fewer than `minimum` characters."""
        return [name for secret, name in self.names_by_secret.items() if len(secret) < minimum]


NO_AUTHENTICATION = AuthSettings()
