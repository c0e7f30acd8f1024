"""Queries of totals, from the sums of periods (`period_sums`) and from the records of open ones.

The largest periods inside the time range come first. Of those that are open, or contain a limit of
the range, the periods they consist of are used, and of such hours the records. Each query is one
statement, so that it sees all of this in one state.
"""

from collections.abc import Sequence
from itertools import pairwise

from falproxy.stores.ledger import GroupBy, Interval
from falproxy.stores.ledger.period_sums import DAY, HOUR, MONTH, PERIODS
from falproxy.stores.ledger.statements import (
    FROM_OUTCOMES,
    GROUP_EXPRESSIONS,
    IS_OF_PRINCIPAL,
    MILLISECONDS,
    ORDER_BY_SPENT,
    PAGE,
    TOTALS_COLUMNS,
    merged_columns,
)

INTEGER_COLUMNS = ("calls", "errors", "hits", "misses", "unpriced", "spent", "saved")
FLOAT_COLUMNS = ("seconds", "upstream_seconds")
TOTALS_NAMES = ", ".join((*INTEGER_COLUMNS, *FLOAT_COLUMNS))
# Totals of totals.
SUM_COLUMNS = ", ".join(
    [f"CAST(SUM({name}) AS BIGINT) AS {name}" for name in INTEGER_COLUMNS]
    + [f"SUM({name}) AS {name}" for name in FLOAT_COLUMNS]
)
SUMMARY_GROUPS: tuple[GroupBy, ...] = ("endpoint", "principal", "route")
SINCE, UNTIL = "CAST($1 AS BIGINT)", "CAST($2 AS BIGINT)"


def division(period: int, unit: int) -> str:
    """Return the subquery of the ranges that are divided into units: of periods that are open or
    contain a limit of the time range. first, last: numbers of units, `last` exclusive."""
    start, end = f"number * {period}", f"(number + 1) * {period}"
    return f"""(
        SELECT
            (CASE WHEN {start} < {SINCE} THEN {SINCE} + {unit - 1} ELSE {start} END) / {unit}
                AS first,
            (CASE WHEN {end} > {UNTIL} THEN {UNTIL} ELSE {end} END) / {unit} AS last
        FROM (
            SELECT {SINCE} / {period} AS number WHERE {SINCE} % {period} <> 0
            UNION SELECT {UNTIL} / {period} WHERE {UNTIL} % {period} <> 0
            UNION SELECT number FROM falproxy_open_periods
            WHERE length = {period}
                AND number >= {SINCE} / {period} AND number <= {UNTIL} / {period}
        ) AS divided
    ) AS division"""


def whole_range(unit: int) -> str:
    return f"""(
        SELECT ({SINCE} + {unit - 1}) / {unit} AS first, {UNTIL} / {unit} AS last
    ) AS division"""


def records(period: int | None) -> str:
    """Return the subquery of the records that no sums are used for.

    period: the shortest of the periods whose sums are used.
    """
    source = whole_range(1) if period is None else division(period, 1)
    return f"""(
        SELECT {merged_columns()}
        FROM {source} CROSS JOIN falproxy_entries AS e {FROM_OUTCOMES}
        WHERE e.at >= division.first AND e.at < division.last AND {IS_OF_PRINCIPAL}
    ) AS merged"""


def sums(kind: str, names: str, periods: Sequence[int]) -> list[str]:
    """Return the queries of the sums that are used.

    names: expressions of the groups' names.
    periods: those whose sums are used, in ascending order.
    """
    sources = [
        *(division(longer, length) for length, longer in pairwise(periods)),
        *(whole_range(length) for length in periods[-1:]),
    ]
    return [
        f"""
        SELECT {names}, {TOTALS_NAMES}
        FROM {source} CROSS JOIN falproxy_sums AS s
        WHERE s.kind = '{kind}' AND s.length = {length}
            AND s.number >= division.first AND s.number < division.last
            AND (CAST($3 AS TEXT) IS NULL OR s.principal = CAST($3 AS TEXT))
            AND NOT EXISTS (
                SELECT 1 FROM falproxy_open_periods AS o
                WHERE o.length = s.length AND o.number = s.number
            )
        """
        for length, source in zip(periods, sources, strict=True)
    ]


# For each grouping, the kind of its sums, the expression of the name, and the periods.
INTERVAL_PERIODS: dict[Interval, tuple[int, ...]] = {
    "minute": (),
    "hour": (HOUR,),
    "day": (HOUR, DAY),
}
GROUP_SUMS: dict[GroupBy | None, tuple[str, str, Sequence[int]]] = {
    None: ("route", "''", PERIODS),
    "endpoint": ("endpoint", "s.name", PERIODS),
    "principal": ("route", "s.principal", PERIODS),
    "route": ("route", "s.name", PERIODS),
    **{
        interval: ("route", f"s.number * s.length / {MILLISECONDS[interval]}", periods)
        for interval, periods in INTERVAL_PERIODS.items()
    },
}


def totals_query(by: GroupBy | None) -> str:
    name, order = GROUP_EXPRESSIONS[by]
    kind, sums_name, periods = GROUP_SUMS[by]
    parts = (
        f"SELECT {name} AS name, {TOTALS_COLUMNS} FROM {records(next(iter(periods), None))} "
        "GROUP BY 1",
        *sums(kind, f"{sums_name} AS name", periods),
    )
    return f"""
        SELECT name, {SUM_COLUMNS} FROM ({" UNION ALL ".join(parts)}) AS parts
        GROUP BY name {order} {PAGE}
    """


TOTALS_QUERIES = {by: totals_query(by) for by in GROUP_SUMS}
USER_PARTS = (
    f"""
    SELECT COALESCE(principal, '') AS caller, COALESCE(user_id, '') AS name, {TOTALS_COLUMNS}
    FROM {records(HOUR)} GROUP BY 1, 2
    """,
    *sums("user", "s.principal AS caller, s.name AS name", PERIODS),
)
USER_TOTALS_QUERY = f"""
    SELECT caller, name, {SUM_COLUMNS} FROM ({" UNION ALL ".join(USER_PARTS)}) AS parts
    GROUP BY caller, name {ORDER_BY_SPENT}, caller {PAGE}
"""


def summary_query(interval: Interval) -> str:
    """Return the query of all summaries. It scans the records once, and computes the summaries
    from the totals of each combination of groups."""
    names = ", ".join(
        f"{GROUP_EXPRESSIONS[by][0]} AS {by}_name" for by in (interval, *SUMMARY_GROUPS)
    )
    periods = INTERVAL_PERIODS[interval]
    parts = []
    for by in (interval, *SUMMARY_GROUPS):
        kind, sums_name, longest = GROUP_SUMS[by]
        used = longest if periods else ()  # otherwise all records are scanned for the intervals
        rows = [f"SELECT {by}_name AS name, {TOTALS_NAMES} FROM summed"]
        rows += sums(kind, f"{sums_name} AS name", used)
        order = GROUP_EXPRESSIONS[by][1]
        parts.append(f"""SELECT * FROM (
            SELECT '{by}' AS part, CAST(name AS TEXT) AS name, {SUM_COLUMNS}
            FROM ({" UNION ALL ".join(rows)}) AS rows_by_{by} GROUP BY name {order} {PAGE}
        ) AS by_{by}""")
    return f"""
        WITH summed AS MATERIALIZED (
            SELECT {names}, {TOTALS_COLUMNS} FROM {records(next(iter(periods), None))}
            GROUP BY 1, 2, 3, 4
        )
        {" UNION ALL ".join(parts)}
    """


SUMMARY_QUERIES = {step: summary_query(step) for step in MILLISECONDS}

HAS_OPEN_PERIODS = """
    SELECT 1 FROM falproxy_open_periods WHERE (number + 1) * length <= CAST($1 AS BIGINT) LIMIT 1
"""
# The statements that compute sums. Their parameter is the number of a period.
SELECT_OPEN_PERIODS = {
    length: f"""
        SELECT number FROM falproxy_open_periods AS o
        WHERE length = {length} AND number < CAST($1 AS BIGINT) / {length} {is_divided}
        ORDER BY number LIMIT $2
    """
    for length, is_divided in {
        HOUR: "",
        **{
            longer: f"""AND NOT EXISTS (
                SELECT 1 FROM falproxy_open_periods AS i WHERE i.length = {length}
                    AND i.number >= o.number * {longer // length}
                    AND i.number < (o.number + 1) * {longer // length}
            )"""
            for length, longer in ((HOUR, DAY), (DAY, MONTH))
        },
    }.items()
}
NUMBER = "CAST($1 AS BIGINT)"
SUM_GROUPS = {"endpoint": "endpoint_name", "route": "route_name", "user": "user_name"}
INSERT_SUMS = f"INSERT INTO falproxy_sums (kind, length, number, principal, name, {TOTALS_NAMES})"
SUM_RECORDS = f"""
    {INSERT_SUMS}
    WITH summed AS MATERIALIZED (
        SELECT COALESCE(principal, '') AS principal_name, COALESCE(endpoint, '') AS endpoint_name,
            route AS route_name, COALESCE(user_id, '') AS user_name, {TOTALS_COLUMNS}
        FROM (
            SELECT {merged_columns()} FROM falproxy_entries AS e {FROM_OUTCOMES}
            WHERE e.at >= {NUMBER} * {HOUR} AND e.at < ({NUMBER} + 1) * {HOUR}
        ) AS merged
        GROUP BY 1, 2, 3, 4
    )
    {
    " UNION ALL ".join(
        f'''SELECT '{kind}', {HOUR}, {NUMBER}, principal_name, {name}, {SUM_COLUMNS}
        FROM summed GROUP BY principal_name, {name}'''
        for kind, name in SUM_GROUPS.items()
    )
}
"""


def sum_sums(length: int, longer: int) -> str:
    kinds = ", ".join(f"'{kind}'" for kind in SUM_GROUPS)
    ratio = longer // length
    return f"""
        {INSERT_SUMS}
        SELECT kind, {longer}, {NUMBER}, principal, name, {SUM_COLUMNS} FROM falproxy_sums
        WHERE kind IN ({kinds}) AND length = {length}
            AND number >= {NUMBER} * {ratio} AND number < ({NUMBER} + 1) * {ratio}
        GROUP BY kind, principal, name
    """


def delete_sums(length: int) -> str:
    kinds = ", ".join(f"'{kind}'" for kind in SUM_GROUPS)
    return f"""
        DELETE FROM falproxy_sums
        WHERE kind IN ({kinds}) AND length = {length} AND number = {NUMBER}
    """


def close_period(length: int) -> str:
    return f"DELETE FROM falproxy_open_periods WHERE length = {length} AND number = {NUMBER}"


# In this order: the sums of a period are computed from those of the shorter ones.
SUM_STATEMENTS = {
    length: (delete_sums(length), insert, close_period(length))
    for length, insert in {
        HOUR: SUM_RECORDS,
        DAY: sum_sums(HOUR, DAY),
        MONTH: sum_sums(DAY, MONTH),
    }.items()
}
