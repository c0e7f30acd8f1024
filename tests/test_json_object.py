"""parse_object: JSON objects, and None for everything else."""

import pytest

from falproxy.json_object import parse_object


@pytest.mark.parametrize(
    ("document", "value"),
    [
        pytest.param(b'{"a": [1]}', {"a": [1]}, id="an object"),
        pytest.param("{}", {}, id="an empty object, as text"),
        pytest.param(b"[1]", None, id="a list"),
        pytest.param(b"null", None, id="null"),
        pytest.param(b"", None, id="empty"),
        pytest.param(b"<html>", None, id="markup"),
        pytest.param(b'{"a": "\xff"}', None, id="bytes that are not Unicode"),
        pytest.param(b'{"a":' * 100_000, None, id="nested too deeply"),
    ],
)
def test_only_objects_are_parsed(document: bytes | str, value: object) -> None:
    assert parse_object(document) == value
