"""Statements that undo migrations of the ledger, for tests that apply them again."""

# Of the times and the types of errors of calls.
UNDO_CALL_TIMES = (
    *(
        f"DROP INDEX falproxy_{name}"
        for name in ("entries_by_principal", "entries_failed", "outcomes_failed")
    ),
    *(
        f"ALTER TABLE falproxy_outcomes DROP COLUMN {name}"
        for name in ("error_type", "ended_at", "run_ms", "call_at", "endpoint", "principal")
    ),
    "ALTER TABLE falproxy_entries DROP COLUMN error_type",
    "ALTER TABLE falproxy_entries DROP COLUMN stored_seconds",
    "ALTER TABLE falproxy_outcomes DROP COLUMN stored_seconds",
)
