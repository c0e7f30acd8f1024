"""Tables of one kind of data, and their versions. A database can have several schemas.

Nodes of two versions use the same database while one is replaced by the other, and after a
roll-back. So a migration adds tables, columns that may be left out, and indexes; then the older
version works with the newer schema. A migration that older versions cannot work with raises
`min_reader` to its own number, and needs a stop of all nodes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

SqlDialect = Literal["sqlite", "postgres"]

# Beside the version tables, whose only column older versions write. A row is valid for the version
# in it.
READERS_TABLE = "falproxy_min_readers"
CREATE_READERS_TABLE = f"""
    CREATE TABLE IF NOT EXISTS {READERS_TABLE} (
        version_table TEXT PRIMARY KEY, version BIGINT NOT NULL, min_reader BIGINT NOT NULL
    )
"""
SELECT_MIN_READER = f"""
    SELECT min_reader FROM {READERS_TABLE} WHERE version_table = $1 AND version = $2
"""
DELETE_MIN_READER = f"DELETE FROM {READERS_TABLE} WHERE version_table = $1"
INSERT_MIN_READER = f"""
    INSERT INTO {READERS_TABLE} (version_table, version, min_reader) VALUES ($1, $2, $3)
"""


class DialectStatements(NamedTuple):
    """Statements of a migration that differ between the databases, such as triggers."""

    sqlite: tuple[str, ...]
    postgres: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Schema:
    """Tables with a common version.

    version_table: has one row, with the number of migrations that were applied.
    migrations: each item migrates the schema by one version. Released items are never changed.
    tables: all of them.
    min_reader: the oldest version of falproxy, as its number of migrations, that works with the
        newest schema.
    """

    version_table: str
    migrations: tuple[tuple[str | DialectStatements, ...], ...]
    tables: tuple[str, ...]
    min_reader: int = 1

    def migrations_after(self, version: int, dialect: SqlDialect) -> list[str]:
        """Return the statements that migrate a schema of this version to the newest."""
        statements: list[str] = []
        for migration in self.migrations[version:]:
            for each in migration:
                statements += (each,) if isinstance(each, str) else getattr(each, dialect)
        return statements

    @property
    def select_version(self) -> str:
        return f"SELECT version FROM {self.version_table}"

    @property
    def create_version_table(self) -> str:
        return f"CREATE TABLE IF NOT EXISTS {self.version_table} (version BIGINT NOT NULL)"

    @property
    def delete_version(self) -> str:
        return f"DELETE FROM {self.version_table}"

    @property
    def insert_version(self) -> str:
        return f"INSERT INTO {self.version_table} (version) VALUES ($1)"
