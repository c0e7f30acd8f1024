"""An offline fal: its own aiohttp application, which imports nothing else of falproxy."""

from falproxy.sandbox.server import create_app, create_cdn
from falproxy.sandbox.state import Sandbox

__all__ = ["Sandbox", "create_app", "create_cdn"]
