"""Statements that undo migrations of the ledger, for tests that apply them again."""

# Of the times to store files.
UNDO_STORED_SECONDS = tuple(
    f"ALTER TABLE {table} DROP COLUMN stored_seconds"
    for table in ("falproxy_entries", "falproxy_outcomes")
)
# Of the times and the types of errors of calls, and of what came later.
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
    *UNDO_STORED_SECONDS,
)
