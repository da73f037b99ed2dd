"""The case store: what was asked, answered, overridden and signed off; written and synced before an answer is given.

Images lie beside the store, in append-only shards incoming/SITE/DAY/SITE-ANSWER-DIGEST.parquet (smearline.dataset.CELLS),
DAY being the day they arrived. A shard is written before its answer is committed: a crash leaves at worst a shard that no
answer names, and `purge` removes it.
"""

import hashlib
import io
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from serving.case_tables import ANSWERS, CASES, KEYS, OVERRIDES, SIGNOFFS, opened, scrub, stamp, writing
from smearline import cbc, dataset, sites, vocabulary
from smearline.errors import DataError, SiteError

STORE_VARIABLE, HOME_VARIABLE = "SMEARLINE_STORE", "SMEARLINE_HOME"


class KeyReused(DataError):
    """An idempotency key that came with another request before."""


class CaseConflict(DataError):
    """A smear that was sent before as another patient's; a sign-off of what has changed meanwhile."""


@dataclass(frozen=True)
class Key:
    """An Idempotency-Key of one token holder, with the digest of the request it came with."""

    holder: str
    key: str
    request_digest: str


@dataclass(frozen=True)
class Case:
    """Whose cells they are; pseudonyms."""

    case_id: str
    site: str
    smear: str | None
    patient: str | None


@dataclass(frozen=True)
class Answer:
    """What is kept of an answer beside its cells."""

    answer_id: str
    kind: str
    version: str
    origin: str
    asked_by: str
    received_at: datetime
    acquired_at: datetime | None
    body: bytes
    status: str | None = None
    diagnosis: str | None = None


@dataclass(frozen=True)
class SignedCell:
    sha256: str
    type: str
    overridden: bool
    characteristics: Mapping[str, str] = field(default_factory=dict)
    """Those that the reviewer set: what nobody looked at is no label."""
    looked_at: bool = True
    """False where the model left the cell unidentified, and the reviewer gave it no type: a sign-off makes no label of it."""
    named: bool = True
    """Whether the model named it."""
    version: str = ""
    """Of the package that answered."""


@dataclass(frozen=True)
class SignedCase:
    """A case as it was at its last sign-off."""

    case_id: str
    site: str
    patient: str | None
    smear: str | None
    reviewer: str
    signed_at: datetime
    number: int
    """Of the sign-off."""
    diagnosis: str | None
    """The reviewer's, else the answer's own, which the sign-off confirmed; None where the model abstained."""
    cells: tuple[SignedCell, ...]
    counts: pa.Table
    """Of smearline.cbc.COUNTS."""
    shards: tuple[Path, ...]
    """Those that are still there."""


def case_of(site: str, smear: str) -> str:
    """The id of a smear's case, from the site's name and the smear's pseudonym."""
    return hashlib.sha256(f"{site}/{smear}".encode()).hexdigest()[:24]


class CaseStore:
    """Cases, answers, overrides and sign-offs.

    Args:
        url: SQLAlchemy's; None is $SMEARLINE_STORE, or cases.sqlite in `home`.
        home: where incoming/ and log/ lie; None is $SMEARLINE_HOME, or .smearline/service here.

    Raises:
        DataError: the store is of another schema version.
    """

    def __init__(self, url: str | None = None, home: Path | None = None) -> None:
        self.home = (home or Path(os.environ.get(HOME_VARIABLE) or ".smearline/service")).absolute()
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._engine = opened(url or os.environ.get(STORE_VARIABLE) or f"sqlite:///{self.home / 'cases.sqlite'}")

    def _rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    # What the service does

    def stored(self, key: Key) -> bytes | None:
        """The body that was given for this key before. Raises KeyReused where it came with another request."""
        with self._engine.connect() as connection:
            return _stored(connection, key)

    def add(
        self,
        case: Case,
        answer: Answer,
        cells: pa.Table,
        images: Sequence[Mapping[str, Any]],
        counts: pd.DataFrame | None = None,
        key: Key | None = None,
    ) -> bytes:
        """Keep an answer, its cells (recognition.table_of), images (rows of CELLS) and blood count (COUNTS).

        Returns:
            The body to give: another's, where the key was served meanwhile.

        Raises:
            KeyReused: the key came with another request before.
            CaseConflict: the smear belongs to another patient.
        """
        self._keep_images(case, answer, images)
        received, acquired = stamp(answer.received_at), answer.acquired_at and stamp(answer.acquired_at)
        times = {"received_at": received, "acquired_at": acquired, "day": (acquired or received)[:10]}
        blood = None if counts is None else _parquet(pa.Table.from_pandas(counts, cbc.COUNTS, preserve_index=False))
        tables = {"cells": _parquet(cells), "counts": blood}
        row = {**asdict(answer), **times, **tables, "case_id": case.case_id, "site": case.site}

        def write(connection: sa.Connection) -> None:
            same = CASES.c.case_id == case.case_id
            found = connection.execute(sa.select(CASES.c.patient).where(same)).first()
            if found is None:
                connection.execute(CASES.insert().values(**asdict(case), created_at=received))
            elif case.patient and found.patient is None:
                connection.execute(CASES.update().where(same).values(patient=case.patient))
            elif case.patient and found.patient != case.patient:
                raise CaseConflict("this smear was sent before with another patient; correct the one or the other")
            # The answer that is kept last is the last, whenever its request came.
            of_case = sa.select(sa.func.max(ANSWERS.c.received_at)).where(ANSWERS.c.case_id == case.case_id)
            last = connection.scalar(of_case)
            if last and last >= received:
                row["received_at"] = stamp(datetime.fromisoformat(last) + timedelta(microseconds=1))
            connection.execute(ANSWERS.insert().values(row))

        return self._once(key, answer.body, write, answer.answer_id)

    def review(
        self,
        case_id: str,
        body: bytes,
        overrides: Sequence[Mapping[str, Any]] = (),
        sign_off: Mapping[str, Any] | None = None,
        key: Key | None = None,
        answer_id: str | None = None,
    ) -> bytes:
        """Keep overrides (sha256, name, value, was, reviewer, at, comment) and a sign-off (reviewer, at, comment) of the case up
        to the answer `answer_id`; the body to give as `add`.

        Raises:
            CaseConflict: to be signed off is what the reviewer has not seen: the case has a newer answer.
        """

        def write(connection: sa.Connection) -> None:
            for row in overrides:
                connection.execute(OVERRIDES.insert().values(case_id=case_id, **row))
            if sign_off is not None:
                mine = sa.select(ANSWERS.c.answer_id).where(ANSWERS.c.case_id == case_id)
                answers = list(connection.scalars(mine.order_by(ANSWERS.c.received_at)))
                if not answers or answers[-1] != answer_id:
                    raise CaseConflict("an answer came meanwhile; read the case again before you sign it off")
                kept = {"answers": " ".join(answers), **sign_off}
                connection.execute(SIGNOFFS.insert().values(case_id=case_id, **kept))

        return self._once(key, body, write, None)

    def _once(
        self, key: Key | None, body: bytes, write: Callable[[sa.Connection], None], answer_id: str | None
    ) -> bytes:
        for attempt in (1, 2, 3):
            try:
                with writing(self._engine) as connection:
                    if key and (before := _stored(connection, key)) is not None:
                        return before
                    write(connection)
                    if key:
                        kept = {"answer_id": answer_id, "body": None if answer_id else body}
                        connection.execute(KEYS.insert().values(**asdict(key), **kept))
                return body
            except sa.exc.IntegrityError:  # another process made the same case or key first: look again
                if attempt == 3:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _keep_images(self, case: Case, answer: Answer, images: Sequence[Mapping[str, Any]]) -> None:
        folder = self.home / "incoming" / case.site / stamp(answer.received_at)[:10]
        new = [] if folder.exists() else [folder.parent, folder.parent.parent]
        with dataset.CellWriter(folder, f"{case.site}-{answer.answer_id}") as writer:
            for row in images:
                writer.add(row)
        if images:
            for path in (folder, *new):  # the shards themselves are synced as they are written
                _sync(path)

    def case(self, case_id: str) -> dict[str, Any] | None:
        """A case with its answers (without their tables), overrides and signoffs, oldest first; None: there is none."""
        found = self._rows(sa.select(CASES).where(CASES.c.case_id == case_id))
        for table, order in ((ANSWERS, "received_at"), (OVERRIDES, "number"), (SIGNOFFS, "number")):
            columns = [c for c in table.c if c.name not in ("cells", "counts")]
            query = sa.select(*columns).where(table.c.case_id == case_id).order_by(order)
            for row in found:
                row[table.name] = self._rows(query)
        return found[0] if found else None

    def predictions(self, case_id: str) -> pd.DataFrame:
        """The cells of a case, a row a sha256, as its last answer that has it says."""
        return _predictions(self._answers(case_id))

    def _answers(self, case_id: str) -> list[dict[str, Any]]:
        return self._rows(sa.select(ANSWERS).where(ANSWERS.c.case_id == case_id).order_by(ANSWERS.c.received_at))

    # What the flows do

    def answer(self, answer_id: str) -> dict[str, Any]:
        """An answer's row with its case: body, version, received_at, site, case_id, smear, patient, ...

        Raises:
            DataError: there is none of this id.
        """
        columns = [c for c in ANSWERS.c if c.name not in ("cells", "counts")]
        query = sa.select(*columns, CASES.c.smear, CASES.c.patient).join(CASES, ANSWERS.c.case_id == CASES.c.case_id)
        found = self._rows(query.where(ANSWERS.c.answer_id == answer_id))
        if not found:
            raise DataError(f"the case store has no answer '{answer_id}'")
        return found[0]

    def export_log(self) -> list[Path]:
        """Write the inference log, log/SITE/DAY.parquet in the store's home, a row a recognised cell.

        Only days that gained an answer since are written again; returns their paths.
        """
        out, site, day, written = self.home / "log", ANSWERS.c.site, ANSWERS.c.day, []
        last = sa.func.max(ANSWERS.c.received_at).label("last")
        for group in self._rows(sa.select(site, day, sa.func.count().label("num"), last).group_by(site, day)):
            path, state = out / group["site"] / f"{group['day']}.parquet", f"{group['num']} {group['last']}".encode()
            if path.exists() and (pq.read_schema(path).metadata or {}).get(b"smearline.answers") == state:
                continue
            query = sa.select(ANSWERS).where(site == group["site"], day == group["day"])
            logged = [_logged(row) for row in self._rows(query.order_by(ANSWERS.c.received_at))]
            table = pa.concat_tables(logged, promote_options="default")
            dataset.write_table(table.replace_schema_metadata({"smearline.answers": state}), path, compression="zstd")
            written.append(path)
        return written

    def counts(self, case_ids: Collection[str]) -> pd.DataFrame:
        """Rows of cbc.COUNTS that came with these cases; of a case that sent several, the last."""
        query = sa.select(ANSWERS.c.case_id, ANSWERS.c.counts).where(ANSWERS.c.counts.is_not(None))
        last = {row["case_id"]: row["counts"] for row in self._rows(query.order_by(ANSWERS.c.received_at))}
        tables = [_table(last[case]) for case in sorted(set(case_ids) & set(last))]
        return pa.concat_tables(tables or [cbc.COUNTS.empty_table()]).to_pandas()

    def signed_off(self, not_ingested: bool = True) -> list[SignedCase]:
        """The cases that a reviewer signed off, each as it was at its last sign-off."""
        query = sa.select(SIGNOFFS, CASES.c.site, CASES.c.smear, CASES.c.patient)
        query = query.join(CASES, SIGNOFFS.c.case_id == CASES.c.case_id).order_by(SIGNOFFS.c.number)
        last = {row["case_id"]: row for row in self._rows(query)}
        return [self._signed(row) for row in last.values() if not (not_ingested and row["data_version"])]

    def _signed(self, row: Mapping[str, Any]) -> SignedCase:
        case_id, signed = row["case_id"], row["answers"].split()
        said: dict[str | None, dict[str, str]] = {}
        query = sa.select(OVERRIDES).where(OVERRIDES.c.case_id == case_id, OVERRIDES.c.at <= row["at"])
        for override in self._rows(query.order_by(OVERRIDES.c.number)):
            said.setdefault(override["sha256"], {})[override["name"]] = override["value"]
        answers, cells = [a for a in self._answers(case_id) if a["answer_id"] in signed], []
        words = vocabulary.load().characteristics
        for cell in _predictions(answers).itertuples():
            named = dict(said.get(cell.sha256, {}))
            final = named.pop("type", cell.predicted_type)
            named = {n: v for n, v in named.items() if final in words[n].applies_to}
            model_named = getattr(cell, "named", None) is not False
            looked_at = model_named or "type" in said.get(cell.sha256, {})
            about = (looked_at, model_named, cell.version)
            cells.append(SignedCell(cell.sha256, final, final != cell.predicted_type, named, *about))
        counts = [_table(a["counts"]) for a in answers if a["counts"]]
        own = next((a["diagnosis"] for a in reversed(answers) if a["kind"] == "diagnose"), None)
        return SignedCase(
            **{name: row[name] for name in ("case_id", "site", "patient", "smear", "reviewer")},
            signed_at=datetime.fromisoformat(row["at"]),
            number=row["number"],
            diagnosis=said.get(None, {}).get("diagnosis", own),
            cells=tuple(cells),
            counts=counts[-1] if counts else cbc.COUNTS.empty_table(),
            shards=tuple(path for answer in answers for path in self._shards(answer)),
        )

    def _shards(self, answer: Mapping[str, Any]) -> list[Path]:
        folder = self.home / "incoming" / answer["site"]
        return sorted(folder.glob(f"*/{answer['site']}-{answer['answer_id']}-*.parquet"))

    def mark_ingested(self, cases: Iterable[SignedCase], data_version: str) -> None:
        """Say that this version of the data set holds these cases; a sign-off that came meanwhile stays to be ingested."""
        with writing(self._engine) as connection:
            for case in cases:
                mine = (SIGNOFFS.c.case_id == case.case_id) & (SIGNOFFS.c.number <= case.number)
                mine &= SIGNOFFS.c.data_version.is_(None)
                connection.execute(SIGNOFFS.update().where(mine).values(data_version=data_version))

    def smears_of(self, site: str, patient: str) -> set[str] | None:
        """The smears of a patient's cases; pseudonyms. None: there is no case of his."""
        query = sa.select(CASES.c.smear).where(CASES.c.site == site, CASES.c.patient == patient)
        rows = self._rows(query)
        return {row["smear"] for row in rows if row["smear"]} if rows else None

    def images_of(self, site: str, patient: str) -> dict[str, str | None]:
        """The images of a patient's cases by SHA-256, and the smear that each was sent as."""
        query = sa.select(ANSWERS.c.cells, CASES.c.smear).join(CASES, ANSWERS.c.case_id == CASES.c.case_id)
        rows = self._rows(query.where(CASES.c.site == site, CASES.c.patient == patient))
        return {sha256: row["smear"] for row in rows for sha256 in _table(row["cells"])["sha256"].to_pylist()}

    def forget(self, site: str, patient: str, forgotten: dataset.Forgotten) -> dict[str, int]:
        """Delete all that is kept of a patient (a pseudonym), what names no patient but a smear that was forgotten, and what names
        neither but holds an image that was: cases, answers, overrides, sign-offs, idempotency keys, images, and the cells in the
        inference log. Returns counts. Killed, it is run again."""

        def his(row: Mapping[str, Any]) -> bool:
            return row["patient"] == patient or forgotten.has(site, row["patient"], row["smear"])

        known = self._rows(sa.select(CASES.c.case_id, CASES.c.patient, CASES.c.smear).where(CASES.c.site == site))
        nameless = [row["case_id"] for row in known if not (row["patient"] or row["smear"])]
        cases = [row["case_id"] for row in known if his(row)]
        cases += [case for case in nameless if not forgotten.images.isdisjoint(self.predictions(case)["sha256"])]
        answers = [answer for case in cases for answer in self._answers(case)]
        shards = {path for answer in answers for path in self._shards(answer)}
        of_answers = {row["answer_id"] for row in self._rows(sa.select(ANSWERS.c.answer_id))}
        for path in sorted((self.home / "incoming" / site).glob("*/*.parquet")):
            if path.stem.rsplit("-", 2)[-2] not in of_answers:  # a service was killed before it gave the answer
                whose = pq.read_table(path, columns=["patient", "smear"]).to_pylist()
                shards |= {path} if any(map(his, whose)) else set()
        for path in shards:
            path.unlink(missing_ok=True)
        for place, day in {(answer["site"], answer["day"]) for answer in answers}:  # they are written anew below
            (self.home / "log" / place / f"{day}.parquet").unlink(missing_ok=True)
        bodies = self._rows(sa.select(KEYS.c.holder, KEYS.c.key, KEYS.c.body).where(KEYS.c.body.is_not(None)))
        with writing(self._engine) as connection:
            named = [answer["answer_id"] for answer in answers]
            connection.execute(KEYS.delete().where(KEYS.c.answer_id.in_(named)))
            for row in bodies:  # of reviews
                if any(case.encode() in row["body"] for case in cases):
                    mine = (KEYS.c.holder == row["holder"]) & (KEYS.c.key == row["key"])
                    connection.execute(KEYS.delete().where(mine))
            for table in (OVERRIDES, SIGNOFFS, ANSWERS, CASES):
                connection.execute(table.delete().where(table.c.case_id.in_(cases)))
        self.export_log()
        scrub(self._engine)
        return {"cases": len(cases), "answers": len(answers), "incoming_shards": len(shards)}

    def purge(self, now: datetime) -> dict[str, int]:
        """Delete the images that their site's retention_days no longer allows, but for those that ingest still needs, and
        shards a day old that no answer names. Returns counts: deleted, bytes,
        unreferenced, kept_for_ingest, of_unknown_site (kept)."""
        needed = {path for case in self.signed_off() for path in case.shards}
        named = {row["answer_id"] for row in self._rows(sa.select(ANSWERS.c.answer_id))}
        done = dict.fromkeys(("deleted", "bytes", "unreferenced", "kept_for_ingest", "of_unknown_site"), 0)
        for path in sorted((self.home / "incoming").glob("*/*/*.parquet")):
            site, day = path.parts[-3:-1]
            try:
                days = sites.load(site).retention_days
            except SiteError:
                done["of_unknown_site"] += 1
                continue
            too_old = days is not None and day < stamp(now - timedelta(days=days))[:10]
            stray = path.stem.rsplit("-", 2)[-2] not in named and now.timestamp() - path.stat().st_mtime > 86_400
            if path in needed:
                done["kept_for_ingest"] += too_old
            elif too_old or stray:
                done["deleted"] += 1
                done["unreferenced"] += stray
                done["bytes"] += path.stat().st_size
                path.unlink()
        for path in (self.home / "incoming").rglob(".*.unfinished"):  # a service was killed while it wrote them
            if now.timestamp() - path.stat().st_mtime > 86_400:
                done["unreferenced"] += 1
                path.unlink()
        return done


def _stored(connection: sa.Connection, key: Key) -> bytes | None:
    query = sa.select(KEYS.c.request_digest, KEYS.c.body, ANSWERS.c.body.label("answer"))
    query = query.join(ANSWERS, KEYS.c.answer_id == ANSWERS.c.answer_id, isouter=True)
    row = connection.execute(query.where(KEYS.c.holder == key.holder, KEYS.c.key == key.key)).first()
    if row is None:
        return None
    if row.request_digest != key.request_digest:
        raise KeyReused(f"the Idempotency-Key '{key.key}' came with another request before; take a new one")
    return bytes(row.answer if row.body is None else row.body)


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    # Many columns and few rows: without this, most of the bytes and of the time would be descriptions.
    pq.write_table(table, out, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False)
    return out.getvalue()


def _table(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def _predictions(answers: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    if not answers:
        return pd.DataFrame({"sha256": [], "predicted_type": [], "version": []})
    tables = [_table(a["cells"]) for a in answers]
    versions = [pa.array([a["version"]] * len(t), pa.string()) for a, t in zip(answers, tables, strict=True)]
    said = [t.append_column("version", of_answer) for t, of_answer in zip(tables, versions, strict=True)]
    frame = pa.concat_tables(said, promote_options="default").to_pandas()
    return frame.drop_duplicates("sha256", keep="last").reset_index(drop=True)


def _logged(row: Mapping[str, Any]) -> pa.Table:
    """An answer's cells, with what the log says of the answer."""
    cells = _table(row["cells"])
    for name in ("case_id", "answer_id", "version", "day", "status", "received_at", "acquired_at"):
        value, kind = row[name], pa.string()
        if name.endswith("_at"):
            value, kind = value and datetime.fromisoformat(value), pa.timestamp("us", tz="UTC")
        cells = cells.append_column(name, pa.array([value] * len(cells), kind))
    return cells


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
