"""Private and public addresses: the union of the tables of other proxies."""

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falproxy.media.fetch.ip_ranges import is_private_name, is_public, parse_host


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("8.8.8.8", id="a public resolver"),
        pytest.param("1.1.1.1", id="another one"),
        pytest.param("9.255.255.255", id="below 10/8"),
        pytest.param("11.0.0.0", id="above 10/8"),
        pytest.param("100.63.255.255", id="below the addresses of carriers"),
        pytest.param("100.128.0.0", id="above the addresses of carriers"),
        pytest.param("126.255.255.255", id="below loopback"),
        pytest.param("128.0.0.0", id="above loopback"),
        pytest.param("169.253.255.255", id="below link-local"),
        pytest.param("169.255.0.0", id="above link-local"),
        pytest.param("172.15.255.255", id="below 172.16/12"),
        pytest.param("172.32.0.0", id="above 172.16/12"),
        pytest.param("192.0.1.0", id="between protocols and documentation"),
        pytest.param("192.167.255.255", id="below 192.168/16"),
        pytest.param("192.169.0.0", id="above 192.168/16"),
        pytest.param("198.17.255.255", id="below benchmarks"),
        pytest.param("198.20.0.0", id="above benchmarks"),
        pytest.param("223.255.255.255", id="below multicast"),
        pytest.param("2001:4860:4860::8888", id="a public resolver in IPv6"),
        pytest.param("2606:4700:4700::1111", id="another one in IPv6"),
        pytest.param("2001:200::1", id="above the protocols of IPv6"),
        pytest.param("64:ff9c::1", id="beside NAT64"),
        pytest.param("::ffff:8.8.8.8", id="mapped, public"),
        pytest.param("::8.8.8.8", id="compatible, public"),
        pytest.param("64:ff9b::808:808", id="NAT64, public"),
        pytest.param("2002:808:808::1", id="6to4, public"),
        pytest.param("2001:0:808:808::f7f7:f7f7", id="Teredo, server and client public"),
        pytest.param("2600::200:5efe:8.8.8.8", id="ISATAP, public"),
    ],
)
def test_an_address_on_the_internet_is_public(address: str) -> None:
    assert is_public(address)
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("0.0.0.0", id="this host"),
        pytest.param("0.255.255.255", id="this network"),
        pytest.param("10.0.0.0", id="10/8, first"),
        pytest.param("10.255.255.255", id="10/8, last"),
        pytest.param("100.64.0.0", id="carriers, first"),
        pytest.param("100.127.255.255", id="carriers, last"),
        pytest.param("100.100.100.200", id="a cloud's metadata among carriers"),
        pytest.param("127.0.0.1", id="loopback"),
        pytest.param("127.255.255.255", id="loopback, last"),
        pytest.param("169.254.169.254", id="metadata of most clouds"),
        pytest.param("169.254.170.2", id="metadata of containers"),
        pytest.param("172.16.0.0", id="172.16/12, first"),
        pytest.param("172.31.255.255", id="172.16/12, last"),
        pytest.param("192.0.0.192", id="protocols, where a cloud has its metadata"),
        pytest.param("192.0.2.1", id="documentation"),
        pytest.param("192.88.99.1", id="relays of 6to4"),
        pytest.param("192.168.0.0", id="192.168/16, first"),
        pytest.param("192.168.255.255", id="192.168/16, last"),
        pytest.param("198.18.0.0", id="benchmarks, first"),
        pytest.param("198.19.255.255", id="benchmarks, last"),
        pytest.param("198.51.100.1", id="documentation, second"),
        pytest.param("203.0.113.1", id="documentation, third"),
        pytest.param("224.0.0.1", id="multicast, which ipaddress calls global"),
        pytest.param("239.255.255.255", id="multicast, last"),
        pytest.param("240.0.0.1", id="class E"),
        pytest.param("255.255.255.255", id="broadcast"),
        pytest.param("::", id="any"),
        pytest.param("::1", id="loopback in IPv6"),
        pytest.param("fe80::1", id="link-local in IPv6"),
        pytest.param("febf::1", id="link-local in IPv6, last"),
        pytest.param("fe80::1%eth0", id="a zone"),
        pytest.param("2606:4700:4700::1111%1", id="a zone on a public address"),
        pytest.param("fec0::1", id="site-local, which ipaddress calls global"),
        pytest.param("fc00::1", id="unique local"),
        pytest.param("fd00:ec2::254", id="metadata in IPv6"),
        pytest.param("ff02::2", id="all routers"),
        pytest.param("ff0e::1", id="multicast of global scope"),
        pytest.param("2001:db8::1", id="documentation in IPv6"),
        pytest.param("3fff::1", id="documentation in IPv6, second"),
        pytest.param("2001:10::1", id="ORCHID"),
        pytest.param("2001:20::1", id="ORCHID, second"),
        pytest.param("2001:2::1", id="benchmarks in IPv6"),
        pytest.param("100::1", id="discard"),
        pytest.param("5f00::1", id="segment routing"),
        pytest.param("200::1", id="outside of global unicast, below"),
        pytest.param("4000::1", id="outside of global unicast, above"),
        pytest.param("::ffff:10.0.0.1", id="mapped"),
        pytest.param("::ffff:7f00:1", id="mapped, in hexadecimal"),
        pytest.param("::ffff:0:10.0.0.1", id="translated"),
        pytest.param("::10.0.0.1", id="compatible, which ipaddress calls global"),
        pytest.param("64:ff9b::a00:1", id="NAT64"),
        pytest.param("64:ff9b::169.254.169.254", id="metadata behind NAT64"),
        pytest.param("64:ff9b:1::808:808", id="NAT64 of a local network"),
        pytest.param("64:ff9b:0:0:1::1", id="between the two kinds of NAT64"),
        pytest.param("2002:a00:1::", id="6to4, which ipaddress calls global"),
        pytest.param("2002:7f00:1::1", id="6to4 of loopback"),
        pytest.param("2001:0:a00:1::f7f7:f7f7", id="Teredo with a private server"),
        pytest.param("2001:0:808:808::f5ff:fffe", id="Teredo with a private client"),
        pytest.param("2600::5efe:10.0.0.1", id="ISATAP"),
        pytest.param("2600::200:5efe:10.0.0.1", id="ISATAP, marked as universal"),
        pytest.param("2600::300:5efe:10.0.0.1", id="ISATAP, marked as universal and group"),
        pytest.param("localhost", id="no address"),
        pytest.param("", id="nothing"),
    ],
)
def test_any_other_address_is_not_public(address: str) -> None:
    assert not is_public(address)


@given(st.integers(0, 2**32 - 1))
def test_an_embedded_ipv4_address_decides_about_an_ipv6_address(number: int) -> None:
    inner = IPv4Address(number)
    nat64 = IPv6Address(int(IPv6Address("64:ff9b::")) + number)
    mapped = IPv6Address(f"::ffff:{inner}")
    assert is_public(inner) is is_public(nat64) is is_public(mapped)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        pytest.param("127.0.0.1", "127.0.0.1", id="plain"),
        pytest.param("2130706433", "127.0.0.1", id="one number"),
        pytest.param("0x7f000001", "127.0.0.1", id="one hexadecimal number"),
        pytest.param("0X7F000001", "127.0.0.1", id="in capitals"),
        pytest.param("017700000001", "127.0.0.1", id="one octal number"),
        pytest.param("0177.0.0.1", "127.0.0.1", id="octal"),
        pytest.param("00000177.0.0.1", "127.0.0.1", id="octal with many zeros"),
        pytest.param("0x7f.0.0.1", "127.0.0.1", id="hexadecimal"),
        pytest.param("0x7f.1", "127.0.0.1", id="hexadecimal and short"),
        pytest.param("127.1", "127.0.0.1", id="two numbers"),
        pytest.param("127.0.1", "127.0.0.1", id="three numbers"),
        pytest.param("192.168.257", "192.168.1.1", id="the last number fills two bytes"),
        pytest.param("127.0.0.1.", "127.0.0.1", id="a dot at the end"),
        pytest.param("0", "0.0.0.0", id="zero"),
        pytest.param("0x", "0.0.0.0", id="hexadecimal without a digit"),
        pytest.param("[::1]", "::1", id="in brackets"),
        pytest.param("::1", "::1", id="IPv6 without brackets"),
        pytest.param("[::ffff:7f00:1]", "::ffff:7f00:1", id="mapped"),
        pytest.param("[fe80::1%25eth0]", "fe80::1%eth0", id="a zone"),
        pytest.param("%31%32%37.0.0.1", "127.0.0.1", id="escapes"),
        pytest.param("127%2e0%2E0%2e1", "127.0.0.1", id="escaped dots"),
        pytest.param("１２７.０.０.１", "127.0.0.1", id="full-width digits"),  # noqa: RUF001
        pytest.param("①②⑦.0.0.1", "127.0.0.1", id="digits in circles"),
        pytest.param("127。0。0。1", "127.0.0.1", id="dots of IDNA"),
        pytest.param("127．0．0．1", "127.0.0.1", id="full-width dots"),  # noqa: RUF001
        pytest.param("8.8.8.8", "8.8.8.8", id="a public one"),
    ],
)
def test_an_address_is_parsed_in_any_spelling(host: str, address: str) -> None:
    assert parse_host(host) == ip_address(address)


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("images.example", id="a name"),
        pytest.param("127.0.0.1.example", id="a name that starts like an address"),
        pytest.param("256.0.0.1", id="a number too large"),
        pytest.param("4294967296", id="one number too large"),
        pytest.param("127.0.0.0x100000000", id="the last number too large"),
        pytest.param("1.2.3.4.5", id="five numbers"),
        pytest.param("1..2", id="an empty part"),
        pytest.param("08.0.0.1", id="no octal number"),
        pytest.param("9" * 5000, id="very many digits"),
        pytest.param("[::1", id="half a bracket"),
        pytest.param("[:::1]", id="broken IPv6"),
        pytest.param("", id="nothing"),
    ],
)
def test_names_are_not_addresses(host: str) -> None:
    assert parse_host(host) is None


@given(st.integers(0, 2**32 - 1))
def test_all_spellings_of_an_address_are_equal(number: int) -> None:
    address = IPv4Address(number)
    first, *_, last = str(address).split(".")
    spellings = [str(number), hex(number), f"0{number:o}", str(address), f"{address}."]
    spellings.append(f"{first}.{number & 0xFFFFFF}")
    spellings.append(".".join(hex(int(part)) for part in str(address).split(".")))
    assert {parse_host(spelling) for spelling in spellings} == {address}
    assert int(last) == number & 0xFF


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("localhost", id="this machine"),
        pytest.param("LOCALHOST", id="capitals"),
        pytest.param("localhost.", id="a dot at the end"),
        pytest.param("localhost..", id="two dots at the end"),
        pytest.param("%6cocalhost", id="an escape"),
        pytest.param("ｌｏｃａｌｈｏｓｔ", id="full-width letters"),  # noqa: RUF001
        pytest.param("app.localhost", id="below localhost"),
        pytest.param("localhost.localdomain", id="localhost of old systems"),
        pytest.param("metadata", id="metadata"),
        pytest.param("metadata.google.internal", id="Google's metadata"),
        pytest.param("Metadata.Google.Internal.", id="Google's metadata, spelled otherwise"),
        pytest.param("metadata.azure.com", id="Azure's metadata"),
        pytest.param("instance-data", id="Amazon's metadata"),
        pytest.param("instance-data.ec2.internal", id="Amazon's metadata, in full"),
        pytest.param("redis", id="a service of a compose file"),
        pytest.param("host.docker.internal", id="the host of a container"),
        pytest.param("printer.local", id="multicast DNS"),
        pytest.param("kubernetes.default.svc.cluster.local", id="a cluster"),
        pytest.param("db.internal", id="internal"),
        pytest.param("nas.lan", id="lan"),
        pytest.param("wiki.corp", id="corp"),
        pytest.param("router.home", id="home"),
        pytest.param("router.home.arpa", id="home.arpa"),
        pytest.param("home.arpa", id="home.arpa itself"),
        pytest.param("wiki.intranet", id="intranet"),
        pytest.param("expyuzz4wqqyqhjn.onion", id="onion"),
        pytest.param("a.test", id="test"),
        pytest.param("a.invalid", id="invalid"),
        pytest.param("256.0.0.1", id="a name that ends in a number"),
        pytest.param("a.0x7f", id="a name that ends in a hexadecimal number"),
        pytest.param("", id="nothing"),
    ],
)
def test_a_name_is_private(host: str) -> None:
    assert is_private_name(host)


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("v3.fal.media", id="fal's files"),
        pytest.param("localhost.example", id="localhost is not the end"),
        pytest.param("notlocal.example", id="another ending"),
        pytest.param("thelocal.se", id="no label of its own"),
        pytest.param("mylan.com", id="the same letters without the dot"),
        pytest.param("metadata.example", id="a public name that starts like a private one"),
        pytest.param("例え.jp", id="letters of another alphabet"),
        pytest.param("1.example", id="a number that is not the end"),
    ],
)
def test_a_name_is_public(host: str) -> None:
    assert not is_private_name(host)
