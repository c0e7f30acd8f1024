"""Addresses of files in a JSON document: which they are, and the same document with others.

A document is read where its addresses stand and nowhere else, so that every other byte of it
stays as it came: the numbers as they were written, the order, the white space.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from falproxy.fal.target import HOST, host_matches, is_ambiguous

# Where fal keeps files. What is there never changes: every file has an address of its own.
FILE_HOSTS = ("fal.media", "*.fal.media")
BUCKET_HOST, BUCKET_PATH = "storage.googleapis.com", "/falserverless/"
FILE_URL = re.compile(
    r"https://(?P<host>[a-z0-9.-]+)(?P<path>/[!$-;=@-\[\]-~]*)(?:\?[!$-\[\]-~]*)?",
    re.IGNORECASE | re.ASCII,
)
URL_KEY = b'"url"'
# What follows the key: an address. Other values, data URIs of megabytes among them, end here.
URL_VALUE = re.compile(rb'\s*:\s*("https?:(?:[^"\\\x00-\x1f]++|\\.)*+")')


class FileLink(NamedTuple):
    """The value of a `url`. start, stop: where it stands in the document, quotes included."""

    start: int
    stop: int
    url: str


def is_fal_file(url: str) -> bool:
    """Whether an address is plainly one of fal's own store of files."""
    parts = FILE_URL.fullmatch(url)
    if parts is None:
        return False
    host = parts["host"].lower()
    if host == BUCKET_HOST:
        return parts["path"].startswith(BUCKET_PATH) and not is_ambiguous(parts["path"])
    return HOST.fullmatch(host) is not None and host_matches(host, FILE_HOSTS)


def find_links(document: bytes) -> Iterator[FileLink]:
    """Every address that stands under the key `url`, at any depth.

    document: JSON, or lines that have JSON in them, as an event stream's.
    """
    at = 0
    while (at := document.find(URL_KEY, at)) >= 0:
        # Inside a string the key's first quote would be escaped.
        value = (
            URL_VALUE.match(document, at + len(URL_KEY)) if document[at - 1 : at] != b"\\" else None
        )
        at += len(URL_KEY)
        if value is not None:
            at = value.end()
            if (url := decode_string(value[1])) is not None:
                yield FileLink(*value.span(1), url)


def distinct_urls(document: bytes) -> list[str]:
    """Each of them once."""
    return [*dict.fromkeys(link.url for link in find_links(document))]


def decode_string(text: bytes) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:  # no JSON, or no UTF-8
        return None
    return value if isinstance(value, str) else None


def replace_links(document: bytes, urls: Mapping[str, str]) -> bytes:
    """The document with the addresses that `urls` has others for, byte for byte the same in
    everything else."""
    pieces, at = [], 0
    for link in find_links(document):
        if (url := urls.get(link.url, link.url)) != link.url:
            pieces += [document[at : link.start], json.dumps(url).encode()]
            at = link.stop
    return b"".join([*pieces, document[at:]]) if pieces else document
