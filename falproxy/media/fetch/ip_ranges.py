"""Tells public IP addresses and host names from private ones."""

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
# Global unicast is all of IPv6 that is allocated (RFC 4291). 64::/16 is unallocated except for the
# two prefixes of address translation, in PRIVATE_IPV6 and in IPV4_EMBEDDING_PREFIXES.
PUBLIC_IPV6 = (IPv6Network("2000::/3"), IPv6Network("64::/16"))
# IANA IPv6 Special-Purpose Address Registry, as far as it is inside the public ranges. 2001::/23
# has ORCHID and benchmarks, 64:ff9b::/32 the local-use translation prefix.
PRIVATE_IPV6 = tuple(
    IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "3fff::/20", "64:ff9b::/32")
)
# Prefixes of IPv6 addresses that contain an IPv4 address, and the number of bits after it:
# compatible, mapped, translated (RFC 2765), NAT64 (RFC 6052), 6to4 (RFC 3056).
IPV4_EMBEDDING_PREFIXES = (
    (IPv6Network("::/96"), 0),
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("::ffff:0:0:0/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("2002::/16"), 80),
)
# Contains the IPv4 addresses of the server and, inverted, of the client (RFC 4380).
TEREDO = IPv6Network("2001::/32")
# The 32 bits before the IPv4 address, without the bits for universal and group (RFC 5214).
ISATAP = 0x00005EFE
ISATAP_MASK = 0xFCFFFFFF
UINT32_MASK = 0xFFFFFFFF

# Numbers as inet_aton parses them: hexadecimal, octal, decimal.
NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
OCTAL = re.compile(r"0[0-7]+")

PRIVATE_NAMES = ("metadata.azure.com", "home.arpa")
# RFC 6761, RFC 6762, RFC 7686, RFC 8375, and names that routers and companies use.
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
    """Return whether an IP address is on the public internet. An IPv6 address that contains an IPv4
    address is public only if that one is too. False for invalid text and for scoped addresses."""
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
    is_private = any(ip in network for network in PRIVATE_IPV6)
    return not is_private and any(ip in network for network in PUBLIC_IPV6)


def embedded_ipv4(ip: IPv6Address) -> list[IPv4Address]:
    """Return the IPv4 addresses to which packets for an IPv6 address may be translated."""
    bits = int(ip)
    addresses = [
        bits >> shift & UINT32_MASK for network, shift in IPV4_EMBEDDING_PREFIXES if ip in network
    ]
    if ip in TEREDO:
        addresses += [bits >> 64 & UINT32_MASK, ~bits & UINT32_MASK]
    if bits >> 32 & ISATAP_MASK == ISATAP:
        addresses.append(bits & UINT32_MASK)
    return [IPv4Address(address) for address in addresses]


def parse_host(host: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address of a URL's host, or None for a name. Accepts every spelling that some
    parser accepts: `127.1` or `0x7f000001` (inet_aton), brackets, escapes, full-width digits."""
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
    """Parse one to four numbers, of which the last one fills the remaining bytes."""
    parts = text.split(".")
    numbers = [number for part in parts if (number := parse_number(part)) is not None]
    if len(numbers) != len(parts) or len(parts) > 4:
        return None
    *leading, last = numbers
    if any(number > 255 for number in leading) or last >= 256 ** (5 - len(parts)):
        return None
    value = sum(number << 24 - 8 * index for index, number in enumerate(leading))
    return IPv4Address(value + last)


def parse_number(text: str) -> int | None:
    # No number of an address is longer, and Python refuses those of 4300 digits.
    if not NUMBER.fullmatch(text) or len(text) > 64:
        return None
    if text.startswith("0x"):
        return int(text[2:] or "0", 16)
    if OCTAL.fullmatch(text):
        return int(text, 8)
    return None if text.startswith("0") and text != "0" else int(text)


def is_private_name(host: str) -> bool:
    """Return whether a host name has a meaning only inside a network or a machine. True as well for
    names that end in a number, which are malformed IP addresses."""
    name = normalize_host(host)
    return (
        "." not in name
        or name in PRIVATE_NAMES
        or name.endswith(PRIVATE_SUFFIXES)
        or NUMBER.fullmatch(name.rpartition(".")[2]) is not None
    )


def normalize_host(host: str) -> str:
    """Return a host in the form that resolvers compare: escapes decoded, full-width forms and the
    dots of IDNA (RFC 3490, section 3.1) as ASCII, lower case, without the final dot."""
    return normalize("NFKC", unquote(host)).replace("\u3002", ".").lower().rstrip(".")
