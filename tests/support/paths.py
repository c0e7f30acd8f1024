"""Folders of the repository, and Chromium."""

import os
import shutil
from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
PACKAGE = ROOT / "falproxy"
JS = TESTS / "js"
# The headless shell, which takes less CPU time, or the whole browser.
CHROMIUM = Path(
    os.environ.get("CHROMIUM") or shutil.which("chromium-headless-shell") or "/usr/bin/chromium"
)
FAL_CLIENTS = TESTS / "fal_clients"
