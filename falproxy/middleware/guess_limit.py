"""Limit for guesses of access keys, by the address of the caller."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from math import ceil

from cachetools import LRUCache

# Refused keys of one address: so many at once, and then one in as many seconds.
BURST, SECONDS_PER_GUESS = 20, 6.0
ADDRESSES_MAX = 10_000
CALLERS_MAX = 10_000
IPV6_PREFIX = 64  # bits; one customer has at least all addresses of such a network


@dataclass(slots=True)
class Allowance:
    """The guesses that an address has left. updated_at: by the clock of the limit."""

    guesses: float
    updated_at: float


class GuessLimit:
    """Counts refused keys by address, in bounded memory.

    For an address without guesses left no key is checked, right or wrong: otherwise the guessing
    would go on. Callers that used their key from this address before are still admitted,
    since many callers can share an address, such as that of a load balancer.

    clock: a monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._allowances: LRUCache[str, Allowance] = LRUCache(ADDRESSES_MAX)
        self._known_callers: LRUCache[tuple[str, str], bool] = LRUCache(CALLERS_MAX)

    def __repr__(self) -> str:
        return f"<GuessLimit {len(self._allowances)} addresses>"

    def seconds_to_wait(self, address: str) -> int:
        """Return the seconds until the address may try a key again; 0 if it may now."""
        allowance = self._refill(network_of(address))
        if allowance is None or allowance.guesses >= 1:
            return 0
        return ceil((1 - allowance.guesses) * SECONDS_PER_GUESS)

    def record_refusal(self, address: str) -> None:
        network = network_of(address)
        allowance = self._refill(network)
        if allowance is None:
            allowance = self._allowances[network] = Allowance(BURST, self._clock())
        allowance.guesses = max(0.0, allowance.guesses - 1)

    def record_success(self, address: str, principal: str) -> None:
        self._known_callers[network_of(address), principal] = True

    def is_known(self, address: str, principal: str) -> bool:
        return (network_of(address), principal) in self._known_callers

    def _refill(self, network: str) -> Allowance | None:
        allowance = self._allowances.get(network)
        if allowance is not None:
            now = self._clock()
            gained = (now - allowance.updated_at) / SECONDS_PER_GUESS
            allowance.guesses = min(float(BURST), allowance.guesses + gained)
            allowance.updated_at = now
        return allowance


@lru_cache(4096)
def network_of(address: str) -> str:
    """Return an IPv4 address, also one inside an IPv6 address, or the network of an IPv6
    address. A text that is no address is returned unchanged."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ip_network((parsed, IPV6_PREFIX), strict=False))
