"""The environment and the `.env` file. Only this module reads them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from falproxy.errors import SettingsError


def read_environment(dotenv: Path = Path(".env")) -> dict[str, str]:
    """Return the process environment, with defaults from a `.env` file.

    Raises: SettingsError, the file cannot be read.
    """
    try:
        if not dotenv.exists():
            return {**os.environ}
        from dotenv import dotenv_values  # imported only if there is a `.env` file

        values = dotenv_values(dotenv)
    except UnicodeDecodeError:
        # Without the cause, which quotes bytes of the file.
        raise SettingsError(f"{dotenv} is not in UTF-8: save it so.") from None
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise SettingsError(
            f"{dotenv} cannot be read ({reason}): give this user the right to read it, or move it "
            "away."
        ) from None
    from_file = {name: value for name, value in values.items() if value is not None}
    return from_file | os.environ


def read_variables(names: Iterable[str]) -> dict[str, str]:
    """Return those of these variables that the process was started with."""
    return {name: os.environ[name] for name in names if name in os.environ}


def check_variable_names(env: Mapping[str, str], known: set[str]) -> None:
    """Raises: SettingsError, a `FALPROXY_` variable is not a setting (it may be misspelled)."""
    for name in sorted(env):
        if name.startswith("FALPROXY_") and name not in known:
            from difflib import get_close_matches  # slow to import, rarely needed

            near = get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SettingsError(f"{name} is no setting of falproxy.{hint}")


def check_key(key: str, name: str) -> None:
    """Raises: SettingsError, the key is empty or cannot be sent in a header.

    The message has the position and the kind of the bad character, never a part of the key.
    """
    for position, character in enumerate(key, start=1):
        if not "!" <= character <= "~" or character in "\"'":
            raise SettingsError(
                f"The {name} has a stray character ({describe_character(character)}) "
                f"at position {position} of {len(key)}."
            )
    if not key:
        raise SettingsError(f"The {name} is empty.")


def describe_character(character: str) -> str:
    """Return the kind of a character, without revealing it."""
    if character in "\"'":
        return "a quote"
    if character.isspace():
        return "white space"
    return "not ASCII" if character > "~" else "a control character"
