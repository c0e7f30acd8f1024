"""The README says what the code does: every setting, every example."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

from falproxy import Settings
from falproxy.settings import MIB

# | `FALPROXY_PORT` | `8080` | what it is |
ROW = re.compile(r"^\| `([A-Z]+_[A-Z_]+)`[^|]*\| *(.*?) *\|", re.MULTILINE)
VARIABLE = re.compile(r'"([A-Z]+_[A-Z_]+)": \("(\w+)"')
KEYS = {"FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET"}


def read_by_code(root: Path) -> dict[str, str]:
    """Environment variable → field, as `from_env` has them."""
    return dict(VARIABLE.findall((root / "falproxy/settings.py").read_text()))


def documented(root: Path) -> dict[str, str]:
    """Environment variable → default, as the README's table has them."""
    return dict(ROW.findall((root / "README.md").read_text()))


def test_every_field_is_read_from_the_environment(root: Path) -> None:
    assert {*read_by_code(root).values(), "fal_key"} == {field.name for field in fields(Settings)}


def test_every_variable_has_a_row_in_the_readme_and_every_row_a_variable(root: Path) -> None:
    assert {*read_by_code(root), *KEYS} == {*documented(root)}


def test_the_readme_names_the_true_defaults(root: Path) -> None:
    defaults = {field.name: field.default for field in fields(Settings)}
    for variable, shown in documented(root).items():
        if variable in KEYS:
            continue
        default = defaults[read_by_code(root)[variable]]
        assert default is not MISSING
        assert shown == show(default), variable


def show(default: object) -> str:
    """A default as a person would type it."""
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return f"`{int(default)}`"
    if isinstance(default, int) and default >= MIB and default % MIB == 0:
        return f"`{default // MIB}M`"
    if isinstance(default, tuple):
        words = [":".join(word) if isinstance(word, tuple) else word for word in default]
        return f"`{','.join(words)}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_the_changelog_has_an_unreleased_section(root: Path) -> None:
    assert "\n## [Unreleased]\n" in (root / "CHANGELOG.md").read_text()
