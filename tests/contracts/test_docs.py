"""The README's table of settings agrees with the code, and the changelog has its section."""

import re
from pathlib import Path

from falproxy.settings import KEY_VARIABLES, KIB, MIB, variables

# | `FALPROXY_PORT` | `8080` | port to listen on |
ROW = re.compile(r"^\| `([A-Z][A-Z0-9_]*)` \| *(.*?) *\| *(.*?) *\|$", re.MULTILINE)
DAY = 86400.0  # seconds
Row = tuple[str, str, str]  # variable, default, meaning


def rows_of_code() -> list[Row]:
    keys = [(variable, "", meaning) for variable, meaning in KEY_VARIABLES.items()]
    settings = [
        (variable, format_default(field.default), field.metadata["help"])
        for variable, field in variables().items()
    ]
    return keys + settings


def rows_of_readme(root: Path) -> list[Row]:
    section = (root / "README.md").read_text().partition("\n## Settings\n")[2]
    return ROW.findall(section.partition("\n## ")[0])


def format_default(default: object) -> str:
    """Return a default as a user would type it."""
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return f"`{int(default)}`"
    for unit, letter in ((MIB, "M"), (KIB, "K")):
        if isinstance(default, int) and default >= unit and default % unit == 0:
            return f"`{default // unit}{letter}`"
    if isinstance(default, tuple):
        items = [":".join(item) if isinstance(item, tuple) else item for item in default]
        return f"`{','.join(items)}`"
    if isinstance(default, float) and default % DAY == 0:
        return f"`{default / DAY:g}d`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_the_readme_has_one_row_for_each_variable(root: Path) -> None:
    documented = [variable for variable, _, _ in rows_of_readme(root)]
    assert sorted(documented) == sorted(variable for variable, _, _ in rows_of_code())


def test_the_readme_has_the_defaults_and_the_meanings_of_the_code(root: Path) -> None:
    documented = {variable: row for variable, *row in rows_of_readme(root)}
    for variable, *row in rows_of_code():
        assert documented[variable] == row, variable


def test_the_changelog_has_an_unreleased_section(root: Path) -> None:
    assert "\n## [Unreleased]\n" in (root / "CHANGELOG.md").read_text()


def test_the_security_policy_has_the_sections_that_people_search_for(root: Path) -> None:
    text = (root / "SECURITY.md").read_text()
    for heading in ("Reporting a vulnerability", "Supported versions", "Threat model"):
        assert f"\n## {heading}\n" in text
    assert "@" not in text, "a report is private on the repository's host, not a mail"
    assert "(SECURITY.md)" in (root / "README.md").read_text()


def test_the_settings_in_the_security_policy_exist(root: Path) -> None:
    used = re.findall(r"FALPROXY_[A-Z_]+", (root / "SECURITY.md").read_text())
    assert {*used} <= {*variables()}
