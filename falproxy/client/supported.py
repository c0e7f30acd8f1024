"""fal_client, if it is one that we know our way around in. Only this module imports it."""

try:
    import fal_client
    import httpx  # noqa: F401, comes with it
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
# What our classes replace in fal_client's besides public methods: those have no other place to
# say which HTTP client they use, or who fetches the tokens for uploads. Where these are missing,
# calls might go past the proxy.
REPLACED = ("_client", "_token_manager")


def is_known() -> bool:
    classes = (fal_client.SyncClient, fal_client.AsyncClient)
    return all(hasattr(original, name) for original in classes for name in REPLACED)


if not VERSION.startswith("1.") or not is_known():
    raise ImportError(UNSUPPORTED)
try:
    from fal_client.auth import AuthCredentials
    from fal_client.client import AsyncCDNTokenManager, CDNToken, CDNTokenManager
except ImportError as error:
    raise ImportError(UNSUPPORTED) from error
