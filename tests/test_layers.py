"""The architecture as a test: imports point one way, and no module grows too long."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "falproxy"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500

# A module imports only from rows below its own; the files inside one package may also import
# each other.
ROWS = (
    ("__main__",),
    ("cli", "client"),
    ("arguments",),
    ("explain", "unused", "usage"),
    ("workers",),
    ("app", "server", "doctor"),
    ("order",),
    ("parts", "table", "lane"),
    ("facades", "middleware"),
    ("proxy", "answers", "jobs", "outputs", "pictures"),
    ("fetch",),
    ("upstream", "submissions"),
    ("exchange",),
    ("cache", "storage", "ledger", "siblings"),
    (
        "call",
        "head_only",
        "spool",
        "origin",
        "background",
        "rewrites",
        "threads",
        "memory",
        "ids",
        "files",
        "short_cut",
        "resets",
        "metrics",
    ),
    ("reuse",),
    ("policy", "images", "media", "links", "registry", "exposure"),
    ("heads",),
    ("target", "headers", "keys", "inputs", "addresses", "pricing", "image_names"),
    ("errors", "config", "logs", "version"),
    ("signatures",),
    ("values",),
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
PURE = (
    "target", "headers", "policy", "reuse", "keys", "values", "errors", "version",
    "images", "signatures", "inputs", "addresses", "media", "links", "pricing",
    "heads", "image_names",
)  # fmt: skip
IMPURE = {"asyncio", "socket", "time", "os", "aiohttp", "logging", "random"}


def part_of(path: Path) -> str:
    """The name of a module or of the package that it is in: `cli`, `facades`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Everything that a module imports, wherever in the file, by full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module or "")
    return found


def parts_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imports_of(path))
    return {name[1] for name in names if name[0] == "falproxy" and len(name) > 1}


LAYERED = [path for path in MODULES if part_of(path) not in ("__init__", "sandbox")]


@pytest.mark.parametrize("path", LAYERED, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    for imported in parts_imported(path) - {own}:
        if imported == "sandbox":
            assert own == "cli", "only the command line starts the sandbox"
        else:
            assert ROW_OF[own] < ROW_OF[imported], f"{own} must not import {imported}"


def test_the_sandbox_stands_alone() -> None:
    for path in (PACKAGE / "sandbox").glob("*.py"):
        assert parts_imported(path) <= {"sandbox"}, path.name


def test_the_package_shows_its_public_names_only() -> None:
    assert parts_imported(PACKAGE / "__init__.py") == {"app", "config", "errors", "version"}


@pytest.mark.parametrize("name", PURE)
def test_the_pure_row_does_no_io(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    assert not {imported.split(".")[0] for imported in imports_of(path)} & IMPURE
    assert not any(
        isinstance(node, ast.AsyncFunctionDef) for node in ast.walk(ast.parse(path.read_text()))
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_longer_than_a_reader_s_patience(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text()


def test_importing_the_package_does_not_import_the_sandbox_s_needs() -> None:
    code = (
        "import falproxy, sys; print(sorted({'PIL', 'msgpack', 'cryptography'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
