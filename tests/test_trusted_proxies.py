"""The client's address according to proxies that are trusted, and to no others."""

from ipaddress import ip_network

import pytest

from falproxy.trusted_proxies import HOPS_MAX, TrustedProxies, parse_network

LB, CDN, CLIENT, FORGED = "10.0.0.1", "192.0.2.10", "203.0.113.7", "198.51.100.66"
PROXIES = TrustedProxies(
    tuple(map(ip_network, ("10.0.0.0/8", "192.0.2.10", "fd00::/8", "::1", "127.0.0.1")))
)
LONG = ", ".join([LB] * 200)


@pytest.mark.parametrize(
    ("peer", "fields", "client"),
    [
        pytest.param(LB, [], LB, id="no header"),
        pytest.param(LB, [CLIENT], CLIENT, id="one proxy"),
        pytest.param(CLIENT, [FORGED], CLIENT, id="a client without a proxy is not believed"),
        pytest.param(LB, [f"{FORGED}, {CLIENT}"], CLIENT, id="what the client sent is left of it"),
        pytest.param(LB, [f"{CLIENT}, {CDN}"], CLIENT, id="two proxies"),
        pytest.param(LB, [f"{FORGED},{CLIENT},{CDN}"], CLIENT, id="two proxies, and a forgery"),
        pytest.param(LB, [f"{LB}, {FORGED}, {CLIENT}"], CLIENT, id="a forged trusted entry"),
        pytest.param(LB, [FORGED, CLIENT], CLIENT, id="two headers"),
        pytest.param(LB, [f"{FORGED}, {CLIENT}", CDN], CLIENT, id="two headers, two proxies"),
        pytest.param(LB, [CLIENT, FORGED], FORGED, id="the last header is the proxy's"),
        pytest.param(LB, ["10.1.1.1, 10.2.2.2"], "10.1.1.1", id="all trusted: the farthest"),
        pytest.param(LB, [f"{CLIENT}:51234"], CLIENT, id="port"),
        pytest.param(LB, ["[2001:db8::7]:51234"], "2001:db8::7", id="IPv6 with port"),
        pytest.param(LB, ["[2001:db8::7]"], "2001:db8::7", id="IPv6 in brackets"),
        pytest.param(LB, ["2001:DB8:0::7"], "2001:db8::7", id="IPv6, written differently"),
        pytest.param(LB, ['"[2001:db8::7]:80"'], "2001:db8::7", id="quoted"),
        pytest.param(LB, ["fe80::7%eth0"], "fe80::7", id="zone"),
        pytest.param(LB, ["::ffff:203.0.113.7"], CLIENT, id="IPv4 inside IPv6"),
        pytest.param("::ffff:10.0.0.1", [CLIENT], CLIENT, id="a peer on a socket of both families"),
        pytest.param("fd00::2", [f"{CLIENT}, ::1"], CLIENT, id="IPv6 proxies"),
        pytest.param("::1", [CLIENT], CLIENT, id="single IPv6 address"),
        pytest.param("::2", [CLIENT], "::2", id="its neighbor"),
        pytest.param("192.0.2.11", [CLIENT], "192.0.2.11", id="neighbor of an address"),
        pytest.param("11.0.0.1", [CLIENT], "11.0.0.1", id="neighbor of a network"),
        pytest.param(LB, [f"{FORGED}, unknown"], LB, id="unknown"),
        pytest.param(LB, [f"{FORGED}, _hidden"], LB, id="obfuscated"),
        pytest.param(LB, [f"{FORGED}, "], LB, id="empty entry"),
        pytest.param(LB, [""], LB, id="empty header"),
        pytest.param(LB, [f"{FORGED},,{CDN}"], CDN, id="empty entry further left"),
        pytest.param(LB, [f"{FORGED}, 203.0.113.7.example.com"], LB, id="name"),
        pytest.param(LB, [f"{FORGED}, 203.0.113.007"], LB, id="leading zeros"),
        pytest.param(LB, [f"{FORGED}, 3405803783"], LB, id="number"),
        pytest.param(LB, [f"{FORGED}, 0xcb007107"], LB, id="hexadecimal"),
        pytest.param(LB, [f"{FORGED}, 203.0.113.7/32"], LB, id="network"),
        pytest.param(LB, [f"{FORGED}, 203.0.113.7:port"], LB, id="port that is no number"),
        pytest.param(LB, [f"{FORGED}, [203.0.113.7"], LB, id="bracket without its pair"),
        pytest.param(LB, [f'{FORGED}, 203.0.113.7", "x": "'], LB, id="JSON"),
        pytest.param(LB, [f"{FORGED}, 203.0.113.7\x1b[2J"], LB, id="control characters"),
        pytest.param(LB, [f"{FORGED}, {'1' * 5000}"], LB, id="long entry"),
        pytest.param(LB, [f"{FORGED}, \uff12\uff10\uff13.0.113.7"], LB, id="wide digits"),
        pytest.param(LB, [f"{FORGED}, 203.0.113.\udc80"], LB, id="bytes that are not UTF-8"),
        pytest.param(LB, [f"{FORGED}, {LONG}"], LB, id="more hops than there can be"),
        pytest.param("", [CLIENT], "", id="Unix socket"),
    ],
)
def test_the_client_is_the_last_address_that_is_not_trusted(
    peer: str, fields: list[str], client: str
) -> None:
    assert PROXIES.client_address(peer, fields) == client


def test_without_trusted_proxies_no_header_is_believed() -> None:
    assert TrustedProxies().client_address(LB, [CLIENT]) == LB
    assert not TrustedProxies()


@pytest.mark.parametrize(
    ("hops", "client"),
    [(HOPS_MAX - 1, CLIENT), (HOPS_MAX, LB)],
)
def test_the_number_of_hops_is_limited(hops: int, client: str) -> None:
    assert PROXIES.client_address(LB, [", ".join([CLIENT, *[LB] * hops])]) == client


def test_the_same_proxies_are_equal_for_the_cache() -> None:
    others = TrustedProxies((ip_network("192.0.2.0/24"),))
    assert others.client_address(LB, [CLIENT]) == LB
    assert PROXIES.client_address(LB, [CLIENT]) == CLIENT


@pytest.mark.parametrize(
    "text", ["0.0.0.0/0", "::/0", "10.0.0.1/8", "10.0.0.0/33", "*", "localhost", "::ffff:10.0.0.1"]
)
def test_other_networks_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"contains all|host bits|IPv4 network as IPv6|not appear|not permitted"
    ):
        parse_network(text)
