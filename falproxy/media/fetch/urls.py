"""Checks of the URLs that users name, by their text alone."""

import re
from collections.abc import Callable, Collection
from contextlib import suppress
from urllib.parse import urljoin

from yarl import URL

from falproxy.fal.target import is_ambiguous
from falproxy.media.fetch.ip_ranges import is_private_name, is_public, parse_host

PORTS = (80, 443)
# Characters that URL parsers treat differently, or that cannot be sent.
UNSAFE_CHARACTERS = re.compile(r"[\x00-\x20\x7f-\xa0\\\s\ud800-\udfff]")
AUTHORITY = re.compile(r"https?://(?P<authority>[^/?#]+)", re.IGNORECASE)
LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
HOST = re.compile(rf"(?=.{{1,254}}$)(?:{LABEL}\.)+{LABEL}\.?", re.IGNORECASE)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class FetchRefused(Exception):
    """The URL points to a private address, or has a form that is never fetched. The message is a
    sentence for users, without the URL and IP addresses."""


class UnsupportedUrl(FetchRefused):
    """The URL has a form that falproxy does not fetch. fal may."""


def private_address() -> FetchRefused:
    return FetchRefused("The URL points to an address that is not on the public internet.")


def check_url(
    url: str,
    *,
    is_allowed: Callable[[str], bool] = is_public,
    ports: Collection[int] = PORTS,
) -> URL:
    """Return the URL to request. Host names are not resolved. Raises: FetchRefused."""
    parsed = parse(url)
    host = parsed.raw_host or ""
    if (address := parse_host(host)) is not None:
        if not is_allowed(str(address)):
            raise private_address()
    elif is_private_name(host):
        raise private_address()
    elif not HOST.fullmatch(host):
        raise UnsupportedUrl("The URL has a host that is no valid name.")
    if parsed.port not in ports:
        raise UnsupportedUrl("The URL names a port other than those of http and https.")
    return parsed


def parse(url: str) -> URL:
    """Parse a URL; an ASCII one keeps its exact spelling. Raises: FetchRefused."""
    if UNSAFE_CHARACTERS.search(url):
        raise UnsupportedUrl("The URL has a character that must not stand in a URL.")
    match = AUTHORITY.match(url)
    if match is None:
        raise UnsupportedUrl("The URL must start with http:// or https:// and name a host.")
    if "@" in match["authority"]:
        raise UnsupportedUrl("The URL must not have a user name or a password.")
    with suppress(ValueError):
        parsed = URL(url, encoded=url.isascii()).with_fragment(None)
        if parsed.host:  # may raise ValueError: the host is decoded on access
            return parsed
    raise UnsupportedUrl("The URL is not valid.")


def next_url(url: URL, location: str) -> str:
    """Return the target of a redirect, not yet checked. Raises: FetchRefused."""
    if UNSAFE_CHARACTERS.search(location):  # urljoin drops some of them
        raise UnsupportedUrl("The URL leads to one that is not valid.")
    try:
        return urljoin(str(url), location)
    except ValueError:
        raise UnsupportedUrl("The URL leads to one that is not valid.") from None


def is_below(url: URL, prefix: URL) -> bool:
    """Return whether a URL is the prefix or below it, also after decoding or the resolution of dot
    segments."""
    folder = prefix.raw_path.rstrip("/") + "/"
    return (
        origin_of(url) == origin_of(prefix)
        and not is_ambiguous(url.raw_path)
        and f"{url.raw_path}/".startswith(folder)
    )


def origin_of(url: URL) -> tuple[str, str, int | None]:
    """Return the scheme, host and port. All names of the loopback interface are equal."""
    host = (url.host or "").lower()
    return url.scheme, LOOPBACK[0] if host in LOOPBACK else host, url.port


def with_origin(url: URL, origin: URL) -> URL:
    """Return a URL with the same path and query at another origin."""
    return URL.build(
        scheme=origin.scheme,
        authority=origin.raw_authority,
        path=url.raw_path,
        query_string=url.raw_query_string,
        encoded=True,
    )
