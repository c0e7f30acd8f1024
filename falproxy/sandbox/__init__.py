"""Offline fal emulator. A separate aiohttp application that imports nothing else of falproxy."""

from falproxy.sandbox.server import create_app, create_cdn
from falproxy.sandbox.state import Sandbox

__all__ = ["Sandbox", "create_app", "create_cdn"]
