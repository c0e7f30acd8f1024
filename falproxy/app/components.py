"""Components of an application, created from its settings. Commands of the CLI use them too."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from falproxy.errors import SettingsError
from falproxy.fal.pricing import Price, parse_unit
from falproxy.media.fetch import Fetcher
from falproxy.middleware.cache_policy import CachePolicy
from falproxy.proxy.model_schemas import SchemaClient
from falproxy.proxy.prices import PriceBook, PricedModel
from falproxy.settings import Settings
from falproxy.storage_backends import BACKENDS
from falproxy.stores.cache import CacheStore
from falproxy.stores.cache.sqlite import SqliteStore
from falproxy.stores.idempotency import IdempotencyStore
from falproxy.stores.idempotency.sqlite import SqliteIdempotencyStore
from falproxy.stores.limits import LimitsStore
from falproxy.stores.price_file import PriceFile
from falproxy.stores.schema_files import FOLDER as SCHEMA_FOLDER
from falproxy.stores.schema_files import SchemaFiles

if TYPE_CHECKING:
    from falproxy.fal.registry import Registry
    from falproxy.stores.files import Storage

PRICE_FILE = "prices.json"
# Plain paths, because importlib.resources imports the modules that read archives.
REGISTRY_FOLDER = Path(__file__).parent.parent / "fal" / "registry"
BUILTIN_MODELS_FILES = ("models.toml", "media_models.toml")
LOCAL_FILES_SUFFIX = " with files on disk"


def create_fetcher(settings: Settings) -> Fetcher:
    """Create the client that reads URLs in inputs. It may read the sandbox's local URLs."""
    trusted = rehosted_prefixes(settings)
    if settings.upstream.origin:
        trusted.append(f"{settings.upstream.origin}/")
    return Fetcher(trusted=trusted)


def rehosted_prefixes(settings: Settings) -> list[str]:
    """Return the prefixes of URLs of stored outputs."""
    backend = BACKENDS.get(settings.storage_backend)
    return [] if backend is None else backend.url_prefixes(settings)


def serves_files(settings: Settings) -> bool:
    """Return whether the proxy serves stored outputs itself, below `/files/`."""
    backend = BACKENDS.get(settings.storage_backend)
    return backend is not None and backend.serves_files


def create_cache_store(settings: Settings) -> CacheStore:
    """Create the store of the result cache: in Redis, or without a URL in an SQLite file.

    Raises: SettingsError, redis-py is not installed, or the URL is invalid.
    """
    redis_url = settings.cache.redis_url
    if redis_url is None:
        return SqliteStore(
            settings.data_dir / "results.sqlite",
            max_size=settings.cache.max_size,
            owner_retention=settings.cache.owner_retention,
        )
    with redis_settings():
        from falproxy.stores.cache.redis import RedisStore

        return RedisStore(redis_url, owner_retention=settings.cache.owner_retention)


def create_limits_store(settings: Settings) -> LimitsStore:
    """Create the store of the limits: in Redis, or without a URL in an SQLite file.

    Raises: SettingsError, redis-py is not installed, or the URL is invalid.
    """
    redis_url = settings.cache.redis_url
    if redis_url is None:
        from falproxy.stores.limits.sqlite import SqliteLimitsStore

        return SqliteLimitsStore(settings.data_dir / "limits.sqlite")
    with redis_settings():
        from falproxy.stores.limits.redis import RedisLimitsStore

        return RedisLimitsStore(redis_url)


@contextmanager
def redis_settings() -> Iterator[None]:
    """Context: the creation of a store in Redis. Raises: SettingsError."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"REDIS_URL needs {error.name}: pip install 'falproxy[redis]'."
        raise SettingsError(message) from error
    except ValueError:
        raise SettingsError(
            "REDIS_URL is not the URL of a Redis server. Escape special characters in it: "
            "# is %23, / is %2F, ? is %3F, @ is %40."
        ) from None


def create_idempotency_store(settings: Settings) -> IdempotencyStore:
    """Create the store of calls with an Idempotency-Key: in Redis, or without a URL in an SQLite
    file. The result cache, which is created first, has checked the URL."""
    redis_url = settings.cache.redis_url
    if redis_url is None:
        return SqliteIdempotencyStore(settings.data_dir / "idempotency.sqlite")
    from falproxy.stores.idempotency.redis import RedisIdempotencyStore

    return RedisIdempotencyStore(redis_url)


def create_cache_policy(settings: Settings) -> CachePolicy:
    # Results with local files are not shared with proxies that do not serve these files.
    return CachePolicy(
        ttl=settings.cache.ttl,
        max_entry=min(settings.cache.max_entry, settings.cache.max_size),
        is_private=settings.cache.scope == "principal",
        upstream=f"{settings.upstream.origin or ''}{LOCAL_FILES_SUFFIX * serves_files(settings)}",
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
    except UnicodeDecodeError:
        raise SettingsError("FALPROXY_MODELS is no text in UTF-8: set it to a TOML file.") from None
    except ValueError as error:
        raise SettingsError(f"FALPROXY_MODELS {error}.") from error


def create_prices(settings: Settings, load_registry: "Callable[[], Registry]") -> PriceBook:
    """Create the prices of all endpoints. load_registry: returns the models, read on first use."""
    origin = settings.upstream.origin
    return PriceBook(
        registry_prices(settings, load_registry),
        schemas=SchemaClient(files=SchemaFiles(settings.data_dir / SCHEMA_FOLDER, origin)),
        file=PriceFile(settings.data_dir / PRICE_FILE, origin),
    )


def registry_prices(
    settings: Settings, load_registry: "Callable[[], Registry]"
) -> Callable[[], Mapping[str, PricedModel]]:
    """Return a function that returns the prices of the registry by endpoint id."""

    @cache
    def read_prices() -> Mapping[str, PricedModel]:
        if settings.dialects.models_file is None:
            return builtin_prices(with_variants=True)
        models = load_registry().models.values()
        return {
            each.endpoint: PricedModel(each.rate, each.defaults)
            for model in models
            for each in (*model.variants, model)
            if each.rate is not None or each.defaults
        }

    if settings.dialects.models_file is not None:
        read_prices()  # an invalid file stops the start
    return read_prices


@cache
def builtin_prices(*, with_variants: bool = False) -> Mapping[str, PricedModel]:
    """Read the prices of the built-in models without importing the registry, which is slow."""
    import tomllib

    texts = [(REGISTRY_FOLDER / name).read_text("utf-8") for name in BUILTIN_MODELS_FILES]
    tables = [tomllib.loads(text, parse_float=Decimal)["models"] for text in texts]
    models = [model for table in tables for model in table.values()]
    variants = [each for model in models for each in model.get("variants", ()) if with_variants]
    return {
        model["endpoint"]: PricedModel(
            Price(Decimal(model["price"]), unit), model.get("defaults", {})
        )
        for model in variants + models  # of equal endpoints, the model's own price counts
        if "price" in model and (unit := parse_unit(model.get("unit", "image")))
    }


def create_storage(settings: Settings) -> "Storage":
    """Create the storage of outputs; only the module of the backend in use is imported.

    Raises: SettingsError, an optional package is not installed, or the settings are invalid.
    """
    backend = BACKENDS[settings.storage_backend]
    try:
        module = import_module(backend.module)
    except ModuleNotFoundError as error:
        command = f"pip install 'falproxy[{backend.extra}]'"
        message = f"Outputs in {backend.name} need {error.name}: {command}"
        raise SettingsError(f"{message}, or set FALPROXY_REHOST=off.") from error
    storage: Storage = module.create_storage(settings)
    return storage
