"""Compiles falproxy and the modules of the tests, with the assertions that pytest rewrites.

Run before tests in several processes, each of which would compile all modules of a new clone.
"""

import compileall
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from _pytest.assertion import rewrite

from tests.support.paths import PACKAGE, TESTS

CHUNK = 16  # modules


def find_modules() -> list[Path]:
    """Return the modules whose assertions are rewritten, as tests/conftest.py has it."""
    helpers = (TESTS / "support").rglob("*.py")
    return sorted({*TESTS.rglob("test_*.py"), *TESTS.rglob("conftest.py"), *helpers})


def compile_module(path: Path) -> None:
    """Write the compiled module, unless it is up to date, as pytest's import hook does."""
    folder = rewrite.get_cache_dir(path)
    compiled = folder / f"{path.stem}{rewrite.PYC_TAIL}"
    if rewrite._read_pyc(path, compiled) is None:
        rewrite.try_makedirs(folder)
        version, code = rewrite._rewrite_test(path, None)  # type: ignore[arg-type] # no options
        rewrite._write_pyc(None, code, version, compiled)  # type: ignore[arg-type] # for traces


def main() -> None:
    with ProcessPoolExecutor() as pool:
        package = pool.submit(compileall.compile_dir, PACKAGE, quiet=1)
        for _ in pool.map(compile_module, find_modules(), chunksize=CHUNK):
            pass
        package.result()


if __name__ == "__main__":
    main()
