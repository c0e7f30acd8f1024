"""A transparent proxy for fal.ai that keeps your key on your side."""

from importlib import import_module
from typing import TYPE_CHECKING

from falproxy.version import __version__

if TYPE_CHECKING:
    from falproxy.app import FastPathRunner, Identity, create_app, setup
    from falproxy.app.asgi import asgi, asgi_scope
    from falproxy.errors import ProxyError
    from falproxy.settings import Settings

__all__ = [
    "FastPathRunner",
    "Identity",
    "ProxyError",
    "Settings",
    "__version__",
    "asgi",
    "asgi_scope",
    "create_app",
    "setup",
]

# Public name → its module.
EXPORTS = {
    **dict.fromkeys(("create_app", "setup", "FastPathRunner", "Identity"), "app"),
    **dict.fromkeys(("asgi", "asgi_scope"), "app.asgi"),
    "Settings": "settings",
    "ProxyError": "errors",
}


def __getattr__(name: str) -> object:
    """Import the module of a public name on first use, which keeps `import falproxy` fast."""
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{EXPORTS[name]}"), name)
