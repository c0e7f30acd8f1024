"""Fields of settings that are read from environment variables."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, field, fields
from typing import Any

from falproxy.errors import SettingsError
from falproxy.parsers import check_text

NO_FALLBACKS: Mapping[str, Callable[[str], object]] = {}


def setting(
    variable: str,
    parse: Callable[[str], object],
    default: object,
    help: str,
    *,
    secret: bool = False,
    fallbacks: Mapping[str, Callable[[str], object]] = NO_FALLBACKS,
) -> Any:
    """Define a field that is read from an environment variable.

    parse: converts the variable's text to the field's value; raises ValueError with a message that
        continues a sentence after the variable's name.
    help: meaning of the setting, as in the table of docs/configuration.md.
    secret: keep the value out of the repr.
    fallbacks: variables that are read if this one is not set, each with its parser.
    """
    variables = {variable: parse, **fallbacks}
    metadata = {"variable": variable, "variables": variables, "help": help}
    return field(default=default, repr=not secret, metadata=metadata)


def setting_fields(group: type) -> Iterator["Field[Any]"]:
    return (group_field for group_field in fields(group) if group_field.metadata)


def read_group(group: type, env: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a group's fields whose variables are set and not empty.

    Raises: SettingsError, a value is invalid.
    """
    values: dict[str, Any] = {}
    for group_field in setting_fields(group):
        variables = group_field.metadata["variables"]
        variable = next((name for name in variables if env.get(name)), None)
        if variable is not None:
            try:
                check_text(env[variable])
                values[group_field.name] = variables[variable](env[variable])
            except ValueError as error:
                raise SettingsError(f"{variable} {error}.") from None
    return values
