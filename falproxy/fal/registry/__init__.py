"""The registry of models and templates of `/api/images/generate`, read from TOML files."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from falproxy.fal.registry.models import InvalidInputError, Kind, RegistryModel, Template

__all__ = [
    "InvalidInputError",
    "Kind",
    "Registry",
    "RegistryModel",
    "Template",
    "parse_registry",
    "read_registry",
]

BUILTIN_FILES = ("models.toml", "media_models.toml", "templates.toml")


class RegistryFile(BaseModel):
    """The content of one TOML file."""

    model_config = ConfigDict(extra="forbid")

    models: dict[str, RegistryModel] = Field(default_factory=dict)
    templates: dict[str, Template] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Registry:
    """Models and templates by their names."""

    models: Mapping[str, RegistryModel]
    templates: Mapping[str, Template]

    def model(self, name: str) -> RegistryModel:
        """Raises: InvalidInputError."""
        if (model := self.models.get(name)) is None:
            names = ", ".join(self.models)
            raise InvalidInputError(f"There is no model {name!r}. There are {names}.", "model")
        return model

    def model_at(self, name: str, endpoint: str) -> RegistryModel | None:
        """Return the model with a name, or that of its variants which has the endpoint; None if
        there is no such model any more."""
        if (model := self.models.get(name)) is None:
            return None
        return next((each for each in model.variants if each.endpoint == endpoint), model)


EMPTY_REGISTRY = Registry({}, {})


def read_registry(user_file: Path | None = None) -> Registry:
    """Return the built-in models and templates, together with those of the user's file.

    Raises: ValueError, the user's file is invalid; OSError, it cannot be read.
    """
    if user_file is None:
        return builtin_registry()
    return parse_registry(user_file.read_text("utf-8"), base=builtin_registry())


@cache
def builtin_registry() -> Registry:
    texts = [files(__name__).joinpath(name).read_text("utf-8") for name in BUILTIN_FILES]
    return parse_registry(*texts)


def parse_registry(*texts: str, base: Registry = EMPTY_REGISTRY) -> Registry:
    """Return the entries of TOML texts, added to those of `base`. Later ones replace those with
    the same name.

    Raises: ValueError, with a message that continues a sentence after the file's name.
    """
    models, templates = {**base.models}, {**base.templates}
    for text in texts:
        try:
            tables = RegistryFile.model_validate(
                add_names(tomllib.loads(text, parse_float=Decimal))
            )
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"is not TOML: {error}") from error
        except ValidationError as error:
            raise ValueError(describe_first_error(error)) from error
        models |= tables.models
        templates |= tables.templates
    for template in templates.values():
        if template.model not in models:
            raise ValueError(f"names a model that is not there: {template.model!r}")
    return Registry(models, templates)


def add_names(tables: dict[str, object]) -> dict[str, object]:
    """Return the tables with the name of each model and template added as `name`."""
    return {
        kind: {name: add_name(name, table) for name, table in group.items()}
        if isinstance(group, dict)
        else group
        for kind, group in tables.items()
    }


def add_name(name: str, table: object) -> object:
    """Return a table with its name, which is also that of its variants, as is its kind."""
    if not isinstance(table, dict):
        return table
    variants = table.get("variants")
    if isinstance(variants, list):
        kind = {"kind": table["kind"]} if "kind" in table else {}
        table = {**table, "variants": [add_name(name, with_kind(each, kind)) for each in variants]}
    return {**table, "name": name}


def with_kind(table: object, kind: Mapping[str, object]) -> object:
    return {**kind, **table} if isinstance(table, dict) else table


def describe_first_error(error: ValidationError) -> str:
    """Return a message that continues a sentence after the file's name."""
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    return f"is wrong at {location}: {first['msg'].lower()}"
