"""The pieces that every operation of the document is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Json = dict[str, object]

JSON = "application/json"
EVENTS = "text/event-stream"
SECURED: Json = {"security": [{"key": []}, {"bearer": []}]}


class Failure(NamedTuple):
    """Why an operation does not do what it is asked. about: when that is; code, message: of an
    example."""

    about: str
    code: str
    message: str


Refuse = Callable[[int, Failure], Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path. answers: by status; failures: as well, in the shape that `refuse`
    gives them. body: what is sent. is_guarded: whether a locked proxy asks who is calling."""

    id: str
    tag: str
    summary: str
    description: str
    answers: Mapping[int, Json]
    failures: Mapping[int, Failure]
    refuse: Refuse
    body: Json | None = None
    parameters: Sequence[Json] = ()
    is_guarded: bool = True

    def document(self, *, is_locked: bool) -> Json:
        asks = is_locked and self.is_guarded
        failures = {**self.failures, **({401: UNKNOWN_CALLER} if asks else {})}
        answers = {
            **self.answers,
            **{status: self.refuse(status, failure) for status, failure in failures.items()},
        }
        return {
            "operationId": self.id,
            "tags": [self.tag],
            "summary": self.summary,
            "description": self.description,
            **({"parameters": list(self.parameters)} if self.parameters else {}),
            **({"requestBody": self.body} if self.body is not None else {}),
            "responses": {str(status): answers[status] for status in sorted(answers)},
            **(SECURED if asks else {}),
        }


Paths = Mapping[str, tuple[str, Operation]]


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def header(name: str) -> Json:
    return {"$ref": f"#/components/headers/{name}"}


def headers(*names: str) -> Json:
    """Of an answer, as the components describe them."""
    return {name: header(name) for name in ("X-Request-ID", *names)}


def named(examples: Mapping[str, object]) -> Json:
    """Examples by what they show."""
    return {
        name.lower().replace(" ", "-"): {"summary": name, "value": value}
        for name, value in examples.items()
    }


def content(schema: Json, examples: Mapping[str, object], kind: str = JSON) -> Json:
    media: Json = {"schema": schema}
    if examples:
        media["examples"] = named(examples)
    return {kind: media}


def body(schema: Json, examples: Mapping[str, object], kind: str = JSON) -> Json:
    """A request's, without which nothing is done."""
    return {"required": True, "content": content(schema, examples, kind)}


def answer(about: str, schema: Json, example: object, *names: str) -> Json:
    """In JSON. names: of headers."""
    shown = {} if example is None else {"An answer": example}
    return {"description": about, "headers": headers(*names), "content": content(schema, shown)}


def refuse_plainly(status: int, failure: Failure) -> Json:
    return answer(failure.about, ref("Error"), plain(failure), *said_with(status))


def plain(failure: Failure) -> Json:
    return {"error": {"code": failure.code, "message": failure.message}}


def said_with(status: int) -> tuple[str, ...]:
    """Headers that an error may come with."""
    return {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}.get(
        status, ()
    )


def path_parameter(name: str, about: str, schema: Json, example: str | None) -> Json:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": about,
        "schema": schema,
        **({} if example is None else {"example": example}),
    }


def prefer() -> Json:
    return {
        "name": "Prefer",
        "in": "header",
        "description": "`respond-async` for an answer at once (202), to ask for the job later.",
        "schema": {"type": "string"},
    }


UNKNOWN_CALLER = Failure(
    "Nobody that this proxy knows.",
    "unauthenticated",
    "Send an access key of this proxy as x-falproxy-key or Authorization: Bearer.",
)
FORBIDDEN = Failure(
    "The model may not be called here, or not by pages of this origin.",
    "target_forbidden",
    "This proxy does not allow that call: fal-ai/veo3 is not among the endpoints that this proxy "
    "may call.",
)
FOREIGN = Failure(
    "Pages of this origin may not call the proxy.",
    "origin_forbidden",
    "Pages of this origin may not call the proxy (FALPROXY_ALLOWED_ORIGINS).",
)
TOO_SLOW = Failure(
    "The body stopped arriving.", "body_timeout", "The request's body stopped arriving."
)
TOO_LARGE = Failure(
    "The body is too large.",
    "body_too_large",
    "The body has more than 104857600 bytes (FALPROXY_MAX_BODY).",
)
WRONG_TYPE = Failure(
    "The body is of another type, or encoded.",
    "unsupported_media_type",
    "The content type must be application/json.",
)
FAILED = Failure("fal.ai or the proxy failed.", "upstream_failed", "fal.ai failed with 500.")
AWAY = Failure(
    "fal.ai is not there, or takes no more jobs; or the proxy has no room. Try again.",
    "upstream_unavailable",
    "fal.ai is not there for now.",
)
