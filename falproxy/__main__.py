"""The program: `falproxy`, and `python -m falproxy`."""

import os


def main() -> int:
    """The command line, without frozenlist's extension: it is in C++, whose library takes 1 MB, for
    lists of a few functions."""
    os.environ.setdefault("FROZENLIST_NO_EXTENSIONS", "1")  # noqa: TID251 - it is told, not read
    from falproxy.cli.main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
