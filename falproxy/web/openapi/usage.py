"""What the document says of `/api/usage` and `/metrics`."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field

from falproxy.web.openapi.operations import (
    Failure,
    Json,
    Operation,
    Paths,
    answer,
    headers,
    ref,
    refuse_plainly,
)

TAG = "Service"
MOMENT = (
    r"^(\d{1,6}[smhdSMHD]|"
    r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:\d{2})?)?)$"
)
By = Literal["endpoint", "principal", "route", "minute", "hour", "day"]
PARAMETERS: Mapping[str, tuple[str, Json]] = {
    "since": ("From when: how long ago, or a date in UTC.", {"default": "24h", "pattern": MOMENT}),
    "until": ("Up to when; now without it.", {"pattern": MOMENT}),
    "by": (
        "What is told apart, for a plain table of that alone.",
        {"enum": ["endpoint", "principal", "route", "minute", "hour", "day"]},
    ),
}
NO_SENSE = Failure(
    "The query makes no sense, or asks for too much.",
    "query_invalid",
    "The query's since must be like 7d, 12h or 2026-11-01, not 'yesterday'.",
)
NAME_TAKEN = Failure(
    "The caller cannot be told from another one by that name.",
    "name_taken",
    "An access key has your name, so your calls are not told apart.",
)
NOT_AN_ADMIN = Failure(
    "The caller is none of FALPROXY_ADMINS.",
    "not_an_admin",
    "Everybody's numbers are for those whom FALPROXY_ADMINS names.",
)
AWAY = Failure(
    "The ledger is away.", "ledger_away", "The ledger cannot be read for now; calls go on."
)


class Sums(BaseModel):
    """Of several calls. Money is in USD."""

    calls: int
    errors: int = Field(description="Answers of 400 and above, and jobs that failed.")
    hits: int = Field(description="Calls that got a result which was there, or shared a job.")
    misses: int
    hit_rate: float | None = Field(description="Of the calls whose result may be reused.")
    spent: float | None = Field(description="null: none of the prices is known.")
    saved: float | None = Field(description="What hits would have cost; null: unknown.")
    unpriced: int = Field(description="Calls whose price is unknown; `spent` is without them.")
    own_seconds: float | None = Field(description="The proxy's share of a call, on average.")
    upstream_seconds: float | None = Field(description="fal's share.")


class NamedSums(Sums):
    name: str = Field(description="Empty where there is none.")


class TimedSums(Sums):
    at: str = Field(description="When the step begins.")


class LatestCall(BaseModel):
    """One call. Nothing of what was asked for is known."""

    at: str
    route: str
    status: int
    principal: str | None
    operation: str | None
    endpoint: str | None
    request_id: str | None
    error: str | None
    cache: Literal["hit", "miss", "collapsed", "bypass"] | None
    seconds: float
    upstream_seconds: float
    spent: float | None


class Spread(BaseModel):
    """How long requests took, estimated from histograms. operation: empty for all together."""

    operation: str
    count: int
    p50: float | None
    p95: float | None
    p99: float | None


class Live(BaseModel):
    """Since the processes began."""

    since: str | None
    in_progress: int
    requests: int
    own_seconds: list[Spread]
    upstream_seconds: list[Spread]


class Usage(BaseModel):
    """What was called. principal: whose calls these are, null for everybody's."""

    since: str
    until: str
    principal: str | None
    totals: Sums
    step: Literal["minute", "hour", "day"]
    series: list[TimedSums]
    endpoints: list[NamedSums]
    routes: list[NamedSums]
    principals: list[NamedSums] | None
    latest: list[LatestCall]
    live: Live | None


class UsageTable(BaseModel):
    """What was called, by one thing alone."""

    since: str
    until: str
    principal: str | None
    by: By
    totals: Sums
    rows: list[NamedSums]


def number_paths() -> Paths:
    return {"/api/usage": ("get", usage()), "/metrics": ("get", metrics())}


def usage() -> Operation:
    shown: Json = {"anyOf": [ref("Usage"), ref("UsageTable")]}
    return Operation(
        id="usage",
        tag=TAG,
        summary="What was called, what became of it and what it cost",
        description="As `/dashboard` shows it. Callers see their own calls; those whom "
        "FALPROXY_ADMINS names, and everybody at an open proxy, see all.",
        parameters=[
            {
                "name": name,
                "in": "query",
                "description": about,
                "schema": {"type": "string", **schema},
            }
            for name, (about, schema) in PARAMETERS.items()
        ],
        answers={200: answer("The sums.", shown, None)},
        failures={400: NO_SENSE, 403: NAME_TAKEN, 503: AWAY},
        refuse=refuse_plainly,
    )


def metrics() -> Operation:
    return Operation(
        id="metrics",
        tag=TAG,
        summary="The numbers of the process, for Prometheus",
        description="Text, or OpenMetrics where the client asks for it. At a locked proxy it is "
        "for those whom FALPROXY_ADMINS names.",
        answers={
            200: {
                "description": "The numbers.",
                "headers": headers(),
                "content": {"text/plain": {"schema": {"type": "string"}}},
            }
        },
        failures={403: NOT_AN_ADMIN},
        refuse=refuse_plainly,
    )
