"""Schemas on the disk: equal after a restart, shared by processes, limited in size."""

import os
from pathlib import Path

import pytest

from falproxy.fal.keys import KeyPool
from falproxy.fal.model_schema import ModelSchema, parse_document
from falproxy.proxy.model_schemas import RETRY_AFTER, SCHEMA_TTL, SchemaClient, SchemaUnavailable
from falproxy.proxy.upstream import Upstream, open_transport
from falproxy.sandbox.model_metadata import openapi_document
from falproxy.sandbox.models import MODELS
from falproxy.stores import schema_files
from falproxy.stores.schema_files import SchemaFiles, deserialize, serialize
from tests.support.fake_fal import FakeFal
from tests.support.schema_documents import send_503, send_document

DEV = "fal-ai/flux/dev"


def schema_of(endpoint: str) -> ModelSchema:
    schema = parse_document(openapi_document(MODELS[endpoint]), endpoint)
    assert schema is not None
    return schema


@pytest.mark.parametrize("endpoint", sorted(MODELS))
def test_a_schema_is_equal_after_a_restart(endpoint: str) -> None:
    assert deserialize(serialize(schema_of(endpoint))) == schema_of(endpoint)


def test_another_process_reads_the_schema(tmp_path: Path) -> None:
    SchemaFiles(tmp_path / "schemas").save(DEV, schema_of(DEV))
    stored = SchemaFiles(tmp_path / "schemas").load(DEV)
    assert stored is not None
    assert stored[0] == schema_of(DEV)
    assert 0 <= stored[1] < 60
    (file,) = (tmp_path / "schemas").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_sandbox_has_other_schemas(tmp_path: Path) -> None:
    SchemaFiles(tmp_path, "http://127.0.0.1:8081").save(DEV, schema_of(DEV))
    assert SchemaFiles(tmp_path).load(DEV) is None


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="incomplete"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"\xff", id="not UTF-8"),
        pytest.param(b'{"format": 0}', id="another format"),
        pytest.param(b'{"format": 2, "inputs": {"a": {}}}', id="no fields"),
        pytest.param(b"[" * 100_000, id="nested too deeply"),
    ],
)
def test_a_damaged_file_is_no_schema_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    files = SchemaFiles(tmp_path)
    files.save(DEV, schema_of(DEV))
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert files.load(DEV) is None
    files.save(DEV, schema_of(DEV))
    assert files.load(DEV) is not None


def test_a_folder_that_cannot_be_used_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    files = SchemaFiles(tmp_path / "file")
    files.save(DEV, schema_of(DEV))
    assert files.load(DEV) is None


def test_the_oldest_files_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, size = SchemaFiles(tmp_path), len(serialize(schema_of(DEV)))
    monkeypatch.setattr(schema_files, "TOTAL_MAX", 3 * size)
    for number in range(5):
        files.save(f"o/{number}", schema_of(DEV))
        newest = max(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    assert [number for number in range(5) if files.load(f"o/{number}")] == [2, 3, 4]
    assert not [*tmp_path.glob("*.tmp")]


def test_a_schema_that_is_too_large_is_not_stored(tmp_path: Path) -> None:
    large = ModelSchema(dict.fromkeys(map(str, range(5000)), schema_of(DEV).inputs["prompt"]))
    SchemaFiles(tmp_path).save(DEV, large)
    assert [*tmp_path.iterdir()] == []


async def test_a_new_process_fetches_an_old_schema_again_and_uses_it_if_it_must(
    tmp_path: Path, fal: FakeFal
) -> None:
    fal.respond = send_document
    async with open_transport((5.0, 60.0)) as transport:
        next_key = KeyPool(("id:secret",), lambda: 0.0).next_key()
        upstream = Upstream(transport, next_key, origin=fal.origin)
        first = await SchemaClient(files=SchemaFiles(tmp_path)).get_schema(upstream, DEV)
        assert await SchemaClient(files=SchemaFiles(tmp_path)).get_schema(upstream, DEV) == first
        assert len(fal.seen) == 1, "a file that is not older than an hour is current"
        (file,) = tmp_path.iterdir()
        os.utime(file, (0, file.stat().st_mtime - SCHEMA_TTL))
        fal.respond = send_503
        clock = [1000.0]
        client = SchemaClient(files=SchemaFiles(tmp_path), clock=lambda: clock[0])
        for _ in range(2):
            assert await client.get_schema(upstream, DEV) == first
        assert len(fal.seen) == 2, "there is no other attempt until RETRY_AFTER"
        clock[0] += RETRY_AFTER
        fal.respond = send_document
        await client.get_schema(upstream, DEV)
        assert len(fal.seen) == 3
        assert SchemaFiles(tmp_path).load(DEV) is not None


async def test_without_any_schema_fal_is_asked_again_soon(tmp_path: Path, fal: FakeFal) -> None:
    fal.respond = send_503
    clock = [1000.0]
    async with open_transport((5.0, 60.0)) as transport:
        next_key = KeyPool(("id:secret",), lambda: 0.0).next_key()
        upstream = Upstream(transport, next_key, origin=fal.origin)
        client = SchemaClient(files=SchemaFiles(tmp_path), clock=lambda: clock[0])
        for _ in range(2):
            with pytest.raises(SchemaUnavailable):
                await client.get_schema(upstream, DEV)
        assert len(fal.seen) == 1
        clock[0] += 5
        fal.respond = send_document
        assert await client.get_schema(upstream, DEV) is not None
