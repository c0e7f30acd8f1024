"""Which addresses and names of hosts are public, and which can only point inside."""

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from unicodedata import normalize
from urllib.parse import unquote

# `is_global` of `ipaddress` does not do: it says yes to multicast and to 6to4 of 10.0.0.1.
# IANA IPv4 Special-Purpose Address Registry, RFC 5771 (multicast), RFC 1112 (class E).
PRIVATE_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# Global unicast is all of IPv6 that is handed out (RFC 4291). 64::/16 belongs to nobody but for
# the two prefixes of address translation, of which one is below and the other in CARRIERS.
PUBLIC_IPV6 = (IPv6Network("2000::/3"), IPv6Network("64::/16"))
# IANA IPv6 Special-Purpose Address Registry, as far as it is inside the public ranges. 2001::/23
# holds ORCHID and benchmarks, 64:ff9b::/32 translation that a network makes for itself.
PRIVATE_IPV6 = tuple(
    IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "3fff::/20", "64:ff9b::/32")
)
# Prefixes of addresses that lead to IPv4 addresses, and how many bits follow each of those:
# compatible, mapped, translated (RFC 2765), NAT64 (RFC 6052), 6to4 (RFC 3056).
IPV4_EMBEDDING_PREFIXES = (
    (IPv6Network("::/96"), 0),
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("::ffff:0:0:0/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("2002::/16"), 80),
)
# Server and, inverted, client (RFC 4380).
TEREDO = IPv6Network("2001::/32")
# The 32 bits before the IPv4 address, whatever the bits for universal and group (RFC 5214).
ISATAP = 0x00005EFE
ISATAP_MASK = 0xFCFFFFFF
UINT32_MASK = 0xFFFFFFFF

# As inet_aton reads a number: hexadecimal, octal, decimal.
NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
OCTAL = re.compile(r"0[0-7]+")

PRIVATE_NAMES = ("metadata.azure.com", "home.arpa")
# RFC 6761, RFC 6762, RFC 7686, RFC 8375, and what routers and companies make up.
PRIVATE_SUFFIXES = (
    ".corp",
    ".home",
    ".home.arpa",
    ".internal",
    ".intranet",
    ".invalid",
    ".lan",
    ".local",
    ".localdomain",
    ".localhost",
    ".onion",
    ".test",
)


def is_public(address: str | IPv4Address | IPv6Address) -> bool:
    """Whether an address is one on the internet; an IPv6 address that leads to an IPv4 address
    only if that one is too. No for text that is no address, and for one with a zone."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in PRIVATE_IPV4)
    if ip.scope_id is not None or not all(is_public(inner) for inner in embedded_ipv4(ip)):
        return False
    if ip in TEREDO or any(ip in network for network, _ in IPV4_EMBEDDING_PREFIXES):
        return True
    is_inside = any(ip in network for network in PRIVATE_IPV6)
    return not is_inside and any(ip in network for network in PUBLIC_IPV6)


def embedded_ipv4(ip: IPv6Address) -> list[IPv4Address]:
    """The IPv4 addresses that packets to an IPv6 address may end up at."""
    bits = int(ip)
    found = [
        bits >> shift & UINT32_MASK for network, shift in IPV4_EMBEDDING_PREFIXES if ip in network
    ]
    if ip in TEREDO:
        found += [bits >> 64 & UINT32_MASK, ~bits & UINT32_MASK]
    if bits >> 32 & ISATAP_MASK == ISATAP:
        found.append(bits & UINT32_MASK)
    return [IPv4Address(inner) for inner in found]


def parse_host(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a host of a URL means, in any spelling that somebody reads as one: `127.1`
    or `0x7f000001` as inet_aton, brackets, escapes, full-width digits. None for a name."""
    text = normalize_host(host)
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    if ":" not in text:
        return parse_ipv4(text)
    try:
        return IPv6Address(text)
    except ValueError:
        return None


def parse_ipv4(text: str) -> IPv4Address | None:
    """One to four numbers, of which the last one fills the bytes that are left."""
    words = text.split(".")
    numbers = [number for word in words if (number := parse_number(word)) is not None]
    if len(numbers) != len(words) or len(words) > 4:
        return None
    *bytes_before, rest = numbers
    if any(number > 255 for number in bytes_before) or rest >= 256 ** (5 - len(words)):
        return None
    value = sum(number << 24 - 8 * place for place, number in enumerate(bytes_before))
    return IPv4Address(value + rest)


def parse_number(word: str) -> int | None:
    # No number that is part of an address is longer, and Python refuses those of 4300 digits.
    if not NUMBER.fullmatch(word) or len(word) > 64:
        return None
    if word.startswith("0x"):
        return int(word[2:] or "0", 16)
    if OCTAL.fullmatch(word):
        return int(word, 8)
    return None if word.startswith("0") and word != "0" else int(word)


def is_private_name(host: str) -> bool:
    """Whether a name has no meaning outside a network or a machine, so that it can only point
    inside. Names that end in a number are no names at all, and count."""
    name = normalize_host(host)
    return (
        "." not in name
        or name in PRIVATE_NAMES
        or name.endswith(PRIVATE_SUFFIXES)
        or NUMBER.fullmatch(name.rpartition(".")[2]) is not None
    )


def normalize_host(host: str) -> str:
    """A host as resolvers compare it: escapes decoded, full-width forms and the dots of IDNA
    (RFC 3490, section 3.1) made plain, lower case, without the dot at the end."""
    return normalize("NFKC", unquote(host)).replace("\u3002", ".").lower().rstrip(".")
