"""Folders of the repository."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
PACKAGE = ROOT / "falproxy"
JS = TESTS / "js"
FAL_CLIENTS = TESTS / "fal_clients"
