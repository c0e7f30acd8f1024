"""Parsers of the settings' values.

Each function raises ValueError with a message that continues a sentence after the setting's name
("must be a port number …"). The message never contains the value: it may be a secret that was
assigned to the wrong setting.
"""

import re
from collections.abc import Callable
from pathlib import Path

from falproxy.fal.endpoint import NamedEndpoint, is_endpoint
from falproxy.fal.image_formats import FORMAT_NAMES, Format
from falproxy.fal.tags import TAG_NAMES
from falproxy.trusted_proxies import Network, parse_network

INTEGER = re.compile(r"\d{1,9}", re.ASCII)
SIZE = re.compile(r"(\d{1,18}) ?(?:([KMG])(?:i?B)?)?", re.IGNORECASE | re.ASCII)
SIZE_MAX = 2**50
SECONDS_MAX = 10 * 365 * 86400
SIZE_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
AGE = re.compile(r"(\d{1,6})([smhd])", re.IGNORECASE)
AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# No user, query or fragment: paths are appended to these URLs.
BASE_URL = re.compile(r"https?://(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?(?:/[^\s?#@\\]*)?")
ANY_ORIGIN = "*"
ORIGIN = re.compile(r"https?://(?:\*\.)?(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")
HOST_PATTERN = re.compile(r"\*|(?:\*\.)?[\w-]+(?:\.[\w-]+)*\.?", re.ASCII)
COUNT_MAX = 256
CONNECTIONS_MAX = 1_000_000
WILDCARD = re.compile(r"\*+")
WILDCARDS_MAX = 3  # each one multiplies the time that matching a hostile path can take
REDIS_URL = re.compile(r"rediss?://\S+")
# The parts of a URL of PostgreSQL. Without these rules, a character that should have been escaped
# would make a part of the password another part of the URL.
POSTGRES_HOST = r"(?:[\w.%-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?"
POSTGRES_URL = re.compile(
    rf"postgres(?:ql)?://(?:[^\s/?#\[\]]*@)?{POSTGRES_HOST}(?:,{POSTGRES_HOST})*"
    r"(?:/[^\s?#]*)?(?:\?[^\s#]*)?"
)
NAME = re.compile(r"[!-9;-~]{1,100}")  # visible ASCII except the colon
LOG_LEVELS = ("debug", "info", "warning", "error")


def parse_port(value: str) -> int:
    return parse_integer(value, 0, 65535, "a port number")


def parse_integer(value: str, minimum: int, maximum: int, noun: str) -> int:
    """Parse a whole number in a range. noun: its name in the message, such as `a port number`."""
    is_number = INTEGER.fullmatch(value) is not None
    if not is_number or not minimum <= int(value) <= maximum:
        raise ValueError(f"must be {noun} from {minimum} to {maximum}")
    return int(value)


def parse_log_level(value: str) -> str:
    if value.lower() not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}")
    return value.lower()


def parse_size(value: str) -> int:
    """Parse a number of bytes, with an optional binary unit: `100M`, `1 GiB`."""
    match = SIZE.fullmatch(value)
    size = int(match[1]) * SIZE_UNITS.get((match[2] or "").upper(), 1) if match else 0
    if not 0 < size <= SIZE_MAX:
        raise ValueError("must be a number of bytes like 104857600 or 100M")
    return size


def parse_seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= SECONDS_MAX:  # false for NaN
        raise ValueError(f"must be a number of seconds above 0 and at most {SECONDS_MAX}")
    return seconds


def parse_delay(value: str) -> float:
    """Parse seconds, which may be 0."""
    return 0.0 if value.strip() in ("0", "0.0") else parse_seconds(value)


def parse_listen_hosts(value: str) -> str:
    """Parse hosts to listen on, comma separated; an IPv6 address may be in brackets."""
    hosts = [part.strip().removeprefix("[").removesuffix("]") for part in value.split(",")]
    if not all(hosts):
        raise ValueError("must be an address, or several with a comma between them")
    return ",".join(dict.fromkeys(hosts))


def parse_age(value: str) -> float:
    """Parse days, hours, minutes or seconds (`30d`, `12h`, `45m`, `10s`) to seconds."""
    match = AGE.fullmatch(value)
    if match is None:
        raise ValueError("must be like 30d, 12h or 45m")
    return float(match[1]) * AGE_UNITS[match[2].lower()]


def parse_retention(value: str) -> float | None:
    """Parse an age in seconds, such as `400d`. Return None for `0` and `off`: no limit."""
    if value.lower() in ("0", "off"):
        return None
    try:
        return parse_age(value) or None
    except ValueError as error:
        raise ValueError("must be like 400d or 12h, or 0 for no limit") from error


def parse_owner_retention(value: str) -> float:
    """Parse an age of at least a day: ids of results from the cache are valid for so long."""
    try:
        seconds = parse_age(value)
    except ValueError as error:
        raise ValueError("must be like 30d") from error
    if seconds < AGE_UNITS["d"]:
        raise ValueError("must be at least 1d")
    return seconds


def parse_flag(value: str) -> bool:
    if value.lower() not in ("0", "1", "false", "true", "no", "yes", "off", "on"):
        raise ValueError("must be 0 or 1")
    return value.lower() in ("1", "true", "yes", "on")


def parse_debug_mode(value: str) -> str:
    """Parse a flag to a log level."""
    return "debug" if parse_flag(value) else "info"


def parse_key_mode(value: str) -> str:
    """Parse `auto`, or a flag to `on` or `off`."""
    if value.lower() == "auto":
        return "auto"
    try:
        return "on" if parse_flag(value) else "off"
    except ValueError:
        raise ValueError("must be 0, 1 or auto") from None


def parse_url(value: str) -> str:
    match = BASE_URL.fullmatch(value)
    if match is None or int(match[1] or 0) > 65535:
        raise ValueError("must be a URL like https://proxy.example.com")
    return value.rstrip("/")


def parse_origin(value: str) -> str:
    origin = parse_url(value)
    if "/" in origin.partition("://")[2]:
        raise ValueError("must be an origin like http://127.0.0.1:8081, without a path")
    return origin


def parse_tags(value: str) -> tuple[str, ...]:
    """Parse the names of request tags. They are returned once each, in their order."""
    names = dict.fromkeys(parse_list(value))
    if not names or not names.keys() <= {*TAG_NAMES}:
        raise ValueError(f"must be {' or '.join(TAG_NAMES)}, or both with a comma")
    return tuple(names)


def parse_list(value: str) -> tuple[str, ...]:
    """Parse comma-separated words. Commas alone are refused: they come from an unset variable."""
    items = tuple(item for part in value.split(",") if (item := part.strip()))
    if not items:
        raise ValueError("must name at least one, or not be set at all")
    return items


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a parser that accepts one of these words."""

    def parse_choice(value: str) -> str:
        if value.lower() not in choices:
            listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise ValueError(f"must be {listed}")
        return value.lower()

    return parse_choice


def parse_redis_url(value: str) -> str:
    if not REDIS_URL.fullmatch(value):
        raise ValueError(
            "must be a URL like redis://localhost:6379/0 or rediss://…, with special characters in "
            "the password escaped"
        )
    return value


def parse_postgres_url(value: str) -> str:
    match = POSTGRES_URL.fullmatch(value)
    ports = re.findall(r":(\d{1,5})(?=[,/?]|$)", value.partition("://")[2].rpartition("@")[2])
    if match is None or any(int(port) > 65535 for port in ports):
        raise ValueError(
            "must be a URL like postgresql://user:password@host/database. Escape special "
            "characters in user and password: / is %2F, # is %23, ? is %3F, @ is %40, [ is %5B"
        )
    return value


def parse_shared_secret(value: str) -> str:
    if "-----BEGIN " in value:
        raise ValueError("must be a shared secret; for public keys, set FALPROXY_JWKS_URL instead")
    return value


def parse_path(value: str) -> Path:
    """Parse the path of a file or folder, which has no control characters."""
    if any(character < " " for character in value):
        raise ValueError("must be a path without control characters")
    return Path(value)


def check_text(value: str) -> None:
    """Check a value of any setting. Raises: ValueError, it has characters that no setting has."""
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text in UTF-8") from None


def parse_origins(value: str) -> tuple[str, ...]:
    """Parse origins as browsers send them, `https://*.example.com` for all subdomains, or `*`."""
    origins = parse_list(value)
    if origins == (ANY_ORIGIN,):
        return origins
    for position, origin in enumerate(origins, start=1):
        if not ORIGIN.fullmatch(origin):
            raise ValueError(
                "must be origins like https://a.example.com or https://*.a.com, in lower case and "
                f"without a path; number {position} is not"
            )
    return origins


def parse_hosts(value: str) -> tuple[str, ...]:
    """Parse host names, `*.example.com` for all subdomains, or `*`."""
    hosts = parse_list(value)
    for host in hosts:
        if not HOST_PATTERN.fullmatch(host):
            raise ValueError(
                "must be host names like proxy.example.com or *.example.com, without http:// and "
                "without a port"
            )
    return tuple(host.lower() for host in hosts)


def parse_proxies(value: str) -> tuple[Network, ...]:
    """Parse the addresses and networks of proxies."""
    networks = []
    for position, text in enumerate(parse_list(value), start=1):
        try:
            networks.append(parse_network(text))
        except ValueError:
            raise ValueError(
                "must be addresses and networks of proxies like 10.0.0.5, 10.0.0.0/8 or fd00::/8, "
                "without host bits, and not all addresses, since a client could then name any "
                f"address as its own; number {position} is not"
            ) from None
    return tuple(networks)


def parse_globs(value: str) -> tuple[str, ...]:
    globs = parse_list(value)
    for position, glob in enumerate(globs, start=1):
        if glob.startswith("/") or " " in glob or "***" in glob:
            raise ValueError(f"must be patterns like fal-ai/flux/**; number {position} is not")
        if len(WILDCARD.findall(glob)) > WILDCARDS_MAX:
            raise ValueError(
                f"must have at most {WILDCARDS_MAX} wildcards in a pattern; number {position} has "
                "more"
            )
    return globs


def parse_access_keys(value: str) -> tuple[tuple[str, str], ...]:
    """Parse `name:secret` or a bare `secret`, which gets a numbered name, to (name, secret)."""
    keys = []
    for position, key in enumerate(parse_list(value), start=1):
        name, colon, secret = key.partition(":")
        keys.append((name, secret) if colon else (f"key-{position}", key))
    for position, (name, secret) in enumerate(keys, start=1):
        if not name or not secret or not (name + secret).isascii() or " " in name + secret:
            raise ValueError(f"has a key at position {position} that is not name:secret")
    return tuple(keys)


def parse_count(value: str) -> int:
    return parse_integer(value, 1, COUNT_MAX, "a whole number")


def parse_connections(value: str) -> int:
    return parse_integer(value, 1, CONNECTIONS_MAX, "a whole number")


def parse_models(value: str) -> tuple[NamedEndpoint, ...]:
    """Parse `name:endpoint`, or an endpoint that is also its name, to (name, endpoint)."""
    models: list[NamedEndpoint] = []
    for item in filter(None, (part.strip() for part in value.split(","))):
        name, colon, endpoint = item.partition(":")
        endpoint = endpoint if colon else name
        if not NAME.fullmatch(name) or not is_endpoint(endpoint):
            raise ValueError(
                "must be names and endpoints like flux:fal-ai/flux/dev; number "
                f"{len(models) + 1} is not"
            )
        models.append((name, endpoint))
    if not models:
        raise ValueError("must name at least one, or not be set at all")
    if len(dict(models)) < len(models):
        raise ValueError("must not give two models the same name")
    return tuple(models)


def parse_formats(value: str) -> tuple[Format, ...]:
    """Parse comma-separated image formats; duplicates are dropped."""
    names = parse_list(value)
    for name in names:
        if name.lower() not in FORMAT_NAMES:
            raise ValueError(f"must be some of {', '.join(Format)}")
    return tuple(dict.fromkeys(FORMAT_NAMES[name.lower()] for name in names))
