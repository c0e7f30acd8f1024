"""The models and templates of `/api/images/generate`: two tables in TOML, and the user's own."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from falproxy.fal.registry.models import Model, Template, WrongInput

__all__ = ["Model", "Registry", "Template", "WrongInput", "parse_registry", "read_registry"]

SHIPPED = ("models.toml", "templates.toml")


class Tables(BaseModel):
    """A file of the registry."""

    model_config = ConfigDict(extra="forbid")

    models: dict[str, Model] = Field(default_factory=dict)
    templates: dict[str, Template] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Registry:
    """Models and templates by their names."""

    models: Mapping[str, Model]
    templates: Mapping[str, Template]

    def model(self, name: str) -> Model:
        """Raises: WrongInput."""
        if (model := self.models.get(name)) is None:
            known = ", ".join(self.models)
            raise WrongInput(f"There is no model {name!r}. There are {known}.", "model")
        return model


def read_registry(own: Path | None = None) -> Registry:
    """What is shipped, under what the user's file says.

    Raises: ValueError, the user's file is not of the form; OSError, it cannot be read.
    """
    texts = [files(__name__).joinpath(name).read_text("utf-8") for name in SHIPPED]
    return parse_registry(*texts, *([own.read_text("utf-8")] if own is not None else []))


def parse_registry(*texts: str) -> Registry:
    """Later texts win. Raises: ValueError with a sentence."""
    models: dict[str, Model] = {}
    templates: dict[str, Template] = {}
    for text in texts:
        try:
            tables = Tables.model_validate(named(tomllib.loads(text, parse_float=Decimal)))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"is not TOML: {error}") from error
        except ValidationError as error:
            raise ValueError(first_of(error)) from error
        models |= tables.models
        templates |= tables.templates
    for template in templates.values():
        if template.model not in models:
            raise ValueError(f"names a model that is not there: {template.model!r}")
    return Registry(models, templates)


def named(tables: dict[str, object]) -> dict[str, object]:
    """Each table of a model or a template with its name in it."""
    return {
        kind: {
            name: {**table, "name": name} if isinstance(table, dict) else table
            for name, table in group.items()
        }
        if isinstance(group, dict)
        else group
        for kind, group in tables.items()
    }


def first_of(error: ValidationError) -> str:
    """What is wrong first, as a sentence to be read after the file's name."""
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"])
    return f"is wrong at {where}: {found['msg'].lower()}"
