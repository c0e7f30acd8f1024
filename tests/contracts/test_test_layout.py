"""The layout of the tests: what they share is in tests/support and in conftest.py files."""

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.support.paths import ROOT, TESTS

MODULES = [path for path in sorted(TESTS.rglob("*.py")) if "node_modules" not in path.parts]
TEST_MODULES = [path for path in MODULES if path.name.startswith("test_")]
IN_SUPPORT = [path for path in MODULES if path.is_relative_to(TESTS / "support")]


def relative(path: Path) -> str:
    return str(path.relative_to(TESTS))


@cache
def nodes(code: str) -> tuple[ast.AST, ...]:
    """Return all nodes of a module's syntax tree."""
    return (*ast.walk(ast.parse(code)),)


def imported(code: str) -> set[str]:
    """Return the full names of all modules and members that a module imports."""
    names: set[str] = set()
    for node in nodes(code):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def not_to_be_shared(code: str) -> set[str]:
    """Return the imported names that are in a test module or in a conftest.py."""
    return {
        name
        for name in imported(code)
        if any(part == "conftest" or part.startswith("test_") for part in name.split("."))
        and name.startswith(("tests.", "test_", "conftest"))
    }


def code_in_strings(code: str) -> Iterator[ast.ImportFrom]:
    """Yield the imports from falproxy in programs that a test module has as strings."""
    for node in nodes(code):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if "from falproxy" not in node.value:
                continue
            try:
                program = ast.parse(node.value)
            except SyntaxError:  # prose
                continue
            yield from (
                each
                for each in ast.walk(program)
                if isinstance(each, ast.ImportFrom) and (each.module or "").startswith("falproxy")
            )


def exists(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name) or bool(
            importlib.import_module(f"{module}.{name}")
        )
    except ImportError:
        return False


def test_no_module_imports_from_a_test_module_or_a_conftest() -> None:
    found = {relative(path): not_to_be_shared(path.read_text()) for path in MODULES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("from tests.fal.test_target import FAL_URLS", id="a name"),
        pytest.param("from tests.fal import test_target", id="a module"),
        pytest.param("import tests.fal.test_target as target", id="by another name"),
        pytest.param("from tests.conftest import Gateway", id="a conftest"),
        pytest.param("def f():\n    from tests.fal.test_target import X", id="in a function"),
    ],
)
def test_an_import_from_a_test_module_is_found(code: str) -> None:
    assert not_to_be_shared(code)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("from tests.support.urls import PROXY", id="a helper"),
        pytest.param("from aiohttp.test_utils import TestServer", id="another package"),
    ],
)
def test_an_import_from_elsewhere_is_allowed(code: str) -> None:
    assert not not_to_be_shared(code)


def test_helpers_have_neither_tests_nor_fixtures_of_their_own() -> None:
    found = [
        f"{relative(path)}: {node.name}"
        for path in IN_SUPPORT
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (
            node.name.startswith("test_")
            or any("fixture" in ast.unparse(each) for each in node.decorator_list)
        )
    ]
    assert found == []


def test_programs_in_strings_import_names_that_exist() -> None:
    missing = [
        f"{relative(path)}: {node.module}.{alias.name}"
        for path in MODULES
        for node in code_in_strings(path.read_text())
        for alias in node.names
        if not exists(node.module or "", alias.name)
    ]
    assert missing == []


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in TEST_MODULES} - {TESTS}), ids=relative
)
def test_a_folder_of_tests_is_a_folder_of_the_package(folder: Path) -> None:
    name = folder.relative_to(TESTS)
    assert name.name in ("contracts", "end_to_end") or (ROOT / "falproxy" / name).is_dir()


@pytest.mark.parametrize("own", [None, pytest.mark.slow(seconds=10).mark])
def test_end_to_end_tests_are_slow_and_keep_their_seconds(own: pytest.Mark | None) -> None:
    conftest = importlib.import_module("tests.end_to_end.conftest")
    item = Mock(path=conftest.FOLDER / "test_some.py")
    item.get_closest_marker.return_value = own
    conftest.pytest_collection_modifyitems([item])
    assert item.add_marker.called == (own is None)
