"""What an application is made of, as its settings say; commands use some of it by itself."""

from importlib import import_module
from typing import TYPE_CHECKING

from falproxy.errors import SettingsError
from falproxy.media.fetch import Fetcher
from falproxy.middleware.cache_policy import CachePolicy
from falproxy.settings import Settings
from falproxy.storage_backends import BACKENDS
from falproxy.stores.cache import CacheStore
from falproxy.stores.cache.result_cache import choose_store

if TYPE_CHECKING:
    from falproxy.fal.registry import Registry
    from falproxy.stores.files import Storage

LOCAL_FILES_SUFFIX = " with files on disk"


def create_fetcher(settings: Settings) -> Fetcher:
    """The way to what users name; the files of a sandbox are on this machine."""
    trusted = rehosted_prefixes(settings)
    if settings.upstream_origin:
        trusted.append(f"{settings.upstream_origin}/")
    return Fetcher(trusted=trusted)


def rehosted_prefixes(settings: Settings) -> list[str]:
    """Return the prefixes of the URLs of stored files."""
    backend = BACKENDS.get(settings.rehost_to)
    return [] if backend is None else backend.url_prefixes(settings)


def serves_files(settings: Settings) -> bool:
    """Return whether the proxy serves stored files itself, below `/files/`."""
    backend = BACKENDS.get(settings.rehost_to)
    return backend is not None and backend.serves_files


def create_store(settings: Settings) -> CacheStore:
    """Raises: SettingsError, the Redis client is not installed."""
    return choose_store(settings.redis_url, settings.data_dir, settings.cache_max_size)


def cache_policy(settings: Settings) -> CachePolicy:
    # Results with URLs of local files are of no use to a proxy that does not serve them.
    return CachePolicy(
        ttl=settings.cache_ttl,
        max_entry=min(settings.cache_max_entry, settings.cache_max_size),
        is_private=settings.cache_scope == "principal",
        upstream=f"{settings.upstream_origin or ''}{LOCAL_FILES_SUFFIX * serves_files(settings)}",
    )


def create_registry(settings: Settings) -> "Registry":
    """Raises: SettingsError, the user's file cannot be read or is not of the form."""
    from falproxy.fal.registry import read_registry

    try:
        return read_registry(settings.models_file)
    except OSError as error:
        reason = error.strerror or "no reason"
        raise SettingsError(f"FALPROXY_MODELS cannot be read: {reason.lower()}.") from error
    except ValueError as error:
        raise SettingsError(f"FALPROXY_MODELS {error}.") from error


def create_storage(settings: Settings) -> "Storage":
    """Return the storage of the configured backend, whose module is imported only now.

    Raises: SettingsError, the backend's package is not installed, or its settings are invalid.
    """
    backend = BACKENDS[settings.rehost_to]
    try:
        module = import_module(backend.module)
    except ModuleNotFoundError as error:
        command = f"pip install 'falproxy[{backend.extra}]'"
        message = f"Outputs in {backend.name} need {error.name}: {command}"
        raise SettingsError(f"{message}, or set FALPROXY_REHOST=off.") from error
    storage: Storage = module.create_storage(settings)
    return storage
