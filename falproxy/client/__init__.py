"""fal's Python client through the proxy: the same classes and functions, without a fal key.

    from falproxy.client import SyncClient

    fal = SyncClient("http://localhost:8080")
    fal.subscribe("fal-ai/flux/dev", {"prompt": "a lighthouse at dusk"})

or, for the functions of fal_client itself:

    import fal_client
    import falproxy.client

    falproxy.client.install("http://localhost:8080")
    fal_client.subscribe("fal-ai/flux/dev", {"prompt": "a lighthouse at dusk"})

Calls to fal are sent to the proxy, with the original URL in `x-fal-target-url`. File uploads go to
the CDN and realtime sockets to fal directly, with tokens obtained through the proxy.
"""

# First, because it raises the ImportError that names a missing or unsupported fal_client.
from falproxy.client.compat import fal_client

# isort: split
from falproxy.client.clients import AsyncClient, SyncClient

__all__ = ["AsyncClient", "SyncClient", "install", "uninstall"]


def install(proxy_url: str | None = None, key: str | None = None) -> None:
    """Make `fal_client.subscribe(...)` and all other module functions of fal_client use the proxy.

    This includes functions that were imported earlier (`from fal_client import subscribe`), and
    excludes client objects that the program creates itself. A second call replaces the settings
    of the first.

    proxy_url, key: as for `SyncClient`.

    Raises:
        SettingsError: no proxy URL, or a malformed URL or key. It is a ValueError.
    """
    _replace_module_functions(fal_client.sync_client, SyncClient(proxy_url, key))
    _replace_module_functions(fal_client.async_client, AsyncClient(proxy_url, key))


def uninstall() -> None:
    """Make the module functions of fal_client call fal directly again."""
    _replace_module_functions(fal_client.sync_client, fal_client.SyncClient())
    _replace_module_functions(fal_client.async_client, fal_client.AsyncClient())


def _replace_module_functions(default_client: object, client: object) -> None:
    """Give one of fal_client's two default clients the class and the state of `client`.

    The module functions are methods bound to the default clients. Changing these two objects in
    place also reaches the functions that were imported earlier.
    """
    # Not assigned, because fal_client's SyncClient is a frozen dataclass.
    object.__setattr__(default_client, "__class__", type(client))
    vars(default_client).clear()
    vars(default_client).update(vars(client))
    for name, function in list(vars(fal_client).items()):
        if getattr(function, "__self__", None) is default_client:
            setattr(fal_client, name, getattr(default_client, function.__name__))
