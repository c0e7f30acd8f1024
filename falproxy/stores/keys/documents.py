"""Keys as JSON, and the fields by which keys are created and changed."""

import re
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from falproxy.limit_settings import (
    CallerLimits,
    format_budget,
    format_rate,
    parse_budget,
    parse_rate,
)
from falproxy.parsers import SECONDS_MAX, parse_age, parse_count, parse_globs
from falproxy.stores.keys import KEY_ID, AccessKey, Expiry, KeyChange, NewKey
from falproxy.stores.ledger.reports import Json, format_time

T = TypeVar("T")

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
NAME_FIELD = "name"
CHANGE_FIELDS = ("expires", "rate", "concurrency", "budget", "endpoints")
ENDPOINTS_MAX, PATTERN_MAX = 50, 200
GRACE_MAX = 30 * 86400.0  # seconds
DATE = re.compile(
    r"\d{4}-\d{2}-\d{2}(?:T\d{2}:\d{2}(?::\d{2}(?:\.\d{1,6})?)?(?:Z|[+-]\d{2}:\d{2})?)?"
)


class KeyFieldError(ValueError):
    """A field is invalid. field: its name. The message continues a sentence after it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class ReservedNameError(Exception):
    """The name is that of an access key of the settings, or of a caller in FALPROXY_ADMINS."""


def key_document(key: AccessKey, now: float) -> Json:
    return {
        "id": key.id,
        "name": key.name,
        "state": key.state(now),
        "creator": key.creator,
        "created_at": format_time(key.created_at),
        "expires_at": format_optional(key.expires_at),
        "revoked_at": format_optional(key.revoked_at),
        "last_used_at": format_optional(key.last_used_at),
        "rate": None if key.limits.rate is None else format_rate(key.limits.rate),
        "concurrency": key.limits.concurrency,
        "budget": None if key.limits.budget is None else format_budget(key.limits.budget),
        "endpoints": list(key.endpoints),
    }


def format_optional(seconds: float | None) -> str | None:
    return None if seconds is None else format_time(seconds)


def parse_new_key(
    fields: Mapping[str, object], creator: str, reserved: Collection[str], now: float
) -> NewKey:
    """Raises: KeyFieldError, ReservedNameError.

    reserved: names that such a key must not have.
    """
    check_fields(fields, (NAME_FIELD, *CHANGE_FIELDS))
    name = fields.get(NAME_FIELD)
    if not isinstance(name, str) or not NAME.fullmatch(name) or KEY_ID.fullmatch(name):
        raise KeyFieldError(
            NAME_FIELD,
            "must have 1 to 64 letters, digits, `.`, `-` or `_`, and begin and end with a letter "
            "or digit",
        )
    if name.lower() in {each.lower() for each in reserved}:
        raise ReservedNameError
    return NewKey(
        name=name,
        creator=creator,
        expiry=parse_expiry(fields.get("expires"), now),
        limits=parse_limits(fields, CallerLimits()),
        endpoints=parse_endpoints(fields.get("endpoints")),
    )


def parse_key_change(fields: Mapping[str, object], key: AccessKey, now: float) -> KeyChange:
    """Return the new values; a field that is missing stays as it is. Raises: KeyFieldError."""
    check_fields(fields, CHANGE_FIELDS)
    return KeyChange(
        expiry=parse_expiry(fields["expires"], now) if "expires" in fields else None,
        limits=parse_limits(fields, key.limits),
        endpoints=parse_endpoints(fields["endpoints"]) if "endpoints" in fields else key.endpoints,
    )


def check_fields(fields: Mapping[str, object], known: Collection[str]) -> None:
    """Raises: KeyFieldError, there is an unknown field: it could be a misspelled limit."""
    for field in fields:
        if field not in known:
            raise KeyFieldError(str(field)[:100], f"is unknown: use {', '.join(known)}")


def parse_expiry(value: object, now: float) -> Expiry:
    """Parse an age from now (`90d`), or a date or time in UTC; None and "" for no end."""
    if value is None or value == "":
        return Expiry()
    try:
        text = value if isinstance(value, str) else ""
        expiry = Expiry(at=to_seconds(text)) if "-" in text else Expiry(after=parse_age(text))
    except (ValueError, OverflowError):
        raise KeyFieldError("expires", "must be like 90d, 12h or 2027-01-31") from None
    after = expiry.after if expiry.at is None else expiry.at - now
    if after is None or not 0 < after <= SECONDS_MAX:
        raise KeyFieldError("expires", "must be in the future, within ten years")
    return expiry


def to_seconds(text: str) -> float:
    """Raises: ValueError, OverflowError."""
    if not DATE.fullmatch(text):
        raise ValueError
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def parse_limits(fields: Mapping[str, object], current: CallerLimits) -> CallerLimits:
    return CallerLimits(
        rate=parse_text(fields, "rate", parse_rate, current.rate),
        concurrency=parse_text(fields, "concurrency", parse_count, current.concurrency),
        budget=parse_text(fields, "budget", parse_budget, current.budget),
    )


def parse_text(
    fields: Mapping[str, object], name: str, parse: Callable[[str], T], current: T | None
) -> T | None:
    """Return the value of a field; `current` if it is missing, None if it is null or empty."""
    if name not in fields:
        return current
    value = fields[name]
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise KeyFieldError(name, "must be a text or a number")
    try:
        return parse(str(value))
    except ValueError as error:
        raise KeyFieldError(name, str(error)) from None


def parse_endpoints(value: object) -> tuple[str, ...]:
    """Parse a list of patterns, or a text with commas. None and empty values: no restriction."""
    if value is None or value in ("", []):
        return ()
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise KeyFieldError("endpoints", "must be a list of patterns")
    patterns = [item.strip() for item in items]
    is_valid = all(0 < len(each) <= PATTERN_MAX and each.isprintable() for each in patterns)
    if not is_valid or len(patterns) > ENDPOINTS_MAX or any("," in each for each in patterns):
        raise KeyFieldError("endpoints", f"must be at most {ENDPOINTS_MAX} patterns")
    try:
        return parse_globs(",".join(patterns))
    except ValueError as error:
        raise KeyFieldError("endpoints", str(error)) from None


def parse_grace(value: object) -> float:
    """Parse the seconds for which a replaced secret stays valid (`1h`); None for none."""
    if value in (None, "", "0", 0):
        return 0.0
    try:
        seconds = parse_age(value if isinstance(value, str) else "")
    except ValueError as error:
        raise KeyFieldError("grace", str(error)) from None
    if seconds > GRACE_MAX:
        raise KeyFieldError("grace", f"must be at most {GRACE_MAX / 86400:g}d")
    return seconds
