"""SQL statements that SQLite and PostgreSQL share. Each replaces `NOW` by its own expression.

Times are integers, in milliseconds since 1970: both databases divide these alike.
"""

from falproxy.stores.ledger import FREE_OUTCOMES, UNFINISHED_STATUSES, GroupBy, Interval
from falproxy.stores.ledger.period_sums import ADD_SUMS, PERIODS_TABLE, SUMS_TABLE
from falproxy.stores.ledger.schema import DialectStatements, Schema

RECORD_COLUMNS = (
    "id", "at", "route", "status", "principal", "user_id", "operation", "endpoint", "request_id",
    "error", "cache", "seconds", "upstream_seconds", "units", "estimated", "settled",
    "proxy_request_id", "error_type", "stored_seconds",
)  # fmt: skip
JOB_COLUMNS = (
    "id", "owner", "user_id", "model", "endpoint", "app", "request_id", "key_mark", "status",
    "images", "error", "error_message", "estimated", "settled", "api", "details", "created_at",
    "updated_at", "finished_at",
)  # fmt: skip

# The columns that the writer of a job sets; the ledger sets the times.
JOB_INPUT_COLUMNS = JOB_COLUMNS[:-3]

# Of the records of calls and jobs.
TABLES = (
    "falproxy_ledger", "falproxy_entries", "falproxy_outcomes", "falproxy_jobs", PERIODS_TABLE,
    SUMS_TABLE,
)  # fmt: skip

STARTS_TABLE = "falproxy_starts"  # of processes

# Each item migrates the schema by one version. Released items are never changed.
MIGRATIONS: tuple[tuple[str | DialectStatements, ...], ...] = (
    (
        """CREATE TABLE falproxy_entries (
            id TEXT PRIMARY KEY, at BIGINT NOT NULL, route TEXT NOT NULL, status BIGINT NOT NULL,
            principal TEXT, user_id TEXT, operation TEXT, endpoint TEXT, request_id TEXT,
            error TEXT, cache TEXT, seconds DOUBLE PRECISION NOT NULL,
            upstream_seconds DOUBLE PRECISION NOT NULL, units TEXT, estimated BIGINT,
            settled BIGINT
        )""",
        "CREATE INDEX falproxy_entries_by_time ON falproxy_entries (at)",
        """CREATE TABLE falproxy_outcomes (
            request_id TEXT PRIMARY KEY, at BIGINT NOT NULL, status BIGINT NOT NULL, error TEXT,
            units TEXT, settled BIGINT
        )""",
        "CREATE INDEX falproxy_outcomes_by_time ON falproxy_outcomes (at)",
        """CREATE TABLE falproxy_jobs (
            id TEXT PRIMARY KEY, owner TEXT NOT NULL, user_id TEXT, model TEXT NOT NULL,
            endpoint TEXT NOT NULL, app TEXT NOT NULL, request_id TEXT, key_mark TEXT NOT NULL,
            status TEXT NOT NULL, images TEXT NOT NULL, error TEXT, error_message TEXT,
            estimated BIGINT, settled BIGINT, created_at BIGINT NOT NULL,
            updated_at BIGINT NOT NULL, finished_at BIGINT, follower TEXT NOT NULL,
            followed_until BIGINT NOT NULL
        )""",
        """CREATE INDEX falproxy_jobs_unfinished ON falproxy_jobs (followed_until)
            WHERE finished_at IS NULL""",
        "CREATE INDEX falproxy_jobs_by_end ON falproxy_jobs (finished_at)",
    ),
    ("ALTER TABLE falproxy_entries ADD COLUMN proxy_request_id TEXT",),
    (
        "ALTER TABLE falproxy_jobs ADD COLUMN api TEXT NOT NULL DEFAULT 'generate'",
        "ALTER TABLE falproxy_jobs ADD COLUMN details TEXT NOT NULL DEFAULT '{}'",
        "CREATE INDEX falproxy_jobs_by_owner ON falproxy_jobs (owner, api, created_at, id)",
    ),
    ADD_SUMS,
    (
        "ALTER TABLE falproxy_entries ADD COLUMN error_type TEXT",
        "ALTER TABLE falproxy_outcomes ADD COLUMN error_type TEXT",
        "ALTER TABLE falproxy_outcomes ADD COLUMN ended_at BIGINT",
        "ALTER TABLE falproxy_outcomes ADD COLUMN run_ms BIGINT",
        "ALTER TABLE falproxy_outcomes ADD COLUMN call_at BIGINT",
        "ALTER TABLE falproxy_outcomes ADD COLUMN endpoint TEXT",
        "ALTER TABLE falproxy_outcomes ADD COLUMN principal TEXT",
        "CREATE INDEX falproxy_entries_by_principal ON falproxy_entries (principal, at)",
        """CREATE INDEX falproxy_entries_failed ON falproxy_entries
            (at, status, error, error_type, endpoint, principal, request_id)
            WHERE status >= 400 OR error IS NOT NULL""",
        """CREATE INDEX falproxy_outcomes_failed ON falproxy_outcomes
            (call_at, status, error, error_type, endpoint, principal)
            WHERE status >= 400""",
    ),
    (
        """CREATE TABLE IF NOT EXISTS falproxy_starts (
            id TEXT PRIMARY KEY, at BIGINT NOT NULL, version TEXT NOT NULL, host TEXT NOT NULL
        )""",
        "CREATE INDEX IF NOT EXISTS falproxy_starts_by_time ON falproxy_starts (at)",
    ),
    (
        "ALTER TABLE falproxy_entries ADD COLUMN stored_seconds DOUBLE PRECISION",
        "ALTER TABLE falproxy_outcomes ADD COLUMN stored_seconds DOUBLE PRECISION",
    ),
)

LEDGER_SCHEMA = Schema("falproxy_ledger", MIGRATIONS, (*TABLES, STARTS_TABLE))


def placeholders(count: int, first: int = 1) -> str:
    return ", ".join(f"${n}" for n in range(first, first + count))


def string_literals(names: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names)


PROBE = "UPDATE falproxy_ledger SET version = version"

ADD_RECORD = f"""
    INSERT INTO falproxy_entries ({", ".join(RECORD_COLUMNS)})
    VALUES ({placeholders(len(RECORD_COLUMNS))})
    ON CONFLICT (id) DO NOTHING
"""
OUTCOME_COLUMNS = (
    "error",
    "units",
    "settled",
    "error_type",
    "ended_at",
    "run_ms",
    "stored_seconds",
)
# Copies from the record of a failed job, so that failures can be read without it. NULL
# if it is not written yet, or has failed itself.
CALL_COLUMNS = {"call_at": "at", "endpoint": "endpoint", "principal": "principal"}
# Columns whose first value is kept.
FIRST_VALUES = ("ended_at", "run_ms", "stored_seconds", *CALL_COLUMNS)


def merged_outcome(column: str) -> str:
    """Return the assignment of a column for a second outcome. It fills in values that are NULL; a
    success replaces all values of a failure."""
    old, new = f"falproxy_outcomes.{column}", f"excluded.{column}"
    known = f"{old}, {new}" if column in FIRST_VALUES else f"{new}, {old}"
    return f"""{column} = CASE WHEN excluded.status < 400 AND falproxy_outcomes.status >= 400
        THEN {new} ELSE COALESCE({known}) END"""


MERGE_OUTCOME = ", ".join(map(merged_outcome, (*OUTCOME_COLUMNS, *CALL_COLUMNS)))
COPIED_VALUES = ", ".join(
    f"""CASE WHEN CAST($2 AS BIGINT) >= 400 THEN (
        SELECT {column} FROM falproxy_entries
        WHERE request_id = CAST($1 AS TEXT) AND status < 400 AND error IS NULL LIMIT 1
    ) END"""
    for column in CALL_COLUMNS.values()
)
ADD_OUTCOME = f"""
    INSERT INTO falproxy_outcomes
        (request_id, status, {", ".join((*OUTCOME_COLUMNS, *CALL_COLUMNS))}, at)
    VALUES ({placeholders(len(OUTCOME_COLUMNS) + 2)}, {COPIED_VALUES}, NOW)
    ON CONFLICT (request_id) DO UPDATE SET status = excluded.status, {MERGE_OUTCOME}
    WHERE falproxy_outcomes.status >= 400 OR excluded.status < 400
"""

ADD_START = """
    INSERT INTO falproxy_starts (id, at, version, host) VALUES ($1, $2, $3, $4)
    ON CONFLICT (id) DO NOTHING
"""

PAGE = "LIMIT $4 OFFSET $5"
# Records with their outcomes.
FROM_OUTCOMES = "LEFT JOIN falproxy_outcomes AS o ON o.request_id = e.request_id"
# Calls without a principal have the empty one, as in the names of groups and in the sums.
IS_OF_PRINCIPAL = "(CAST($3 AS TEXT) IS NULL OR COALESCE(e.principal, '') = CAST($3 AS TEXT))"
FROM_RECORDS = f"""
    FROM falproxy_entries AS e {FROM_OUTCOMES}
    WHERE e.at >= $1 AND e.at < $2 AND {IS_OF_PRINCIPAL}
"""
# Columns of a record that its outcome overrides.
MERGED_COLUMNS = {
    "status": "COALESCE(o.status, e.status)",
    "error": "COALESCE(o.error, e.error)",
    "error_type": "COALESCE(o.error_type, e.error_type)",
    "units": "COALESCE(o.units, e.units)",
    "settled": "COALESCE(o.settled, e.settled)",
    "stored_seconds": "COALESCE(o.stored_seconds, e.stored_seconds)",
}


def merged_column(name: str) -> str:
    return f"{MERGED_COLUMNS.get(name, f'e.{name}')} AS {name}"


SELECT_LATEST = f"""
    SELECT {", ".join(merged_column(name) for name in RECORD_COLUMNS)}
    {FROM_RECORDS} ORDER BY e.at DESC, e.id DESC {PAGE}
"""

# A call with a repeated Idempotency-Key costs nothing, but the cache did not save its cost.
IS_HIT = "COALESCE(cache, '') IN ('hit', 'collapsed')"
IS_REUSED = f"COALESCE(cache, '') IN ({string_literals(FREE_OUTCOMES)})"
PRICE = "COALESCE(settled, estimated)"
SAVED_PRICE = "COALESCE(estimated, settled)"  # a hit may have `settled` 0
TOTALS_COLUMNS = f"""
    COUNT(*) AS calls,
    COUNT(*) FILTER (WHERE status >= 400 OR error IS NOT NULL) AS errors,
    COUNT(*) FILTER (WHERE {IS_HIT}) AS hits,
    COUNT(*) FILTER (WHERE cache = 'miss') AS misses,
    COUNT(*) FILTER (
        WHERE {PRICE} IS NULL AND NOT {IS_REUSED} AND status < 400 AND error IS NULL
    ) AS unpriced,
    CAST(COALESCE(SUM({PRICE}) FILTER (WHERE NOT {IS_REUSED}), 0) AS BIGINT) AS spent,
    CAST(COALESCE(SUM({SAVED_PRICE}) FILTER (WHERE {IS_REUSED}), 0) AS BIGINT) AS saved,
    COALESCE(SUM(seconds), 0.0) AS seconds,
    COALESCE(SUM(upstream_seconds), 0.0) AS upstream_seconds
"""
MILLISECONDS: dict[Interval, int] = {"minute": 60_000, "hour": 3_600_000, "day": 86_400_000}
ORDER_BY_SPENT = "ORDER BY spent DESC, calls DESC, name"
# For each grouping, the expression of the group's name and the order of rows.
GROUP_EXPRESSIONS: dict[GroupBy | None, tuple[str, str]] = {
    None: ("''", ""),
    "endpoint": ("COALESCE(endpoint, '')", ORDER_BY_SPENT),
    "principal": ("COALESCE(principal, '')", ORDER_BY_SPENT),
    "route": ("route", ORDER_BY_SPENT),
    "minute": (f"at / {MILLISECONDS['minute']}", "ORDER BY name"),
    "hour": (f"at / {MILLISECONDS['hour']}", "ORDER BY name"),
    "day": (f"at / {MILLISECONDS['day']}", "ORDER BY name"),
}


OWN_COLUMNS = (
    "at", "route", "principal", "user_id", "endpoint", "cache", "seconds", "upstream_seconds",
    "estimated",
)  # fmt: skip


def merged_columns() -> str:
    """Return the columns that totals are computed from."""
    own = [f"e.{column}" for column in OWN_COLUMNS]
    return ", ".join((*own, *map(merged_column, ("status", "error", "settled"))))


# Rows of one DELETE: other processes wait for the lock of an SQLite file meanwhile.
DELETE_BATCH_SIZE = 1000


def delete_query(table: str, key: str, column: str) -> str:
    return f"""
        DELETE FROM {table} WHERE {key} IN (
            SELECT {key} FROM {table} WHERE {column} < $1 ORDER BY {column}
            LIMIT {DELETE_BATCH_SIZE}
        ) RETURNING 1
    """


DELETE_JOBS = delete_query("falproxy_jobs", "id", "finished_at")
DELETE_QUERIES = (
    delete_query("falproxy_entries", "id", "at"),
    delete_query("falproxy_outcomes", "request_id", "at"),
    DELETE_JOBS,
    delete_query("falproxy_starts", "id", "at"),
)
COUNT_OLD_RECORDS = "SELECT COUNT(*) FROM falproxy_entries WHERE at < $1"
COUNT_OLD_JOBS = "SELECT COUNT(*) FROM falproxy_jobs WHERE finished_at < $1"

JOB_SELECT_LIST = ", ".join(JOB_COLUMNS)
LEASE_PLACEHOLDER = len(JOB_INPUT_COLUMNS) + 1
ADD_JOB = f"""
    INSERT INTO falproxy_jobs
        ({", ".join(JOB_INPUT_COLUMNS)}, follower, followed_until, created_at, updated_at)
    VALUES ({placeholders(len(JOB_INPUT_COLUMNS))}, ${LEASE_PLACEHOLDER},
        NOW + CAST(${LEASE_PLACEHOLDER + 1} AS BIGINT), NOW, NOW)
    ON CONFLICT (id) DO UPDATE SET id = excluded.id
    RETURNING {JOB_SELECT_LIST}
"""
# Mutable columns of a job.
JOB_UPDATE_COLUMNS = (
    "app", "request_id", "key_mark", "status", "images", "error", "error_message", "estimated",
    "settled", "details",
)  # fmt: skip
STATUS_PLACEHOLDER = JOB_UPDATE_COLUMNS.index("status") + 2
SAVE_JOB = f"""
    UPDATE falproxy_jobs SET
        {", ".join(f"{name} = ${n}" for n, name in enumerate(JOB_UPDATE_COLUMNS, start=2))},
        updated_at = NOW,
        finished_at = CASE WHEN CAST(${STATUS_PLACEHOLDER} AS TEXT)
            IN ({string_literals(UNFINISHED_STATUSES)}) THEN NULL ELSE NOW END
    WHERE id = $1 AND finished_at IS NULL
    RETURNING {JOB_SELECT_LIST}
"""
GET_JOB = f"SELECT {JOB_SELECT_LIST} FROM falproxy_jobs WHERE id = $1 AND owner = $2"
DELETE_JOB = "DELETE FROM falproxy_jobs WHERE id = $1 AND owner = $2 RETURNING 1"


def list_jobs_query(comparison: str, order: str) -> str:
    """Return the query of the jobs after a time and an id, which make the order unambiguous."""
    return f"""
        SELECT {JOB_SELECT_LIST} FROM falproxy_jobs
        WHERE owner = $1 AND api = $2
            AND (created_at, id) {comparison} (CAST($3 AS BIGINT), CAST($4 AS TEXT))
        ORDER BY created_at {order}, id {order} LIMIT $5
    """


LIST_JOBS = {False: list_jobs_query("<", "DESC"), True: list_jobs_query(">", "ASC")}
RENEW_JOBS = """
    UPDATE falproxy_jobs SET followed_until = NOW + CAST($2 AS BIGINT)
    WHERE follower = $1 AND finished_at IS NULL
"""
# The condition appears twice: PostgreSQL evaluates the outer one again after it has waited for the
# lock of a row that another process claims.
CLAIM_JOBS = f"""
    UPDATE falproxy_jobs SET follower = $1, followed_until = NOW + CAST($2 AS BIGINT)
    WHERE finished_at IS NULL AND followed_until <= NOW AND id IN (
        SELECT id FROM falproxy_jobs
        WHERE finished_at IS NULL AND followed_until <= NOW AND api = $4
        ORDER BY created_at LIMIT $3
    )
    RETURNING {JOB_SELECT_LIST}
"""
