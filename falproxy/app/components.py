"""Components of an application, created from its settings. Commands of the CLI use them too."""

from typing import TYPE_CHECKING
from urllib.parse import quote

from falproxy.errors import SettingsError
from falproxy.media.fetch import Fetcher
from falproxy.middleware.cache_policy import CachePolicy
from falproxy.settings import Settings
from falproxy.stores.cache import CacheStore
from falproxy.stores.cache.result_cache import choose_store

if TYPE_CHECKING:
    from falproxy.fal.registry import Registry
    from falproxy.stores.files import Storage

FILES_FOLDER = "files"  # directory of stored outputs, below the data directory
DISK_STORAGE_SUFFIX = " with files on disk"


def create_fetcher(settings: Settings) -> Fetcher:
    """Create the client that reads URLs in inputs. It may read the sandbox's local URLs."""
    trusted = rehosted_prefixes(settings)
    if settings.upstream.origin:
        trusted.append(f"{settings.upstream.origin}/")
    return Fetcher(trusted=trusted)


def rehosted_prefixes(settings: Settings) -> list[str]:
    """Return the prefixes of URLs of stored outputs."""
    project = settings.storage.project
    if settings.storage_backend == "disk" and settings.server.public_url:
        return [f"{settings.server.public_url.rstrip('/')}/files/"]
    if settings.storage_backend == "supabase" and project is not None:
        root = f"{project.url.rstrip('/')}/storage/v1/object"
        return [f"{root}/{kind}/{quote(project.bucket)}/" for kind in ("public", "sign")]
    return []


def create_store(settings: Settings) -> CacheStore:
    """Create the store of the result cache. Raises: SettingsError, redis-py is not installed."""
    return choose_store(settings.cache.redis_url, settings.data_dir, settings.cache.max_size)


def cache_policy(settings: Settings) -> CachePolicy:
    # Results with files on disk are not shared with proxies that do not serve these files.
    is_on_disk = settings.storage_backend == "disk"
    return CachePolicy(
        ttl=settings.cache.ttl,
        max_entry=min(settings.cache.max_entry, settings.cache.max_size),
        is_private=settings.cache.scope == "principal",
        upstream=f"{settings.upstream.origin or ''}{DISK_STORAGE_SUFFIX * is_on_disk}",
    )


def create_registry(settings: Settings) -> "Registry":
    """Read the models and templates.

    Raises: SettingsError, the file of FALPROXY_MODELS cannot be read or is invalid.
    """
    from falproxy.fal.registry import read_registry

    try:
        return read_registry(settings.dialects.models_file)
    except OSError as error:
        reason = error.strerror or "no reason"
        raise SettingsError(f"FALPROXY_MODELS cannot be read: {reason.lower()}.") from error
    except ValueError as error:
        raise SettingsError(f"FALPROXY_MODELS {error}.") from error


def create_storage(settings: Settings) -> "Storage":
    """Create the storage of outputs; only the backend in use is imported.

    Raises: SettingsError, an optional package is not installed, or the settings are invalid.
    """
    if settings.storage_backend == "disk":
        from falproxy.stores.files.disk import DiskStorage
        from falproxy.stores.files.rehosting import LOCAL_ORIGIN

        return DiskStorage(settings.data_dir / FILES_FOLDER, lambda: LOCAL_ORIGIN)
    project = settings.storage.project
    if project is None:
        raise SettingsError("FALPROXY_REHOST=supabase needs SUPABASE_URL and SUPABASE_KEY.")
    try:
        from falproxy.stores.files.supabase import SupabaseStorage
    except ModuleNotFoundError as error:
        advice = f"SUPABASE_URL needs {error.name}: pip install 'falproxy[supabase]'"
        raise SettingsError(f"{advice}, or set FALPROXY_REHOST=off.") from error
    try:
        return SupabaseStorage(
            project.url, project.key, bucket=project.bucket, signed_url_ttl=project.signed_url_ttl
        )
    except ValueError as error:
        raise SettingsError(f"The SUPABASE settings cannot be right: {error}.") from error
