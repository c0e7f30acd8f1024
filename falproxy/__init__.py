"""A transparent proxy for fal.ai that keeps your key on your side."""

from falproxy.app import create_app, setup
from falproxy.config import Settings
from falproxy.errors import ProxyError
from falproxy.version import __version__

__all__ = ["ProxyError", "Settings", "__version__", "create_app", "setup"]
