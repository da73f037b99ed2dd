"""Ingest takes each thing in once, whenever it was cut off before."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from conftest import picture, put
from tiny import cell

from flows import audit, ingest
from flows.workspace import FlowError, Workspace
from serving.cases import Answer, Case, CaseStore, SignedCase, case_of
from smearline import cbc, dataset, deletion, importing, pseudonyms, sites, sources

pytest_plugins = ["tiny_fixtures"]

NOW = datetime.now(UTC)
KNOWN = f"{1:064x}"
"""A cell of the workspace's data set, labelled LYMPH there."""


def signed(
    space: Workspace, overrides: dict[str, str], smear: str = "s-new", at: datetime = NOW, site: str = "lab"
) -> None:
    """A case of three cells, two of them new, that the service named MONO; a reviewer changes some and signs off."""
    store = CaseStore(home=space.service)
    rows = [cell(1, "lab", "lab-p1", "lab-s1"), *(cell(7000 + i, site, "p-new", smear) for i in range(2))]
    blood = {"site": site, "patient": "p-new", "smear": smear, "parameter": "WBC", "value": 4.2, "raw": "4.2"}
    counts = pa.Table.from_pylist([blood], schema=cbc.COUNTS).to_pandas()
    case = Case(case_of(site, smear), site, smear, "p-new")
    if store.case(case.case_id) is None:
        said = pa.table({"sha256": [r["sha256"] for r in rows], "predicted_type": ["MONO"] * len(rows)})
        answer = Answer(case.case_id[:24], "diagnose", "0123", "real", "scanner", at, None, b"{}", "diagnosed", "AML")
        store.add(case, answer, said, rows, counts)
    changes = [
        {
            "sha256": s,
            "name": "type",
            "value": v,
            "was": "MONO",
            "reviewer": "dr",
            "at": at.isoformat(),
            "comment": None,
        }
        for s, v in overrides.items()
    ]
    at_last = at + timedelta(seconds=1)
    sign_off = {"reviewer": "dr", "at": at_last.isoformat(), "comment": None}
    newest = store.case(case.case_id)["answers"][-1]["answer_id"]
    store.review(case.case_id, b"{}", changes, sign_off, answer_id=newest)


def run(space: Workspace):
    return ingest.ingest(str(space.folder), return_state=True)


def contents(space: Workspace) -> tuple[int, int, int]:
    """Images, labels, blood counts."""
    data = space.folder / "data"
    counts = dataset.read_tables(data, "cbc/*.parquet", cbc.COUNTS)
    return len(dataset.index(data, ["sha256"])), len(dataset.read_labels(data)), len(counts)


def test_nothing_signed_off_and_no_file_is_nothing_new(space: Workspace):
    before = space.git("rev-parse", "HEAD")
    assert run(space).name == "NothingNew"
    assert space.git("rev-parse", "HEAD") == before


def test_of_a_deleted_patient_nothing_is_taken_in_again(space: Workspace):
    signed(space, {})
    assert run(space).is_completed()
    images, labels, _ = contents(space)
    data = space.folder / "data"
    assert deletion.forget(data, "lab", "p-new", "asked for it", NOW)["images"] == 2
    after = (images - 2, labels - 2, 0)
    assert contents(space) == after
    head = space.git("rev-parse", "HEAD")
    assert run(space).is_completed(), "what was deleted is a version, though nothing came"
    assert space.git("rev-parse", "HEAD") != head and run(space).name == "NothingNew"
    signed(space, {}, smear="s-later")  # the same pictures and another count, sent once more
    assert run(space).is_completed()
    assert contents(space) == after
    patients = pd.read_parquet(data / "labels/patients-lab.parquet")
    assert "p-new" not in set(patients["patient"])


def test_a_signed_case_becomes_images_labels_diagnosis_and_counts(space: Workspace):
    images, labels, _ = contents(space)
    signed(space, {f"{7000:064x}": "BLAST"})
    state = run(space)
    assert state.is_completed(), state.message
    assert contents(space) == (images + 2, labels + 3, 1)
    found = dataset.read_labels(space.folder / "data").query("source.str.startswith('review')").set_index("sha256")
    assert found["value"].to_dict() == {KNOWN: "MONO", f"{7000:064x}": "BLAST", f"{7001:064x}": "MONO"}
    assert set(found["labelled_by"]) == {"dr"}
    assert found["conflicted"].to_dict()[KNOWN]  # the source called it LYMPH
    patients = pd.read_parquet(space.folder / "data/labels/patients-lab.parquet")
    assert patients[["patient", "smear", "diagnosis"]].to_numpy().tolist() == [["p-new", "s-new", "AML"]]
    assert space.git("status", "--porcelain") == ""
    told = audit.entries(space.folder, "ingest")[-1]
    assert told["counts"]["images_added"] == 2
    assert told["data"]["cells"] in (space.folder / "data/cells.dvc").read_text()
    assert CaseStore(home=space.service).signed_off() == []
    assert run(space).name == "NothingNew"


def test_cut_off_anywhere_and_run_again_nothing_stands_twice(space: Workspace, monkeypatch: pytest.MonkeyPatch):
    images, labels, _ = contents(space)
    signed(space, {f"{7000:064x}": "BLAST"})
    for cut in ((Workspace, "run"), (audit, "append"), (Workspace, "commit"), (CaseStore, "mark_ingested")):
        with monkeypatch.context() as patch:
            patch.setattr(*cut, lambda *_, **__: (_ for _ in ()).throw(RuntimeError("killed")))
            assert "killed" in run(space).message
    assert run(space).is_completed()
    assert contents(space) == (images + 2, labels + 3, 1)
    assert len(audit.entries(space.folder, "ingest")) == 1
    assert space.git("status", "--porcelain") == ""

    # A case that is signed again replaces what its reviewer said.
    signed(space, {f"{7000:064x}": "PROMYELO"}, at=NOW + timedelta(minutes=1))
    assert run(space).is_completed()
    assert contents(space) == (images + 2, labels + 3, 1)
    found = (
        dataset.read_labels(space.folder / "data").query("source.str.startswith('review')").set_index("sha256")["value"]
    )
    assert found[f"{7000:064x}"] == "PROMYELO"


def test_a_case_that_is_signed_again_takes_back_what_it_no_longer_says(space: Workspace):
    """A newer version leaves the cell unidentified, and the reviewer gives it no type."""
    store, row, case_id = CaseStore(home=space.service), cell(7000, "lab", "p-new", "s-new"), case_of("lab", "s-new")
    for version, value in (("1", "MONO"), ("2", None)):
        said = {"sha256": [row["sha256"]], "predicted_type": [value or "EOS"], "named": [value is not None]}
        answer = Answer(version, "recognise", version, "real", "scanner", datetime.now(UTC), None, b"{}")
        store.add(Case(case_id, "lab", "s-new", "p-new"), answer, pa.table(said), [row])
        sign_off = {"reviewer": "dr", "at": datetime.now(UTC).isoformat(), "comment": None}
        store.review(case_id, b"{}", (), sign_off, answer_id=version)
        assert run(space).is_completed()
        found = dataset.read_labels(space.folder / "data").query(f"sha256 == '{7000:064x}'")
        assert found["value"].tolist() == [value] * (value is not None)


@pytest.mark.mission("what a reviewer signed off is not overwritten by the inbox")
def test_a_reviewers_diagnosis_stands_against_the_inbox_and_a_table_corrects_its_own(
    tmp_path: Path, sites_folder: Path
):
    raw, data, lab = tmp_path / "raw", tmp_path / "data", sites.load("lab")
    put(raw / "0.jpg", picture(0))
    put(raw / "labels.csv", "file,type,patient,smear\n0.jpg,blast,A,SA")

    def imported(said: str) -> tuple[importing.ImportReport, list[list[str]]]:
        put(raw / "patients.csv", f"patient,smear,diagnosis,age\nA,SA,{said},60")
        report = importing.import_source(sources.load("folder"), raw, lab, data)
        rows = pd.read_parquet(data / "labels/patients-lab.parquet")
        return report, rows[["diagnosis", "source_diagnosis", "age"]].to_numpy().tolist()

    assert imported("MDS")[1] == [["MDS", "MDS", 60]] and imported("healthy")[1] == [["HEALTHY", "healthy", 60]]
    whose = {
        kind: pseudonyms.pseudonym(pseudonyms.key(lab), "lab", kind, who)
        for kind, who in (("patient", "A"), ("smear", "SA"))
    }
    case = SignedCase("c", "lab", **whose, reviewer="dr", signed_at=NOW, number=1, diagnosis="AML", cells=(),
                      counts=cbc.COUNTS.empty_table(), shards=())  # fmt: skip
    ingest.take_cases.fn([case], data)
    for said, contradicts in (("MDS", 1), ("AML", 0)):
        report, rows = imported(said)
        assert (report.reviewed_otherwise, rows) == (contradicts, [["AML", "AML", 60]])
        assert ("a reviewer signed off otherwise" in str(report)) == contradicts


def test_two_cases_that_name_one_picture_differently_are_in_conflict_and_neither_vanishes(space: Workspace):
    for smear, said in (("s-one", "BLAST"), ("s-two", "LYMPH")):
        signed(space, {f"{7000:064x}": said}, smear=smear)
        assert run(space).is_completed()
    found = dataset.read_labels(space.folder / "data").query(f"sha256 == '{7000:064x}'")
    assert set(found["value"]) == {"BLAST", "LYMPH"} and found["conflicted"].all()


def test_one_picture_signed_off_at_two_sites_stands_once(space: Workspace):
    images, _, _ = contents(space)
    for site in ("lab", "second"):
        signed(space, {}, site=site)
    assert run(space).is_completed()
    assert contents(space)[0] == images + 2


def test_the_patient_of_a_case_is_that_of_all_its_pictures(space: Workspace):
    """The first answer came without a patient; the case has one now."""
    rows = [cell(7100, "lab", None, None), cell(7101, "lab", "p-late", "s-late")]
    store, case_id = CaseStore(home=space.service), case_of("lab", "s-late")
    for row, patient in zip(rows, (None, "p-late"), strict=True):
        said = pa.table({"sha256": [row["sha256"]], "predicted_type": ["MONO"]})
        answer = Answer(str(row["sha256"])[-24:], "diagnose", "0123", "real", "scanner", datetime.now(UTC), None, b"{}")
        store.add(Case(case_id, "lab", "s-late", patient), answer, said, [row])
    at = datetime.now(UTC).isoformat()
    newest = store.case(case_id)["answers"][-1]["answer_id"]
    store.review(case_id, b"{}", (), {"reviewer": "dr", "at": at, "comment": None}, answer_id=newest)
    assert run(space).is_completed()
    found = dataset.index(space.folder / "data", ["sha256", "patient", "smear"]).set_index("sha256")
    assert found.loc[[r["sha256"] for r in rows], "patient"].tolist() == ["p-late", "p-late"]


def test_new_files_are_imported_once_and_a_bad_folder_does_not_stop_the_others(
    space: Workspace, capfd: pytest.CaptureFixture[str]
):
    images, labels, _ = contents(space)
    for number in range(3):
        put(space.folder / f"inbox/lab/BLAST/{number}.jpg", picture(9000 + number))
    put(space.folder / "inbox/nowhere/EOS/1.jpg", picture(9100))
    put(space.folder / "inbox/second/Mueller_Hans/1.jpg", picture(9100))  # of a site whose identifiers are private
    put(space.folder / "inbox/unscaled/no_such_class/1.jpg", picture(9101))
    state = run(space)
    assert state.is_failed()
    assert "no_such_class" in state.message and "site 'nowhere' has no file" in state.message
    assert "it refused what it was given" in state.message and "import folder inbox/second --site" in state.message
    assert "Mueller" not in state.message + "".join(capfd.readouterr())
    assert contents(space)[:2] == (images + 3, labels + 3)
    assert "no_such_class" in run(space).message
    shutil.rmtree(space.folder / "inbox/nowhere")
    for folder in ("second/Mueller_Hans", "unscaled/no_such_class"):
        (space.folder / "inbox" / folder).rename(space.folder / "inbox" / folder.split("/")[0] / "EOS")
    assert run(space).is_completed()
    assert contents(space)[:2] == (images + 5, labels + 5)
    assert run(space).name == "NothingNew"
    assert space.git("status", "--porcelain") == ""


def test_images_that_retention_took_away_are_counted_and_not_labelled(space: Workspace):
    signed(space, {})
    for shard in (space.service / "incoming").rglob("*.parquet"):
        shard.unlink()
    _, labels, _ = contents(space)
    assert run(space).is_completed()
    assert contents(space)[1] == labels + 1  # of the cell that is in the data set
    assert audit.entries(space.folder, "ingest")[-1]["counts"]["images_gone"] == 2


def test_the_folder_of_files_is_told_by_names_sizes_and_times(tmp_path: Path):
    assert ingest.contents(tmp_path) == ""
    put(tmp_path / "a/1.jpg", b"x")
    first = ingest.contents(tmp_path)
    put(tmp_path / "a/1.jpg", b"xy")
    assert ingest.contents(tmp_path) != first


@pytest.mark.mission("no smear of two patients comes into the data set")
def test_a_case_whose_smear_is_another_patients_is_told_and_waits(space: Workspace):
    before = contents(space)
    signed(space, {}, smear="lab-s1")  # which the data set has as lab-p1's
    signed(space, {}, smear="s-other")
    state = run(space)
    assert state.is_failed() and "its smear as another patient's" in state.message
    assert contents(space)[0] > before[0], "the other case is taken in"
    assert [case.smear for case in CaseStore(home=space.service).signed_off()] == ["lab-s1"]
    assert dataset.smear_patients(space.folder / "data")["lab", "lab-s1"] == "lab-p1"


def test_images_go_when_retention_ends_though_the_rest_fails(space: Workspace, monkeypatch: pytest.MonkeyPatch):
    purged: list[datetime] = []
    monkeypatch.setattr(CaseStore, "purge", lambda _, now: purged.append(now) or {})
    monkeypatch.setattr(Workspace, "data_changed", lambda *_: (_ for _ in ()).throw(FlowError("behind")))
    assert "behind" in run(space).message and len(purged) == 1
