"""`python -m falproxy`."""

from falproxy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
