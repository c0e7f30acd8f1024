"""Tables of sums over hours, days and months, from which totals are computed instead of records.

A period is open from a change of its records, or of their outcomes, until its sums are computed
again. Triggers open periods in the transaction of the change, so that those of older versions of
falproxy are not missed. Sums of open periods are not used. The day of an open hour is open.
"""

from falproxy.stores.ledger.schema import DialectStatements

# Milliseconds of each kind of period; each is a multiple of the one before. Triggers have the same
# numbers: other ones need a migration.
HOUR, DAY, MONTH = 3_600_000, 86_400_000, 30 * 86_400_000
PERIODS = (HOUR, DAY, MONTH)
PERIODS_TABLE, SUMS_TABLE = "falproxy_open_periods", "falproxy_sums"

PERIOD_LENGTHS = """(
    SELECT CAST(3600000 AS BIGINT) AS length
    UNION ALL SELECT 86400000 UNION ALL SELECT 2592000000
) AS p"""


def open_periods(at: str, source: str) -> str:
    """Return the statement that opens all periods of times.

    at: expression of the times, in milliseconds.
    source: start of a FROM clause, or nothing.
    """
    return f"""
        INSERT INTO falproxy_open_periods (length, number)
        SELECT DISTINCT p.length, {at} / p.length FROM {source} {PERIOD_LENGTHS}
        WHERE {{}} NOT EXISTS (
            SELECT 1 FROM falproxy_open_periods AS o
            WHERE o.length = p.length AND o.number = {at} / p.length
        )
    """


# Whether the hour of a time is open, and so its day and its month.
IS_OPEN = """EXISTS (
    SELECT 1 FROM falproxy_open_periods AS o
    WHERE o.length = 3600000 AND o.number = {} / 3600000
)"""
ITS_RECORDS = "falproxy_entries AS e WHERE e.request_id = NEW.request_id"
OF_ALL_RECORDS = open_periods(
    "e.at", "(SELECT DISTINCT at / 3600000 * 3600000 AS at FROM falproxy_entries) AS e CROSS JOIN"
).format("")
OF_ITS_RECORDS = open_periods("e.at", "falproxy_entries AS e CROSS JOIN").format(
    "e.request_id = NEW.request_id AND"
)
# Name → table, events, condition, statement. In most cases the condition is false.
TRIGGERS = {
    "falproxy_record_added": (
        "falproxy_entries",
        ("INSERT",),
        f"NOT {IS_OPEN.format('NEW.at')}",
        open_periods("NEW.at", "").format(""),
    ),
    "falproxy_record_deleted": (
        "falproxy_entries",
        ("DELETE",),
        f"NOT {IS_OPEN.format('OLD.at')}",
        open_periods("OLD.at", "").format(""),
    ),
    "falproxy_outcome_changed": (
        "falproxy_outcomes",
        ("INSERT", "UPDATE"),
        f"EXISTS (SELECT 1 FROM {ITS_RECORDS} AND NOT {IS_OPEN.format('e.at')})",
        OF_ITS_RECORDS,
    ),
}
SQLITE_TRIGGERS = tuple(
    f"""CREATE TRIGGER IF NOT EXISTS {name}_{event.lower()} AFTER {event} ON {table}
        WHEN {condition} BEGIN {statement}; END"""
    for name, (table, events, condition, statement) in TRIGGERS.items()
    for event in events
)
# The lock is held until the end of the transaction. Without it, a process could compute the sums of
# a period, and close it, while a new record is not committed and so not visible to it.
POSTGRES_TRIGGERS = tuple(
    each
    for name, (table, events, condition, statement) in TRIGGERS.items()
    for each in (
        f"""CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_advisory_xact_lock_shared(7065834220);
            IF {condition} THEN {statement} ON CONFLICT DO NOTHING; END IF;
            RETURN NULL;
        END $$""",
        f"DROP TRIGGER IF EXISTS {name} ON {table}",
        f"""CREATE TRIGGER {name} AFTER {" OR ".join(events)} ON {table}
            FOR EACH ROW EXECUTE FUNCTION {name}()""",
    )
)
CREATE_SUMS = """
    CREATE TABLE IF NOT EXISTS falproxy_sums (
        kind TEXT NOT NULL, length BIGINT NOT NULL, number BIGINT NOT NULL,
        principal TEXT NOT NULL, name TEXT NOT NULL, calls BIGINT NOT NULL,
        errors BIGINT NOT NULL, hits BIGINT NOT NULL, misses BIGINT NOT NULL,
        unpriced BIGINT NOT NULL, spent BIGINT NOT NULL, saved BIGINT NOT NULL,
        seconds DOUBLE PRECISION NOT NULL, upstream_seconds DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (kind, length, number, principal, name)
    )"""
# Can be applied again. It reads all records once: the periods of existing ones are open.
ADD_SUMS: tuple[str | DialectStatements, ...] = (
    """CREATE INDEX IF NOT EXISTS falproxy_entries_by_request ON falproxy_entries (request_id)
        WHERE request_id IS NOT NULL""",
    """CREATE TABLE IF NOT EXISTS falproxy_open_periods (
        length BIGINT NOT NULL, number BIGINT NOT NULL, PRIMARY KEY (length, number)
    )""",
    DialectStatements(sqlite=(f"{CREATE_SUMS} WITHOUT ROWID",), postgres=(CREATE_SUMS,)),
    DialectStatements(sqlite=SQLITE_TRIGGERS, postgres=POSTGRES_TRIGGERS),
    OF_ALL_RECORDS,
)
