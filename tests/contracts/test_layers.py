"""The architecture: imports point one way, class names are unique, and modules have a limit."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import PACKAGE

MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500

# A module imports from rows below its own, and from its own folder; the modules at the root of the
# package count as one folder. The entry points `__init__` and `__main__` have a test of their own.
ROWS = (
    ("cli",),
    ("app", "client"),
    ("server", "telemetry", "web"),
    ("dialects", "middleware"),
    ("proxy",),
    ("stores",),
    ("media",),
    (
        "settings",
        "auth_settings",
        "limit_settings",
        "setting_fields",
        "telemetry_settings",
        "environment",
        "parsers",
        "storage_backends",
    ),
    ("fal",),
    (
        "background",
        "circuit_breaker",
        "concurrency",
        "errors",
        "ids",
        "job_times",
        "json_object",
        "log",
        "metrics",
        "os_errors",
        "parse_digits",
        "shared_tasks",
        "spans",
        "spool",
        "state_log",
        "trusted_proxies",
        "version",
        "windows",
    ),
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
ENTRY_POINTS = {"__init__": {"app", "settings", "errors", "version"}, "__main__": {"cli"}}
PURE = (
    "fal", "errors", "parse_digits", "parsers", "trusted_proxies", "version", "windows",
    "media/image_rules", "media/image_format", "media/content_type", "media/fetch/ip_ranges",
    "proxy/headers", "stores/cache/eligibility",
)  # fmt: skip
IMPURE = {"asyncio", "socket", "time", "os", "aiohttp", "logging", "random"}


def part_of(path: Path) -> str:
    """Return the name of a module at the root, or of a module's package: `errors`, `cli`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Return the full names of all imports of a module, including those inside functions."""
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


def folder_of(name: str) -> str:
    """Return the folder of a part: its own name, or `.` for a module at the root."""
    return name if (PACKAGE / name).is_dir() else "."


LAYERED = [path for path in MODULES if part_of(path) not in {*ENTRY_POINTS, "sandbox"}]


def test_the_table_has_ten_rows_and_contains_every_part() -> None:
    assert len(ROWS) == 10
    assert {*ROW_OF, *ENTRY_POINTS, "sandbox"} == {part_of(path) for path in MODULES}


@pytest.mark.parametrize("path", LAYERED, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    for imported in parts_imported(path) - {own}:
        if imported == "sandbox":
            assert own == "cli", "only the command line starts the sandbox"
        elif ROW_OF[own] == ROW_OF[imported]:
            assert folder_of(own) == folder_of(imported), f"{own} must not import {imported}"
        else:
            assert ROW_OF[own] < ROW_OF[imported], f"{own} must not import {imported}"


def test_there_are_no_import_cycles() -> None:
    graph = {name_of(path): {*modules_imported(path)} for path in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def name_of(path: Path) -> str:
    parts = ("falproxy", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def modules_imported(path: Path) -> set[str]:
    """Return the full names of the package's modules that a module imports.

    `from a import b` imports the module `a.b` if it exists, otherwise `a`.
    """
    own = {name_of(module) for module in MODULES}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in own else f"{node.module}" for name in names}
    return found & own - {name_of(path), "falproxy"}


def test_the_sandbox_stands_alone() -> None:
    for path in (PACKAGE / "sandbox").glob("*.py"):
        assert parts_imported(path) <= {"sandbox"}, path.name


@pytest.mark.parametrize(("name", "imported"), ENTRY_POINTS.items())
def test_an_entry_point_imports_only_its_parts(name: str, imported: set[str]) -> None:
    assert parts_imported(PACKAGE / f"{name}.py") == imported


PURE_MODULES = [
    path
    for name in PURE
    for path in (
        [PACKAGE / f"{name}.py"]
        if "/" in name or not (PACKAGE / name).is_dir()
        else sorted((PACKAGE / name).rglob("*.py"))
    )
]


@pytest.mark.parametrize("path", PURE_MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_pure_modules_do_no_io(path: Path) -> None:
    assert not {imported.split(".")[0] for imported in imports_of(path)} & IMPURE
    assert not any(
        isinstance(node, ast.AsyncFunctionDef) for node in ast.walk(ast.parse(path.read_text()))
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_longer_than_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text()


def test_no_exception_is_raised_in_except_star() -> None:
    """Python before 3.11.4, such as Debian's, puts such an exception in a group."""
    found = [
        f"{path.relative_to(PACKAGE)}:{raised.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.TryStar)
        for handler in node.handlers
        for raised in ast.walk(handler)
        if isinstance(raised, ast.Raise)
    ]
    assert found == []


def test_no_two_classes_share_a_name() -> None:
    """The sandbox is a program of its own, and may use the same names."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        if part_of(path) != "sandbox":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(name_of(path))
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_importing_the_package_does_not_import_the_sandbox_s_packages() -> None:
    code = (
        "import falproxy, sys; print(sorted({'PIL', 'msgpack', 'cryptography'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
