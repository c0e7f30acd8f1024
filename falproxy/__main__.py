"""Entry point of `falproxy` and of `python -m falproxy`."""

import os


def main() -> int:
    """Run the command line without frozenlist's C++ extension.

    The C++ library costs 1 MB of memory, and aiohttp's frozen lists only have a few items.
    """
    os.environ.setdefault("FROZENLIST_NO_EXTENSIONS", "1")  # noqa: TID251 - it is set, not read
    from falproxy.cli.main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
