"""The backends that can store re-hosted outputs. Their names are the values of `FALPROXY_REHOST`.

A new backend is a module with `create_storage(settings) -> Storage`, a row in `BACKENDS`, an extra
in setup.cfg if it needs packages, and a section in docs/re-hosting.md. Modules are imported on
first use.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote

FILES_PATH = "/files/"  # path at which the proxy serves the files of a backend with `serves_files`
FILES_FOLDER = "files"  # folder of the disk backend below FALPROXY_DATA_DIR


@dataclass(frozen=True, slots=True)
class SupabaseProject:
    """A Supabase project. signed_url_ttl: seconds; None for public URLs."""

    url: str
    key: str = field(repr=False)
    bucket: str
    signed_url_ttl: float | None


class ServerGroup(Protocol):
    @property
    def public_url(self) -> str | None: ...


class StorageGroup(Protocol):
    @property
    def project(self) -> SupabaseProject | None: ...


class BackendSettings(Protocol):
    """The settings that the rows of `BACKENDS` read; `falproxy.settings.Settings` has them."""

    @property
    def sandbox(self) -> bool: ...

    @property
    def server(self) -> ServerGroup: ...

    @property
    def storage(self) -> StorageGroup: ...


def no_url_prefixes(settings: BackendSettings) -> list[str]:
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageBackend:
    """One backend.

    name: the value of FALPROXY_REHOST.
    module: full name of the module that has `create_storage(settings)`.
    log_phrase: completes the words "outputs ..." in the log line of the start.
    is_default: Returns whether FALPROXY_REHOST=auto selects this backend; the first row wins.
    url_prefixes: Returns the prefixes of the URLs of stored files, as far as they are known.
    serves_files: whether the proxy serves the files itself, below `/files/`.
    extra: the extra of setup.cfg with the packages of the module, or None.
    """

    name: str
    module: str
    log_phrase: str
    is_default: Callable[[BackendSettings], bool]
    url_prefixes: Callable[[BackendSettings], list[str]] = no_url_prefixes
    serves_files: bool = False
    extra: str | None = None


def disk_url_prefixes(settings: BackendSettings) -> list[str]:
    public_url = settings.server.public_url
    return [public_url.rstrip("/") + FILES_PATH] if public_url else []


def supabase_url_prefixes(settings: BackendSettings) -> list[str]:
    project = settings.storage.project
    if project is None:
        return []
    root = f"{project.url.rstrip('/')}/storage/v1/object"
    return [f"{root}/{access}/{quote(project.bucket)}/" for access in ("public", "sign")]


BACKENDS: Mapping[str, StorageBackend] = {
    backend.name: backend
    for backend in (
        StorageBackend(
            name="supabase",
            module="falproxy.stores.files.supabase",
            log_phrase="go to Supabase",
            is_default=lambda settings: settings.storage.project is not None,
            url_prefixes=supabase_url_prefixes,
            extra="supabase",
        ),
        StorageBackend(
            name="disk",
            module="falproxy.stores.files.disk",
            log_phrase="stay on the disk",
            is_default=lambda settings: settings.sandbox,
            url_prefixes=disk_url_prefixes,
            serves_files=True,
        ),
    )
}
REHOST_VALUES = ("auto", *BACKENDS, "off")


def select_backend(rehost: str, settings: BackendSettings) -> StorageBackend | None:
    """Return the backend for a value of FALPROXY_REHOST, or None if outputs are not stored."""
    if rehost == "auto":
        rows = BACKENDS.values()
        return next((backend for backend in rows if backend.is_default(settings)), None)
    return BACKENDS.get(rehost)
