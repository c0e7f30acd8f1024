"""Imports fal_client and checks its version. No other module of falproxy imports it."""

try:
    import fal_client
    import httpx  # noqa: F401 - a dependency of fal_client
except ImportError as error:
    raise ImportError(
        "falproxy.client needs fal's own client: pip install 'falproxy[client]'."
    ) from error

__all__ = ["AsyncCDNTokenManager", "AuthCredentials", "CDNToken", "CDNTokenManager", "fal_client"]

VERSION = getattr(fal_client, "__version__", "of unknown version")
UNSUPPORTED = (
    f"falproxy.client does not support fal_client {VERSION}: "
    "pip install 'fal-client>=1.0,<2', or a newer falproxy."
)
# Private members that our subclasses of fal_client's clients override, because the HTTP client and
# the source of upload tokens have no public setting. Without them, calls could bypass the proxy.
OVERRIDDEN = ("_client", "_token_manager")


def has_overridden_members() -> bool:
    classes = (fal_client.SyncClient, fal_client.AsyncClient)
    return all(hasattr(original, name) for original in classes for name in OVERRIDDEN)


if not VERSION.startswith("1.") or not has_overridden_members():
    raise ImportError(UNSUPPORTED)
try:
    from fal_client.auth import AuthCredentials
    from fal_client.client import AsyncCDNTokenManager, CDNToken, CDNTokenManager
except ImportError as error:
    raise ImportError(UNSUPPORTED) from error
