"""The case store by itself: versions, retention, and what it does when two processes meet."""

import os
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from conftest import picture, put

from serving.cases import Answer, Case, CaseConflict, CaseStore, Key, KeyReused, case_of
from smearline import dataset
from smearline.errors import DataError

pytest_plugins = ["serving_fixtures"]
NOW = datetime(2026, 5, 31, 12, tzinfo=UTC)


POSTGRES = os.environ.get("SMEARLINE_TEST_POSTGRES")
"""A server on which databases may be made, postgresql+psycopg://USER@HOST:PORT; `make proof-postgres` starts one."""


@pytest.fixture(
    params=["sqlite", pytest.param("postgresql", marks=pytest.mark.mission("the case store on PostgreSQL"))]
)
def store(
    request: pytest.FixtureRequest, tmp_path: Path, sites: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CaseStore]:
    monkeypatch.setenv("SMEARLINE_SITES", str(sites))
    if request.param == "sqlite":
        yield CaseStore(home=tmp_path / "home")
        return
    if not POSTGRES:
        pytest.skip("SMEARLINE_TEST_POSTGRES names no server: make proof-postgres")
    name = f"t{uuid.uuid4().hex}"
    with sa.create_engine(f"{POSTGRES}/postgres", isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"create database {name}")
    store = CaseStore(f"{POSTGRES}/{name}", tmp_path / "home")
    yield store
    store._engine.dispose()


def again(store: CaseStore) -> CaseStore:
    """The same store, as another process opens it."""
    return CaseStore(store._engine.url.render_as_string(hide_password=False), store.home)


def add(store: CaseStore, site: str = "hospital", smear: str = "s", days_ago: int = 0, key: Key | None = None) -> bytes:
    """An answer of one cell, with its image, given so many days before NOW."""
    answer_id, sha256 = uuid.uuid4().hex, uuid.uuid4().hex
    row = dict.fromkeys(dataset.CELLS.names) | {"sha256": sha256, "image": picture(1), "site": site, "smear": smear}
    at = NOW - timedelta(days=days_ago)
    answer = Answer(answer_id, "diagnose", "v1", "simulated", "t", at, None, answer_id.encode(), "diagnosed", "AML")
    cells = pa.table({"sha256": [sha256], "predicted_type": ["BLAST"]})
    return store.add(Case(case_of(site, smear), site, smear, None), answer, cells, [row], key=key)


def shards(store: CaseStore) -> set[str]:
    return {"/".join(path.parts[-3:-1]) for path in (store.home / "incoming").rglob("*.parquet")}


def sign(store: CaseStore, site: str, smear: str) -> None:
    case_id = case_of(site, smear)
    sign_off = {"reviewer": "dr", "at": (NOW + timedelta(1)).isoformat(), "comment": None}
    store.review(case_id, b"{}", sign_off=sign_off, answer_id=store.case(case_id)["answers"][-1]["answer_id"])


def test_purge_deletes_what_retention_no_longer_allows_and_ingest_does_not_need(store: CaseStore):
    add(store, days_ago=40, smear="old")
    add(store, days_ago=30, smear="just kept")
    add(store, days_ago=45, smear="signed")
    add(store, site="lab", days_ago=4000, smear="lab keeps all")
    sign(store, "hospital", "signed")
    done = store.purge(NOW)
    assert (done["deleted"], done["kept_for_ingest"], done["unreferenced"]) == (1, 1, 0) and done["bytes"] > 0
    assert shards(store) == {"hospital/2026-05-01", "hospital/2026-04-16", "lab/2015-06-18"}
    store.mark_ingested(store.signed_off(), "v7")
    assert store.purge(NOW)["deleted"] == 1
    assert shards(store) == {"hospital/2026-05-01", "lab/2015-06-18"}
    assert len(store.case(case_of("hospital", "old"))["answers"]) == 1  # the answer stays


def test_a_shard_that_no_answer_names_goes_after_a_day(store: CaseStore):
    add(store, site="lab")
    shard = next((store.home / "incoming").rglob("*.parquet"))
    stray = shard.with_name(f"lab-{uuid.uuid4().hex}-0123456789abcdef.parquet")
    stray.write_bytes(shard.read_bytes())
    now = datetime.now(UTC)
    assert store.purge(now)["deleted"] == 0  # it may be of a request that is being answered
    half = shard.with_name(".lab-0.parquet.1.unfinished")  # of a service that was killed
    half.write_bytes(b"half")
    for path in (stray, half):
        os.utime(path, (time.time() - 90_000,) * 2)
    assert store.purge(now)["unreferenced"] == 2 and shard.exists() and not stray.exists() and not half.exists()


def test_a_case_signed_again_is_taken_in_again(store: CaseStore):
    add(store)
    sign(store, "hospital", "s")
    first = store.signed_off()
    store.mark_ingested(first, "v1")
    assert store.signed_off() == []
    sign(store, "hospital", "s")
    assert [c.case_id for c in store.signed_off()] == [case_of("hospital", "s")]
    store.mark_ingested(first, "v2")  # a sign-off that this ingest has not seen
    assert len(store.signed_off()) == 1


def test_what_came_while_it_was_signed_is_not_signed(store: CaseStore):
    add(store)
    seen = store.case(case_of("hospital", "s"))["answers"][-1]["answer_id"]
    add(store)
    with pytest.raises(CaseConflict, match="read the case again"):
        store.review(
            case_of("hospital", "s"), b"{}", sign_off={"reviewer": "dr", "at": "x", "comment": None}, answer_id=seen
        )


def test_pictures_of_a_site_without_a_file_are_kept_and_counted(store: CaseStore):
    add(store, site="lab")
    folder = store.home / "incoming"
    (folder / "lab").rename(folder / "gone")
    assert store.purge(NOW)["of_unknown_site"] == 1


def test_two_processes_with_one_key_give_one_answer(store: CaseStore):
    """Each has done the work before it learns of the other."""
    other, key = again(store), Key("t", "k", "d")
    start, given = threading.Barrier(2), []

    def work(one: CaseStore) -> None:
        start.wait()
        given.append(add(one, key=key))

    threads = [threading.Thread(target=work, args=(one,)) for one in (store, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) == 2 and len(set(given)) == 1
    assert len(store.case(case_of("hospital", "s"))["answers"]) == 1
    with pytest.raises(KeyReused, match="another request"):
        store.stored(Key("t", "k", "other"))


def test_a_commit_is_on_the_disk_before_the_answer_is_given(store: CaseStore):
    with store._engine.connect() as connection:
        if store._engine.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        else:
            assert connection.exec_driver_sql("show synchronous_commit").scalar() == "on"


def test_a_store_of_another_version_is_refused(store: CaseStore):
    with store._engine.begin() as connection:
        connection.exec_driver_sql("update store set schema_version = 99")
    with pytest.raises(DataError, match="version 99; this smearline reads version 2"):
        again(store)


def test_an_answer_that_was_never_given(store: CaseStore):
    with pytest.raises(DataError, match="no answer 'x'"):
        store.answer("x")
    assert store.case("x") is None


def test_what_a_flow_reads(store: CaseStore):
    smear, key = uuid.uuid4().hex, Key("t", uuid.uuid4().hex, "d")
    given = add(store, smear=smear, key=key)
    assert add(store, smear=smear, key=key) == given == store.stored(key)
    sign(store, "hospital", smear)
    assert case_of("hospital", smear) in {c.case_id for c in store.signed_off()}
    assert store.export_log() and store.export_log() == []


def test_a_forgotten_patient_leaves_nothing(store: CaseStore):
    add(store, smear="his"), add(store, smear="hers")
    mine, hers = case_of("hospital", "his"), case_of("hospital", "hers")
    with store._engine.begin() as connection:
        connection.exec_driver_sql(f"update cases set patient = 'him' where case_id = '{mine}'")
    key = Key("t", "k", "d")
    told = {"reviewer": "r", "at": NOW.isoformat(), "comment": "sure"}
    store.review(mine, f"body of {mine}".encode(), [{"sha256": "0", "name": "type", "value": "EOS", **told}], None, key)
    logs = store.export_log()
    (images,) = [p for p in (store.home / "incoming").rglob("*.parquet") if "his" in str(pq.read_table(p)["smear"])]
    add(store, smear="his other")  # sent without a patient; the data set knows whose smear it is
    stray = put(store.home / "incoming" / "hospital" / "2026-01-01" / "hospital-0-0.parquet", images.read_bytes())
    add(store, smear="shared")
    with store._engine.begin() as connection:
        connection.exec_driver_sql(
            f"update cases set patient = 'her' where case_id = '{case_of('hospital', 'shared')}'"
        )
    assert store.smears_of("hospital", "him") == {"his"} and store.smears_of("hospital", "nobody") is None
    forgotten = dataset.Forgotten(store.home)
    forgotten.people = {dataset.person("hospital", "smear", smear) for smear in ("his other", "his", "shared")}
    assert store.forget("hospital", "him", forgotten) == {"cases": 2, "answers": 2, "incoming_shards": 3}
    kept = case_of("hospital", "shared")
    assert store.case(kept) is not None, "another patient's smear of the same number"
    assert not stray.exists() and store.case(case_of("hospital", "his other")) is None
    assert store.case(mine) is None and store.stored(key) is None and not images.exists()
    assert store.case(hers) is not None
    assert {case for path in logs for case in pq.read_table(path)["case_id"].to_pylist()} == {hers, kept}
    assert store.forget("hospital", "him", forgotten) == {"cases": 0, "answers": 0, "incoming_shards": 0}
    if store._engine.dialect.name == "sqlite":
        assert not any(mine.encode() in p.read_bytes() for p in store.home.glob("cases.sqlite*"))


@pytest.mark.mission("an answer that is kept last is the last, so that nobody signs off what he has not seen")
def test_a_slow_answer_is_newer_than_one_that_overtook_it(store: CaseStore):
    add(store, days_ago=0)
    seen = store.case(case_of("hospital", "s"))["answers"][-1]["answer_id"]
    add(store, days_ago=1)  # received before, kept after
    case = store.case(case_of("hospital", "s"))
    assert (
        case["answers"][0]["answer_id"] == seen
        and case["answers"][1]["received_at"] > case["answers"][0]["received_at"]
    )
    with pytest.raises(CaseConflict, match="read the case again"):
        store.review(
            case_of("hospital", "s"), b"{}", sign_off={"reviewer": "dr", "at": "x", "comment": None}, answer_id=seen
        )
    sign(store, "hospital", "s")
    assert len(store.signed_off()[0].shards) == 2, "wherever they lie"
    assert {(cell.named, cell.version) for cell in store.signed_off()[0].cells} == {(True, "v1")}
