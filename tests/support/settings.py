"""Settings of a proxy under test, by flat names."""

from dataclasses import fields
from typing import Any

from falproxy.settings import GROUPS, Settings

# Fields whose flat name is not the field's own name → group and field.
RENAMED = {
    "upstream_timeout": ("upstream", "timeout"),
    "upstream_origin": ("upstream", "origin"),
    "image_formats": ("images", "formats"),
    "check_remote_images": ("images", "check_remote"),
    "cache": ("cache", "enabled"),
    "cache_endpoints": ("cache", "endpoints"),
    "cache_ttl": ("cache", "ttl"),
    "cache_scope": ("cache", "scope"),
    "cache_max_entry": ("cache", "max_entry"),
    "cache_max_size": ("cache", "max_size"),
    "rehost": ("storage", "backend"),
    "rehost_on_error": ("storage", "on_error"),
    "ledger_retention": ("ledger", "retention"),
}
RENAMED_FIELDS = {*RENAMED.values()}
# Flat name → group and field, for all fields of all groups.
PLACES = RENAMED | {
    field.name: (name, field.name)
    for name, group in GROUPS.items()
    for field in fields(group)
    if (name, field.name) not in RENAMED_FIELDS
}
UNGROUPED = {field.name for field in fields(Settings)} - {*GROUPS}


def make_settings(**flat: Any) -> Settings:
    """Create settings without writing down the groups: `make_settings(cache_ttl=5.0)`.

    Raises: TypeError, there is no such setting.
    """
    values: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    for name, value in flat.items():
        if name in UNGROUPED:
            values[name] = value
        elif name in PLACES:
            group, field = PLACES[name]
            groups[group][field] = value
        else:
            raise TypeError(f"There is no setting {name!r}")
    return Settings(**values, **{name: GROUPS[name](**given) for name, given in groups.items()})
