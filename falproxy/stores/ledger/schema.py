"""Tables of one kind of data, and their versions. A database can have several schemas."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schema:
    """Tables with a common version.

    version_table: has one row, with the number of migrations that were applied.
    migrations: each item migrates the schema by one version. Released items are never changed.
    tables: all of them.
    """

    version_table: str
    migrations: tuple[tuple[str, ...], ...]
    tables: tuple[str, ...]

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
