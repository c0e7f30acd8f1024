"""The address of a client behind proxies that report it in `X-Forwarded-For`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

HOPS_MAX = 32  # proxies between a client and this one
ENTRY_MAX = 64  # characters of an address with its port
# An address as proxies write it: with a port, in brackets, quoted as in `Forwarded` (RFC 7239).
ENTRY = re.compile(r'"?(?:\[(?P<ipv6>[^\[\]]+)\]|(?P<ipv4>[\d.]+))(?::\d{1,5})?"?', re.ASCII)
CACHED_LENGTH_MAX = 256  # characters of the fields of a request whose address is cached
CACHE_SIZE = 1024


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """The proxies in front of this one whose reports are believed."""

    networks: tuple[Network, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.networks)

    def trusts(self, address: str) -> bool:
        """Return whether an address is that of a trusted proxy."""
        parsed = parse_address(address)
        return parsed is not None and self._contains(parsed)

    def client_address(self, peer: str, fields: Sequence[str]) -> str:
        """Return the address of the client: the last one that is not a trusted proxy.

        Each proxy appends the address that it was connected from, so the list is read from its
        end. Nothing before the first untrusted address is believed: the client may have sent it.
        An entry that is no address counts as unknown; the proxy that reported it stands for it.

        peer: the address that the connection comes from.
        fields: the values of all `X-Forwarded-For` headers, in their order.
        """
        if not self.networks or not fields:
            return peer
        if sum(map(len, fields)) > CACHED_LENGTH_MAX:
            return find_client(self, peer, tuple(fields))
        return find_client_cached(self, peer, tuple(fields))

    def _contains(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


def find_client(proxies: TrustedProxies, peer: str, fields: tuple[str, ...]) -> str:
    client = peer
    entries = ",".join(fields).rsplit(",", HOPS_MAX)
    # Without its first element, which holds all further ones, a longer list has HOPS_MAX entries.
    for entry in reversed(entries[-HOPS_MAX:]):
        if not proxies.trusts(client):
            break
        address = parse_entry(entry)
        if address is None:
            break
        client = str(address)
    return client


find_client_cached = lru_cache(CACHE_SIZE)(find_client)


def parse_entry(text: str) -> Address | None:
    """Return the address in an entry of `X-Forwarded-For`, None if there is none."""
    entry = text.strip(" \t")
    if len(entry) > ENTRY_MAX:
        return None
    if match := ENTRY.fullmatch(entry):
        entry = match["ipv6"] or match["ipv4"]
    return parse_address(entry)


def parse_address(text: str) -> Address | None:
    """Return an address without its zone; an IPv4 address inside an IPv6 one as IPv4. None if the
    text is no address."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_network(text: str) -> Network:
    """Parse an address or a network, such as `10.0.0.0/8`. Raises: ValueError."""
    network = ip_network(text)
    if network.prefixlen == 0:
        raise ValueError("contains all addresses")
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise ValueError("is an IPv4 network as IPv6")
    return network
