"""The tables of the case store, and how it is opened: SQLite in WAL mode with every commit synced, or PostgreSQL by URL.

Times are UTC texts of one form, so that they sort; bodies are the bytes that were sent; an answer's cells and blood count
are one Parquet table each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from smearline.errors import DataError

VERSION = 2
_META = sa.MetaData()


def _columns(names: str, kind: Any = sa.String, **options: Any) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, **{"nullable": False, **options}) for name in names.split()]


def _table(name: str, *columns: list[sa.Column[Any]]) -> sa.Table:
    return sa.Table(name, _META, *(column for part in columns for column in part))


_KEY, _NULL, _BYTES = {"primary_key": True}, {"nullable": True}, sa.LargeBinary
_STORE = _table("store", _columns("schema_version", sa.Integer, **_KEY))
CASES = _table("cases", _columns("case_id", **_KEY), _columns("site created_at"), _columns("smear patient", **_NULL))
ANSWERS = _table(
    "answers",
    _columns("answer_id", **_KEY),
    _columns("case_id", index=True),
    _columns("kind site day version origin asked_by received_at"),
    _columns("acquired_at status diagnosis", **_NULL),
    _columns("body cells", _BYTES),
    _columns("counts", _BYTES, **_NULL),
)
OVERRIDES = _table(
    "overrides",
    _columns("number", sa.Integer, **_KEY),
    _columns("case_id", index=True),
    _columns("sha256", **_NULL),  # null: of the case's diagnosis
    _columns("name value reviewer at"),  # name: 'type', 'diagnosis' or a characteristic
    _columns("was comment", **_NULL),
)
SIGNOFFS = _table(
    "signoffs",
    _columns("number", sa.Integer, **_KEY),
    _columns("case_id", index=True),
    _columns("reviewer at answers"),  # answers: the ids of those that were signed off
    _columns("comment data_version", **_NULL),  # data_version: of the data set that took the case in
)
KEYS = _table(
    "idempotency_keys",
    _columns("holder key", **_KEY),
    _columns("request_digest"),
    _columns("answer_id", **_NULL),
    _columns("body", _BYTES, **_NULL),  # of what is no answer
)


def scrub(engine: sa.Engine) -> None:
    """Free pages hold what was deleted until they are written again: SQLite's file is written anew. PostgreSQL's own vacuum does
    so in its time."""
    if engine.dialect.name == "sqlite":
        raw = engine.raw_connection()
        try:
            raw.cursor().execute("VACUUM")
            raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            raw.close()


def stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def opened(url: str) -> sa.Engine:
    """The store at `url`, its tables made where there are none.

    Raises:
        DataError: it is of another schema version.
    """
    engine = sa.create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    with writing(engine) as connection:
        _META.create_all(connection)
        found = connection.scalar(sa.select(_STORE.c.schema_version))
        if found is None:
            connection.execute(_STORE.insert().values(schema_version=VERSION))
        elif found != VERSION:
            shown = engine.url.render_as_string()
            raise DataError(f"{shown} is a case store of version {found}; this smearline reads version {VERSION}")
    return engine


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that writes."""
    with engine.connect().execution_options(smearline_writes=True) as connection, connection.begin():
        yield connection


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions are begun below, as SQLAlchemy's manual has it for SQLite
    for setting in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {setting}")


def _begin_sqlite(connection: sa.Connection) -> None:
    """A writer takes its lock at once: one that reads first cannot be let in behind another, and fails."""
    writes = connection.get_execution_options().get("smearline_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
