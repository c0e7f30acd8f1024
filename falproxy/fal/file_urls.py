"""Finds and replaces the URLs of files in JSON documents.

Only the URLs are parsed. All other bytes of a document stay unchanged: the spelling of numbers, the
order of keys, and white space.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from falproxy.fal.target import HOST, host_matches, is_ambiguous

# Hosts of fal's files. The bytes of a URL on these hosts never change.
FILE_HOSTS = ("fal.media", "*.fal.media")
BUCKET_HOST, BUCKET_PATH = "storage.googleapis.com", "/falserverless/"
FILE_URL = re.compile(
    r"https://(?P<host>[a-z0-9.-]+)(?P<path>/[!$-;=@-\[\]-~]*)(?:\?[!$-\[\]-~]*)?",
    re.IGNORECASE | re.ASCII,
)
URL_KEY = b'"url"'
# The value of the key, if it is a URL. Other values, such as data URIs of megabytes, do not match.
URL_VALUE = re.compile(rb'\s*:\s*("https?:(?:[^"\\\x00-\x1f]++|\\.)*+")')


class FileLink(NamedTuple):
    """The value of a `url` key. start, stop: its offsets in the document, with the quotes."""

    start: int
    stop: int
    url: str


def is_fal_file(url: str) -> bool:
    """Return whether a URL, in normal form, is one of fal's file storage."""
    parts = FILE_URL.fullmatch(url)
    if parts is None:
        return False
    host = parts["host"].lower()
    if host == BUCKET_HOST:
        return parts["path"].startswith(BUCKET_PATH) and not is_ambiguous(parts["path"])
    return HOST.fullmatch(host) is not None and host_matches(host, FILE_HOSTS)


def find_links(document: bytes) -> Iterator[FileLink]:
    """Iterate over the URLs under the key `url`, at any depth.

    document: JSON, or lines with JSON in them, such as an event stream.
    """
    at = 0
    while (at := document.find(URL_KEY, at)) >= 0:
        # Inside a string, the first quote of the key would be escaped.
        value = (
            URL_VALUE.match(document, at + len(URL_KEY)) if document[at - 1 : at] != b"\\" else None
        )
        at += len(URL_KEY)
        if value is not None:
            at = value.end()
            if (url := decode_string(value[1])) is not None:
                yield FileLink(*value.span(1), url)


def distinct_urls(document: bytes) -> list[str]:
    return [*dict.fromkeys(link.url for link in find_links(document))]


def decode_string(text: bytes) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:  # invalid JSON or invalid UTF-8
        return None
    return value if isinstance(value, str) else None


def replace_links(document: bytes, urls: Mapping[str, str]) -> bytes:
    """Return the document with replaced URLs. urls: from old to new URLs."""
    chunks, offset = [], 0
    for link in find_links(document):
        if (url := urls.get(link.url, link.url)) != link.url:
            chunks += [document[offset : link.start], json.dumps(url).encode()]
            offset = link.stop
    return b"".join([*chunks, document[offset:]]) if chunks else document
