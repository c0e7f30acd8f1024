"""Schemas of models on the disk, for the time after a restart in which fal does not respond."""

import json
import logging
import os
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from falproxy.fal.model_schema import InputSchema, ModelSchema
from falproxy.stores.private_files import make_private_folder

logger = logging.getLogger(__name__)

FOLDER = "schemas"  # below FALPROXY_DATA_DIR
FORMAT = 2  # of the files; files of another format are not read
FILE_MAX = 256 * 2**10  # bytes of a file
FLAGS = ("can_stream", "accepts_any_input", "has_files")
TOTAL_MAX, FILES_MAX = 16 * 2**20, 1000  # bytes and number of all files


class SchemaFiles:
    """One file for each model. Several processes may use the folder at once: a file is replaced as
    a whole. A folder that cannot be used is logged, and otherwise ignored. All methods block.

    origin: the server that the schemas are from, if it is not fal. A sandbox has other schemas.
    """

    def __init__(self, folder: Path, origin: str | None = None) -> None:
        self._folder = folder
        self._origin = origin or ""

    def __repr__(self) -> str:
        return f"<SchemaFiles {self._folder}>"

    def load(self, endpoint: str) -> tuple[ModelSchema, float] | None:
        """Return the schema of a model and its age in seconds; None if there is none."""
        try:
            with self._path(endpoint).open("rb") as file:
                written_at = os.fstat(file.fileno()).st_mtime
                content = file.read(FILE_MAX + 1)
            return deserialize(content), max(0.0, time.time() - written_at)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("A stored schema cannot be read: %s", type(error).__name__)
            return None

    def save(self, endpoint: str, schema: ModelSchema) -> None:
        content = serialize(schema)
        if len(content) > FILE_MAX:
            return
        path = self._path(endpoint)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            for folder in (self._folder.parent, self._folder):
                make_private_folder(folder)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content)
            temporary.replace(path)
            self._delete_oldest()
        except OSError as error:
            logger.warning("A schema cannot be stored: %s", error.strerror)
            with suppress(OSError):
                temporary.unlink()

    def _path(self, endpoint: str) -> Path:
        digest = sha256(f"{self._origin}\n{endpoint}".encode()).hexdigest()
        return self._folder / f"{digest}.json"

    def _delete_oldest(self) -> None:
        """Delete the oldest files until the others are within the limits. Raises: OSError."""
        entries = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):  # another process has deleted it
                status = entry.stat(follow_symlinks=False)
                entries.append((status.st_mtime, status.st_size, entry.path))
        entries.sort(reverse=True)
        total = 0
        for index, (_, size, path) in enumerate(entries):
            total += size
            if total > TOTAL_MAX or index >= FILES_MAX:
                with suppress(FileNotFoundError):
                    os.unlink(path)


def serialize(schema: ModelSchema) -> bytes:
    document = {
        "format": FORMAT,
        "inputs": {name: input_to_document(value) for name, value in schema.inputs.items()},
        "required": sorted(schema.required),
        "outputs": sorted(schema.outputs),
        **{name: getattr(schema, name) for name in FLAGS},
    }
    return json.dumps(document).encode()


def input_to_document(schema: InputSchema) -> dict[str, object]:
    """Return the fields that differ from their defaults."""
    fields = {name: getattr(schema, name) for name in InputSchema.__dataclass_fields__}
    fields |= {
        "types": sorted(schema.types),
        "keys": sorted(schema.keys),
        "items": None if schema.items is None else input_to_document(schema.items),
        "properties": {name: input_to_document(value) for name, value in schema.properties.items()},
    }
    return {
        name: value
        for name, value in fields.items()
        if not (value is None or value is False or value in ((), [], {})) or name == "default"
    }


def deserialize(content: bytes) -> ModelSchema:
    """Raises: ValueError, KeyError or TypeError, the file is damaged or of another format."""
    document = json.loads(content)
    if document["format"] != FORMAT:
        raise ValueError("another format")
    inputs = {name: input_from_document(value) for name, value in document["inputs"].items()}
    flags = {name: document[name] for name in FLAGS}
    outputs = frozenset(document["outputs"])
    return ModelSchema(inputs, frozenset(document["required"]), outputs=outputs, **flags)


def input_from_document(fields: dict[str, Any]) -> InputSchema:
    """Raises: KeyError or TypeError."""
    items, properties = fields.get("items"), fields.get("properties", {})
    converted = {
        "types": frozenset(fields.get("types", ())),
        "choices": tuple(fields.get("choices", ())),
        "keys": frozenset(fields.get("keys", ())),
        "items": None if items is None else input_from_document(items),
        "properties": {name: input_from_document(value) for name, value in properties.items()},
    }
    return InputSchema(**{**fields, **converted})
