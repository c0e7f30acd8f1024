"""The paths of the facades: whose clients wait for results, and name models by other names."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from uuid import uuid4

from aiohttp import web

from falproxy.background import Background
from falproxy.config import Settings
from falproxy.facades import Way, answer_errors, docs, openapi, refuse_plainly
from falproxy.facades.facade import waiting_way
from falproxy.facades.generate import GenerateRules, generate_ways
from falproxy.facades.kontext import KontextRules, kontext
from falproxy.facades.kontext_inputs import VARIANTS
from falproxy.facades.openai_images import ImagesRules, files_of, images_ways
from falproxy.facades.openai_images.pictures import none_own
from falproxy.facades.transparent import BodyRules
from falproxy.facades.waiting import Patience
from falproxy.fetch import Fetcher
from falproxy.ledger import Jobs, Lease
from falproxy.middleware.rehost import Rehosting
from falproxy.policy import Globs
from falproxy.pricing import Price
from falproxy.registry import Registry
from falproxy.storage.disk import DiskStorage

LEASE = 30.0  # seconds that a process sees to its jobs without a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the facades share with the rest of an application."""

    body: BodyRules
    fetcher: Fetcher
    rehosting: Rehosting | None
    background: Background
    registered: Registry
    jobs: Jobs


def facade_ways(settings: Settings, parts: Parts) -> dict[str, Way]:
    """Each path with how it is served."""
    patience = Patience(total=settings.wait, goodbyes=parts.background)
    rehosting = parts.rehosting
    edits = KontextRules(
        max_body=settings.max_body,
        background=parts.background,
        keep=rehosting.outputs.keep if rehosting else None,
    )
    images = ImagesRules(
        body=parts.body,
        models=settings.models,
        endpoints=Globs(settings.allowed_endpoints),
        read_own=files_of(rehosting.outputs.storage, rehosting.here)
        if rehosting is not None and isinstance(rehosting.outputs.storage, DiskStorage)
        else none_own,
    )
    generated = GenerateRules(
        registered=parts.registered,
        jobs=parts.jobs,
        lease=Lease(uuid4().hex, LEASE),
        patience=patience,
        max_body=settings.max_body,
        endpoints=Globs(settings.allowed_endpoints),
        renew=rehosting.outputs.renewed if rehosting else None,
    )
    return {
        **{f"/{name}": waiting_way(kontext(name, edits), patience) for name in VARIANTS},
        **images_ways(images, parts.fetcher, patience),
        **generate_ways(generated),
    }


def prices_of(registry: Registry) -> Mapping[str, Price]:
    """What the models cost whose price is known, by endpoint id."""
    rates = {model.endpoint: model.rate for model in registry.models.values()}
    return {endpoint: rate for endpoint, rate in rates.items() if rate is not None}


def add_documents(
    app: web.Application, settings: Settings, registry: Registry, prefix: str, *, is_locked: bool
) -> None:
    """`/openapi.json`, and `/docs`, which shows it."""
    described = openapi.Described(
        registered=registry,
        models=settings.models,
        is_locked=is_locked,
        has_files=settings.rehost_to == "disk",
        public_url=settings.public_url,
    )
    page = docs.Docs()
    show_file = partial(answer_errors(refuse_plainly), handler=page.show_file)
    app.router.add_get(prefix + openapi.PATH, openapi.describe(described))
    app.router.add_get(prefix + docs.PATH, page.show_page)
    app.router.add_get(prefix + docs.FILES, show_file)
