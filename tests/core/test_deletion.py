"""A patient who is deleted is gone everywhere, stays gone, and whatever is killed half-way is ended by the next command."""

import hashlib
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture, put
from typer.testing import CliRunner, Result

from serving.cases import Answer, Case, CaseStore, case_of
from smearline import cbc, cli, dataset, deletion, importing, integrity, pseudonyms, sites, sources, stats

NOW = datetime(2026, 11, 23, tzinfo=UTC)
FOLDER = sources.load("folder")


@pytest.fixture
def made(tmp_path: Path, sites_folder: Path) -> tuple[Path, Path]:
    """(data set, raw folder): of patients A and B two images each, a truncated one, and their counts by smear alone; one of A's
    pictures is also among B's."""
    raw, into = tmp_path / "raw", tmp_path / "w" / "data"
    rows = ["file,type,patient,smear"]
    for i, who in enumerate("AABB"):
        put(raw / f"{who}/{i}.jpg", picture(i))
        rows.append(f"{who}/{i}.jpg,blast,{who},S{who}")
    put(raw / "B/again.jpg", picture(0))
    put(raw / "A/short.jpg", picture(9)[:300])
    rows += ["B/again.jpg,blast,B,SB", "A/short.jpg,blast,A,SA"]
    put(raw / "labels.csv", "\n".join(rows))
    put(raw / "patients.csv", "patient,smear,diagnosis\nA,SA,AML\nB,SB,APL")
    put(raw / "xn.csv", "Sample No.,WBC(10^3/uL)\nSA,4.1\nSB,5.2\n")
    importing.import_source(FOLDER, raw, sites.load("lab"), into)
    return into, raw


def name(who: str, kind: str = "patient") -> str:
    return pseudonyms.pseudonym(pseudonyms.key(sites.load("lab")), "lab", kind, who)


def of_patient(data: Path, who: str = "A") -> list[str]:
    """Every table that names him, his smear or a path of his."""
    patient, smear = name(who), name(f"S{who}", "smear")
    images = set(dataset.index(data, ["sha256", "patient"]).query("patient == @patient")["sha256"])
    found = []
    for path in [
        *data.glob("labels/*"),
        *data.glob("cbc/*"),
        data / "quarantine.parquet",
        *data.glob("local/*.parquet"),
    ]:
        for row in pq.read_table(path).to_pylist():
            his = row.get("patient") == patient or row.get("smear") == smear or row.get("sha256") in images
            if his or str(row.get("file") or row.get("path")).startswith(f"{who}/"):
                found.append(f"{path.name}: {row}")
    return found


def test_everything_that_names_him_goes_and_does_not_come_back(made):
    data, raw = made
    assert {line.split(":")[0] for line in of_patient(data)} == {
        "cells-lab.00001.parquet", "patients-lab.parquet", "lab.parquet", "quarantine.parquet", "files-lab.parquet",
    }  # fmt: skip
    done = deletion.forget(data, "lab", name("A"), "asked for it", NOW)
    assert (done["images"], done["patients"], done["count_values"], done["quarantined"]) == (2, 1, 1, 2)
    assert of_patient(data) == []
    assert of_patient(data, "B")
    put(raw / "A/new.jpg", picture(30))  # of the patient who was deleted, and never seen before
    put(raw / "labels.csv", (raw / "labels.csv").read_text() + "\nA/new.jpg,blast,A,SA")
    for _ in range(2):
        report = importing.import_source(FOLDER, raw, sites.load("lab"), data)
        assert of_patient(data) == []
        assert (report.imported, report.quarantined["deleted"]) == (
            0,
            5,
        )  # two, the short one, the new one, and B's copy of one
    assert len(dataset.index(data)) == 2
    deletion.compact(data)
    assert of_patient(data) == [] and integrity.verify(data) == []
    importing.import_source(FOLDER, raw, sites.load("lab"), data)
    assert of_patient(data) == [] and len(dataset.index(data)) == 2


def test_killed_after_any_write_it_is_ended_by_forget_again_or_by_compact(made, monkeypatch: pytest.MonkeyPatch):
    data, _ = made
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    real, writes = dataset.write_table, []

    def write(table: pa.Table, path: Path, **options: object) -> None:
        if len(writes) == limit:
            raise KeyboardInterrupt
        writes.append(path)
        real(table, path, **options)

    for limit in range(20):
        for end in (lambda: deletion.forget(data, "lab", name("A"), "again", NOW), lambda: deletion.compact(data)):
            for path in data.rglob("*"):
                path.unlink() if path.is_file() and path not in before else None
            for path, content in before.items():
                put(path, content)
            writes.clear()
            with monkeypatch.context() as patch:
                patch.setattr(dataset, "write_table", write)
                try:
                    deletion.forget(data, "lab", name("A"), "asked for it", NOW)
                    whole = True
                except KeyboardInterrupt:
                    whole = False
            if writes and not whole:  # from the first write on it is written down who is gone
                end()
                assert of_patient(data) == [], f"killed at write {limit}"
                assert not [f for f in integrity.verify(data) if f.kind != "in_no_split"]
        if whole:
            assert limit > 4
            return
    raise AssertionError("more writes than were expected")


def test_each_deletion_keeps_its_own_reason(made, monkeypatch: pytest.MonkeyPatch):
    data, _ = made
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(deletion, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        deletion.forget(data, "lab", name("A"), "asked for it", NOW)
    patients = dataset.index(data, ["sha256", "patient"]).set_index("sha256")["patient"]
    deletion.forget(data, "lab", name("B"), "no consent", NOW)
    told = pq.read_table(dataset.deleted_path(data, "images")).to_pylist()
    reasons = {name("A"): "asked for it", name("B"): "no consent"}
    assert len(told) == 4 and all(row["reason"] == reasons[patients[row["sha256"]]] for row in told)


def test_labels_of_deleted_images_are_found(made):
    data, _ = made
    labels = {path: path.read_bytes() for path in dataset.label_paths(data, "lab")}
    deletion.forget(data, "lab", name("A"), "asked for it", NOW)
    for path, content in labels.items():
        path.write_bytes(content)
    (found,) = integrity.verify(data)
    assert (found.kind, found.remedy) == ("label_of_deleted", "smearline compact")
    deletion.compact(data)
    assert integrity.verify(data) == []


def test_near_duplicates_are_counted_without_the_deleted(made, tmp_path: Path):
    data, _ = made
    frame = dataset.index(data, ["sha256", "site", "patient"])
    split = frame.assign(split="train", group=frame["patient"], near_duplicate=True)
    split[["sha256", "split", "group", "near_duplicate"]].to_parquet(tmp_path / "splits.parquet", index=False)
    deletion.forget(data, "lab", name("A"), "asked for it", NOW)
    found = stats.stats(data, tmp_path / "splits.parquet")["duplicates"]
    assert (found["near"], found["near_across_patients"], found["near_across_sites"]) == (2, 0, 0)


def test_the_command_says_where_it_found_no_case_store(made, monkeypatch: pytest.MonkeyPatch):
    data, _ = made
    given = [
        "forget",
        "A",
        "--site",
        "lab",
        "--reason",
        "asked",
        "--data",
        str(data / "cells"),
    ]  # its images' folder will do
    said = CliRunner().invoke(cli.app, given)
    assert said.exit_code == 0, said.output
    assert "images 2" in said.output and "no case store at" in said.output
    monkeypatch.setenv("SMEARLINE_STORE", f"sqlite:///{data.parent / 'elsewhere.sqlite'}")
    CaseStore(home=data.parent / "home")
    said = CliRunner().invoke(cli.app, [*given[:1], "B", *given[2:], "--service", str(data.parent / "home")])
    assert said.exit_code == 0 and "cases 0" in said.output and "no case store" not in said.output


def send(store: CaseStore, patient: str | None, smear: str | None, seed: int) -> None:
    """A case of one picture, as the service keeps it."""
    row = dict.fromkeys(dataset.CELLS.names) | {
        "image": picture(seed),
        "site": "lab",
        "patient": patient,
        "smear": smear,
    }
    row["sha256"] = hashlib.sha256(row["image"]).hexdigest()
    said = pa.table({name: [row[name]] for name in ("sha256", "patient", "smear")})
    said = said.append_column("predicted_type", pa.array(["BLAST"]))
    answer = Answer(uuid.uuid4().hex[:24], "recognise", "0123", "real", "scanner", NOW, None, b"{}")
    store.add(Case(case_of("lab", smear or str(seed)), "lab", smear, patient), answer, said, [row])


def forget(data: Path, patient: str) -> Result:
    given = ["forget", patient, "--site", "lab", "--reason", "asked", "--data", str(data)]
    return CliRunner().invoke(cli.app, given)


@pytest.mark.mission("a deletion that says it was done was done")
def test_who_was_sent_by_his_pseudonym_goes_under_both_names_and_another_ones_rest_is_not_taken_for_him(made):
    data, _ = made
    store = CaseStore(home=data.parent / ".smearline/service")
    send(store, name(name("A")), name(name("SA", "smear"), "smear"), 0)
    said = forget(data, name("A"))
    assert said.exit_code == 0 and "images 2" in said.output and "cases 1" in said.output, said.output
    assert of_patient(data) == []
    send(store, name("A"), name("SA", "smear"), 5)  # the service takes his smear again
    assert "nobody was deleted" in str(forget(data, "nobody").exception)
    assert "images 2" in forget(data, name("B")).output and of_patient(data, "B") == []


def test_blood_counts_of_a_patient_without_images_go_too(made):
    data, _ = made
    row = {"site": "lab", "patient": "C", "smear": "SC", "parameter": "WBC", "value": 4.0, "raw": "4"}
    dataset.merge_rows(data / "cbc" / "lab.parquet", [row], cbc.COUNTS, cbc.KEY)
    assert deletion.forget(data, "lab", "C", "asked", NOW)["count_values"] == 1
    assert "C" not in set(pd.read_parquet(data / "cbc" / "lab.parquet")["patient"])


def test_another_patients_smear_of_the_same_number_stays(made, tmp_path: Path):
    data, _ = made
    raw = tmp_path / "more"
    for i, who in enumerate("CD"):
        put(raw / f"{who}.jpg", picture(50 + i))
    put(raw / "alone.jpg", picture(60))
    put(raw / "labels.csv", "file,type,patient,smear\nC.jpg,blast,C,1\nD.jpg,blast,D,1\nalone.jpg,blast,,1")
    put(raw / "patients.csv", "patient,smear,diagnosis\nC,1,AML\nD,1,APL")
    report = importing.import_source(FOLDER, raw, sites.load("lab"), data)
    assert (report.imported, report.quarantined["smear_of_another_patient"]) == (2, 1)
    done = deletion.forget(data, "lab", name("C"), "asked", NOW)
    assert (done["images"], done["patients"], done["shared_smears"]) == (1, 1, 1)
    report = importing.import_source(FOLDER, raw, sites.load("lab"), data)
    assert (report.already_there, report.imported, report.quarantined.total()) == (1, 1, report.quarantined["deleted"])


def test_an_image_that_names_his_smear_alone_is_his(made, tmp_path: Path):
    data, _ = made
    put(tmp_path / "more" / "late.jpg", picture(70))
    put(tmp_path / "more" / "labels.csv", "file,type,smear\nlate.jpg,blast,SA")
    importing.import_source(FOLDER, tmp_path / "more", sites.load("lab"), data)
    assert deletion.forget(data, "lab", name("A"), "asked", NOW)["images"] == 3
    assert len(dataset.index(data)) == 2


@pytest.mark.mission("deleting one patient leaves another's images")
def test_a_smear_that_the_case_store_alone_has_as_his_stays_the_other_patients(made, tmp_path: Path):
    data, _ = made
    put(tmp_path / "more" / "late.jpg", picture(70))
    put(tmp_path / "more" / "labels.csv", "file,type,smear\nlate.jpg,blast,SB")
    importing.import_source(FOLDER, tmp_path / "more", sites.load("lab"), data)
    done = deletion.forget(data, "lab", name("A"), "asked", NOW, smears={name("SB", "smear")}, known=True)
    assert (done["images"], done["count_values"], done["shared_smears"]) == (2, 1, 1)
    assert len(dataset.index(data)) == 3


def test_a_patient_whom_only_the_case_store_knows_is_kept_out_too(made, tmp_path: Path):
    data, _ = made
    assert (
        deletion.forget(data, "lab", name("E"), "asked", NOW, smears={name("SE", "smear")}, known=True)["images"] == 0
    )
    put(tmp_path / "more" / "e.jpg", picture(80))
    put(tmp_path / "more" / "f.jpg", picture(81))
    put(tmp_path / "more" / "labels.csv", "file,type,patient,smear\ne.jpg,blast,E,\nf.jpg,blast,,SE")
    report = importing.import_source(FOLDER, tmp_path / "more", sites.load("lab"), data)
    assert report.quarantined["deleted"] == 2


@pytest.mark.mission("a patient's picture goes though its first copy named nobody")
def test_a_picture_whose_copy_names_him_is_his(made, tmp_path: Path):
    data, _ = made
    raw = tmp_path / "copies"
    for path in ("a/0.jpg", "b/1.jpg"):
        put(raw / path, picture(90))
    put(raw / "labels.csv", "file,type,patient,smear\na/0.jpg,blast,,\nb/1.jpg,blast,F,SF")
    assert importing.import_source(FOLDER, raw, sites.load("lab"), data).quarantined["duplicate"] == 1
    before = len(dataset.index(data))
    assert deletion.forget(data, "lab", name("F"), "asked", NOW)["images"] == 1
    assert len(dataset.index(data)) == before - 1
    gone = pd.read_parquet(data / "cells" / "deleted" / "images.parquet")
    assert "asked" in set(gone["reason"]) and len(gone) == 1


@pytest.mark.mission("a patient's picture goes though only the service knows whose it is")
def test_a_picture_that_only_the_service_knows_to_be_his_is_his_unless_its_smear_is_anothers(made, tmp_path: Path):
    data, _ = made
    for i, smear in enumerate(["", "", "SB"]):
        put(tmp_path / "more" / f"{i}.jpg", picture(90 + i))
        with (tmp_path / "more" / "labels.csv").open("a") as file:
            file.write(f"{'' if i else 'file,type,smear'}\n{i}.jpg,blast,{smear}")
    importing.import_source(FOLDER, tmp_path / "more", sites.load("lab"), data)
    store, once, smear = CaseStore(home=data.parent / ".smearline/service"), name("F"), name("SF", "smear")
    send(store, once, smear, 90)
    send(store, name(once), name(smear, "smear"), 91)  # by his pseudonym
    send(store, once, name("SB", "smear"), 92)  # a smear that the data set has as B's
    send(store, None, None, 91)
    said = forget(data, "F").output
    assert "images 2" in said and "labels 2" in said and "cases 4" in said, said
    left = set(dataset.index(data)["sha256"])
    assert [hashlib.sha256(picture(90 + i)).hexdigest() in left for i in range(3)] == [False, False, True]
    assert not list((store.home / "incoming").rglob("*.parquet"))
