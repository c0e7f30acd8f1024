"""fal's own Python client through the proxy: the same clients and functions, and no fal key.

    from falproxy.client import SyncClient

    fal = SyncClient("http://localhost:8080")
    fal.subscribe("fal-ai/flux/dev", {"prompt": "a lighthouse at dusk"})

or, for the functions of fal_client itself:

    import fal_client
    import falproxy.client

    falproxy.client.install("http://localhost:8080")
    fal_client.subscribe("fal-ai/flux/dev", {"prompt": "a lighthouse at dusk"})

A call to fal goes to the proxy instead, with the URL that it was for in `x-fal-target-url`. Files
go to the CDN and realtime sockets to fal directly, with tokens made through the proxy.
"""

# First, because it raises the ImportError that names a missing or unsupported fal_client.
from falproxy.client.supported import fal_client

# isort: split
from falproxy.client.clients import AsyncClient, SyncClient

__all__ = ["AsyncClient", "SyncClient", "install", "uninstall"]


def install(proxy_url: str | None = None, key: str | None = None) -> None:
    """Has `fal_client.subscribe(...)` and all other functions of fal_client go through the proxy.

    Also those that somebody imported earlier (`from fal_client import subscribe`). Clients that
    the program made itself stay as they are. Once more with other values means those.

    proxy_url, key: as for SyncClient.

    Raises: SettingsError, a ValueError: no proxy is named, or its URL or key makes no sense.
    """
    become(fal_client.sync_client, SyncClient(proxy_url, key))
    become(fal_client.async_client, AsyncClient(proxy_url, key))


def uninstall() -> None:
    """Has the functions of fal_client call fal itself again, as they did before `install`."""
    become(fal_client.sync_client, fal_client.SyncClient())
    become(fal_client.async_client, fal_client.AsyncClient())


def become(default: object, client: object) -> None:
    """Makes one of fal_client's two default clients one like `client`.

    The module's functions are methods bound to these two objects, wherever somebody has put
    them by now: only the objects themselves reach them all.
    """
    # Not assigned: fal_client's SyncClient is a frozen dataclass.
    object.__setattr__(default, "__class__", type(client))
    vars(default).clear()
    vars(default).update(vars(client))
    for name, function in list(vars(fal_client).items()):
        if getattr(function, "__self__", None) is default:
            setattr(fal_client, name, getattr(default, function.__name__))
