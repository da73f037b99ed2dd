"""Import: every file is accounted for, and what the sources say is kept."""

import contextlib
import re
import struct
import zlib
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture, put

from smearline import cbc, dataset, import_folders, importing, sites, sources
from smearline.errors import ImportSourceError, SiteError, VocabularyError


def run(source: str, root: Path, into: Path, site: str = "lab", **more) -> importing.ImportReport:
    classes = more.pop("classes", None)
    return importing.import_source(sources.load(source, classes), root, sites.load(site), into, **more)


def types(into: Path) -> dict[str, str]:
    """source label -> type"""
    labels = dataset.read_labels(into)
    return dict(zip(labels["source_label"], labels["value"], strict=True))


@pytest.fixture
def folder(tmp_path: Path, sites_folder: Path) -> Path:
    root = tmp_path / "raw"
    put(root / "Neutrophils" / "a.jpg", picture(1))
    put(root / "Neutrophils" / "b.png", picture(2, kind="PNG"))
    put(root / "blast" / "c.jpg", picture(3))
    return root


def test_class_folders_are_named_by_the_vocabulary(folder: Path, tmp_path: Path):
    report = run("folder", folder, tmp_path / "d")
    assert (report.found, report.imported) == (3, 3)
    assert types(tmp_path / "d") == {"Neutrophils": "NEUT", "blast": "BLAST"}
    frame = dataset.labelled_index(tmp_path / "d")
    assert set(frame["microns_per_px"]) == {0.2}
    assert set(frame["origin"]) == {"real"}
    assert sorted(frame["true_type"]) == ["BLAST", "NEUT", "NEUT"]


def test_every_file_is_imported_or_quarantined_with_its_reason(folder: Path, tmp_path: Path):
    whole = picture(4, size=200)
    put(folder / "blast" / "cut.jpg", whole[: len(whole) // 2])
    put(folder / "blast" / "empty.jpg", b"")
    put(folder / "blast" / "text.jpg", b"this is no image")
    put(folder / "blast" / "tiny.png", picture(5, size=8, kind="PNG"))
    put(folder / "blast" / "again.jpg", picture(3))
    put(folder / "blast" / ".DS_1.jpg", picture(6))
    put(folder / "blast" / "Thumbs.db", b"\0")
    report = run("folder", folder, tmp_path / "d")
    assert report.found == 10 == report.imported + report.quarantined.total() + report.tables
    assert dict(report.quarantined) == {
        "truncated": 1, "empty": 1, "unreadable": 1, "too_small": 1, "duplicate": 1, "hidden_file": 1, "not_an_image": 1,
    }  # fmt: skip
    kept = pd.read_parquet(tmp_path / "d" / "quarantine.parquet").set_index("file")
    assert kept.loc["blast/cut.jpg", "reason"] == "truncated"
    assert "duplicate of" in kept.loc["blast/c.jpg", "detail"], "of two equal files the first in sorted order is kept"


def test_a_file_under_two_classes_is_imported_once_and_left_out(folder: Path, tmp_path: Path):
    put(folder / "lymphocyte" / "c.jpg", picture(3))
    report = run("folder", folder, tmp_path / "d")
    assert (report.imported, report.quarantined["duplicate"], report.conflicted) == (3, 1, 1)
    labels = dataset.read_labels(tmp_path / "d")
    assert sorted(labels.loc[labels["conflicted"], "value"]) == ["BLAST", "LYMPH"]
    conflicted = dataset.labelled_index(tmp_path / "d").query("conflicted")
    assert list(conflicted["true_type"]) == [None]


def test_a_parent_does_not_contradict_its_child(folder: Path, tmp_path: Path):
    put(folder / "band neutrophil" / "x.jpg", picture(1))
    report = run("folder", folder, tmp_path / "d")
    assert report.conflicted == 0
    assert "NEUT_BAND" in set(dataset.labelled_index(tmp_path / "d")["true_type"]), "the finer label counts"


def test_importing_twice_adds_nothing(folder: Path, tmp_path: Path):
    put(folder / "blast" / "again.jpg", picture(3))
    run("folder", folder, tmp_path / "d")
    before = {p: p.read_bytes() for p in (tmp_path / "d").rglob("*.parquet")}
    report = run("folder", folder, tmp_path / "d")
    assert (report.imported, report.already_there, report.quarantined["duplicate"]) == (0, 3, 1)
    assert {p: p.read_bytes() for p in (tmp_path / "d").rglob("*.parquet")} == before


def test_a_new_file_makes_a_new_shard_and_leaves_the_old_one(folder: Path, tmp_path: Path):
    run("folder", folder, tmp_path / "d")
    (old,) = dataset.shards(tmp_path / "d")
    content = old.read_bytes()
    put(folder / "blast" / "new.jpg", picture(9))
    report = run("folder", folder, tmp_path / "d")
    assert (report.imported, report.already_there) == (1, 3)
    assert len(dataset.shards(tmp_path / "d")) == 2
    assert old.read_bytes() == content


def test_a_killed_import_is_completed_by_running_it_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run("folder", folder, tmp_path / "whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importing._Import, "store", killed)
        with pytest.raises(KeyboardInterrupt):
            run("folder", folder, tmp_path / "d")
    run("folder", folder, tmp_path / "d")
    pd.testing.assert_frame_equal(dataset.read_labels(tmp_path / "d"), dataset.read_labels(tmp_path / "whole"))
    assert len(dataset.index(tmp_path / "d")) == 3


def test_a_file_that_cannot_be_read_is_not_nothing(folder: Path, tmp_path: Path):
    (folder / "blast" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    report = run("folder", folder, tmp_path / "d")
    assert (report.found, report.quarantined) == (4, {"unreadable": 1})


def test_the_same_files_from_one_level_up_are_the_same_files(folder: Path, tmp_path: Path):
    run("folder", folder, tmp_path / "d")
    (tmp_path / "up").mkdir()
    folder.rename(tmp_path / "up" / "raw")
    report = run("folder", tmp_path / "up", tmp_path / "d")
    assert (report.imported, report.already_there, report.quarantined["duplicate"]) == (0, 3, 0)


def test_a_diagnosis_that_comes_later_is_taken(folder: Path, tmp_path: Path):
    put(folder / "labels.csv", "file,patient,smear\nblast/c.jpg,p1,s1\n")
    run("folder", folder, tmp_path / "d")
    put(folder / "patients.csv", "patient,diagnosis\np1,AML\n")
    run("folder", folder, tmp_path / "d")
    patients = dataset.read_tables(tmp_path / "d", "labels/patients-*.parquet", dataset.PATIENTS)
    assert patients["diagnosis"].tolist() == ["AML"]
    put(folder / "patients.csv", "patient,diagnosis\np1,flu\n")
    with pytest.raises(VocabularyError, match="diagnosis 'flu' is not known"):
        run("folder", folder, tmp_path / "d")


@pytest.mark.parametrize("said", ["yesterday noon", "03/04/2024", "5.1.2024"])
def test_a_date_that_is_none_or_could_be_two_is_quarantined(folder: Path, tmp_path: Path, said: str):
    put(folder / "labels.csv", f"file,acquired_at\nblast/c.jpg,{said}\n")
    assert run("folder", folder, tmp_path / "d").quarantined == {"bad_table_value": 1}


def test_two_rows_for_one_file_are_two_opinions(folder: Path, tmp_path: Path):
    put(folder / "labels.csv", "file,type,patient\nblast/c.jpg,LYMPH,p1\nblast/c.jpg,MONO,p1\n")
    assert run("folder", folder, tmp_path / "d").conflicted == 1
    put(folder / "labels.csv", "file,type,patient\nblast/c.jpg,LYMPH,p1\nblast/c.jpg,MONO,p2\n")
    with pytest.raises(ImportSourceError, match="says another patient"):
        run("folder", folder, tmp_path / "e")


def test_a_corrected_label_replaces_what_the_same_file_said_before(folder: Path, tmp_path: Path):
    put(folder / "labels.csv", "file,type\nblast/c.jpg,LYMPH\n")
    run("folder", folder, tmp_path / "d")
    put(folder / "labels.csv", "file,type\nblast/c.jpg,MONO\n")
    report = run("folder", folder, tmp_path / "d")
    assert (report.relabelled, report.conflicted) == (1, 0)
    assert "MONO" in set(dataset.labelled_index(tmp_path / "d")["true_type"])


def test_two_sites_that_contradict_each_other_are_a_conflict(folder: Path, tmp_path: Path):
    run("folder", folder, tmp_path / "d")
    put(tmp_path / "other" / "lymphocyte" / "x.jpg", picture(3))
    report = run("folder", tmp_path / "other", tmp_path / "d", site="second")
    assert (report.quarantined["duplicate"], report.conflicted) == (1, 1)
    assert dataset.labelled_index(tmp_path / "d")["conflicted"].sum() == 1


def test_a_patient_named_too_late_is_refused(folder: Path, tmp_path: Path):
    run("folder", folder, tmp_path / "d")
    put(folder / "labels.csv", "file,patient,smear\nblast/c.jpg,p1,s1\n")
    with pytest.raises(ImportSourceError, match="1 images were imported before with another patient"):
        run("folder", folder, tmp_path / "d")


def test_a_smear_is_the_files_own_though_its_patient_has_several(folder: Path, tmp_path: Path):
    put(folder / "labels.csv", "file,patient,smear\nblast/c.jpg,p1,s1\nNeutrophils/a.jpg,p1,s2\n")
    put(folder / "patients.csv", "patient,smear,diagnosis\np1,s1,AML\np1,s2,AML\n")
    run("folder", folder, tmp_path / "d")
    assert dataset.index(tmp_path / "d")["smear"].nunique() == 2


def test_a_table_that_lies_deeper_names_files_from_there(folder: Path, tmp_path: Path):
    put(folder / "labels.csv", "file,patient\n.\\blast\\c.jpg,p1\n")
    (tmp_path / "above").mkdir()
    folder.rename(tmp_path / "above" / "raw")
    report = run("folder", tmp_path / "above", tmp_path / "d")
    assert report.quarantined == {}
    assert dataset.index(tmp_path / "d")["patient"].notna().sum() == 1


def test_unlabelled_images_are_imported_without_a_label(folder: Path, tmp_path: Path):
    put(folder / "images" / "x.jpg", picture(8))
    put(folder / "labels.csv", "file,type\nimages/x.jpg,\n")
    assert run("folder", folder, tmp_path / "d").unlabelled == 1
    (folder / "labels.csv").unlink()
    mapped = {"images": None, "Neutrophils": "NEUT", "blast": "BLAST"}
    assert run("folder", folder, tmp_path / "e", classes=mapped).unlabelled == 1


def test_a_scale_that_nobody_knew_may_be_given(folder: Path, tmp_path: Path):
    run("folder", folder, tmp_path / "d", site="unscaled")
    assert dataset.index(tmp_path / "d")["microns_per_px"].isna().all()
    run("folder", folder, tmp_path / "e", site="unscaled", microns_per_px=0.08)
    assert set(dataset.index(tmp_path / "e")["microns_per_px"]) == {0.08}


def test_a_repaired_file_leaves_quarantine(folder: Path, tmp_path: Path):
    put(folder / "blast" / "x.jpg", picture(8)[:600])
    assert run("folder", folder, tmp_path / "d").quarantined.total() == 1
    put(folder / "blast" / "x.jpg", picture(8))
    assert run("folder", folder, tmp_path / "d").imported == 1
    assert len(pd.read_parquet(tmp_path / "d" / "quarantine.parquet")) == 0


def test_broken_counts_stop_the_import_before_anything_is_written(folder: Path, tmp_path: Path):
    put(folder / "xn.csv", "a,b\n1,2\n")
    with pytest.raises(ImportSourceError, match=r"no column 'Sample No\.'"):
        run("folder", folder, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_linked_folder_is_followed_and_a_ring_is_not(folder: Path, tmp_path: Path):
    put(tmp_path / "elsewhere" / "m.jpg", picture(8))
    (folder / "monocyte").symlink_to(tmp_path / "elsewhere")
    (folder / "blast" / "ring").symlink_to(folder)
    assert run("folder", folder, tmp_path / "d").imported == 4


def test_one_import_at_a_time(folder: Path, tmp_path: Path):
    with import_folders.only_one(tmp_path / "d"), pytest.raises(ImportSourceError, match="another command"):
        run("folder", folder, tmp_path / "d")


def test_an_unmapped_class_stops_the_import_and_names_the_nearest(folder: Path, tmp_path: Path):
    put(folder / "lymphocites" / "x.jpg", picture(7))
    with pytest.raises(VocabularyError, match=r"'lymphocites'.*nearest: 'lymphocytes'"):
        run("folder", folder, tmp_path / "d")
    assert not (tmp_path / "d").exists(), "nothing was imported"
    mapped = {"lymphocites": "LYMPH", "Neutrophils": "NEUT", "blast": "BLAST"}
    assert run("folder", folder, tmp_path / "d", classes=mapped).imported == 4


def test_scale_and_site_must_agree(folder: Path, tmp_path: Path):
    with pytest.raises(SiteError, match=r"says 0.1 um/px.*says 0.2"):
        run("folder", folder, tmp_path / "d", microns_per_px=0.1)
    with pytest.raises(SiteError, match=r"site 'labb' has no file.*smearline site new labb"):
        run("folder", folder, tmp_path / "d", site="labb")
    put(tmp_path / "pbc" / "basophil" / "BA_1.jpg", picture(1))
    with pytest.raises(SiteError, match=r"source 'pbc' says 0.1 um/px"):
        run("pbc", tmp_path / "pbc", tmp_path / "d")


def test_tables_beside_the_images(folder: Path, tmp_path: Path):
    put(
        folder / "labels.csv",
        "file,type,patient,smear,acquired_at,auer_rod\n"
        "blast/c.jpg,BLAST,p1,s1,2026-01-02T03:04:05+02:00,present\n"
        "Neutrophils/a.jpg,NEUT_BAND,p2,s2,,\n"
        "blast/gone.jpg,BLAST,p1,s1,,\n",
    )
    put(folder / "patients.csv", "patient,smear,diagnosis,age,sex\np1,s1,AML,61,f\np2,s2,healthy,,m\n")
    report = run("folder", folder, tmp_path / "d")
    assert report.quarantined == {"missing": 1}, "a row whose file is gone is not forgotten"
    frame = dataset.labelled_index(tmp_path / "d").set_index("true_type")
    assert frame.loc["BLAST", "auer_rod"] == "present"
    assert frame.loc["BLAST", "acquired_at"] == pd.Timestamp("2026-01-02T01:04:05Z")
    assert frame.loc["NEUT_BAND", "patient"] != frame.loc["BLAST", "patient"]
    patients = dataset.read_tables(tmp_path / "d", "labels/patients-*.parquet", dataset.PATIENTS)
    assert sorted(patients["diagnosis"]) == ["AML", "HEALTHY"]
    put(folder / "labels.csv", "file,type,auer_rod\nblast/c.jpg,BLAST,perhaps\n")
    with pytest.raises(VocabularyError, match="'perhaps' is no value of auer_rod"):
        run("folder", folder, tmp_path / "e")


def test_patients_become_keyed_pseudonyms_and_raw_paths_stay_local(folder: Path, tmp_path: Path):
    put(folder / "labels.csv", "file,patient\nblast/c.jpg,Mustermann-1970\n")
    put(folder / "blast" / "broken-Mustermann.jpg", b"x")
    run("folder", folder, tmp_path / "d", site="second")
    patient = dataset.index(tmp_path / "d")["patient"].dropna().item()
    assert re.fullmatch("[0-9a-f]{16}", patient)
    for path in (tmp_path / "d").rglob("*.parquet"):
        if path.parent.name != "local":
            assert b"Mustermann" not in path.read_bytes()
            assert "Mustermann" not in str(pd.read_parquet(path).to_dict())
    key = tmp_path / "secret" / "pseudonym.key"
    assert key.stat().st_mode & 0o077 == 0, "the key is the owner's alone"
    key.unlink()
    run("folder", folder, tmp_path / "e", site="second")
    assert dataset.index(tmp_path / "e")["patient"].dropna().item() != patient, "another key, another pseudonym"


def test_lmu_myb_is_the_myelocyte_and_myo_the_myeloblast(tmp_path: Path, sites_folder: Path):
    root = tmp_path / "AML-Cytomorphology_LMU"
    codes = ["NGS", "NGB", "MMZ", "MYB", "PMO", "PMB", "MYO", "MOB", "LYT", "LYA", "MON", "EOS", "BAS", "EBO", "KSC"]
    for number, code in enumerate(codes):
        put(root / "AML-Cytomorphology" / code / f"{code}_0001.tiff", picture(number, kind="TIFF"))
    copy = "BAS_0002 (2021_05_21 20_42_39 UTC).tiff"
    put(root / "AML-Cytomorphology" / "BAS" / copy, picture(99, kind="TIFF"))
    put(
        root / "annotations.dat",
        # as the release has it: 'nan' where nobody looked again, UNC where the second look did not decide
        "BAS/BAS_0001.tiff BAS nan nan\nMYB/MYB_0001.tiff MYB MYB PMO\nBAS/BAS_0002.tiff BAS NGS UNC\n",
    )
    report = run("lmu", root, tmp_path / "d", site="lmu")
    assert (report.found, report.imported, report.tables) == (17, 16, 1)
    frame = dataset.labelled_index(tmp_path / "d")
    by_code = dict(zip(dataset.read_labels(tmp_path / "d").query("role == 'reference'")["source_label"],
                       dataset.read_labels(tmp_path / "d").query("role == 'reference'")["value"], strict=True))  # fmt: skip
    assert by_code["MYB"] == "MYELO"
    assert by_code["MYO"] == "BLAST"
    assert by_code["MOB"] == "BLAST"
    assert frame["conflicted"].sum() == 0, "a re-annotation is another reading, not a contradiction"
    again = dataset.read_labels(tmp_path / "d").query("role == 'reannotation'")
    assert sorted(again["source_label"]) == ["MYB", "NGS", "PMO", "UNC"]
    assert again.groupby("labelled_by").size().tolist() == [2, 2], "two readings, each of two cells"
    put(root / "AML-Cytomorphology" / "XYZ" / "XYZ_0001.tiff", picture(50, kind="TIFF"))
    with pytest.raises(ImportSourceError, match="does not map the class 'XYZ'"):
        run("lmu", root, tmp_path / "e", site="lmu")


def test_pbc_takes_the_finer_prefix(tmp_path: Path, sites_folder: Path):
    root = tmp_path / "PBC_dataset_normal_DIB"
    for number, name in enumerate(
        ["ig/MMY_1", "ig/MY_2", "ig/PMY_3", "ig/IG_4", "neutrophil/NEUTROPHIL_5", "neutrophil/BNE_6"]
    ):
        put(root / f"{name}.jpg", picture(number))
    put(root / "neutrophil" / ".DS_170010.jpg", b"\0\0")
    report = run("pbc", root, tmp_path / "d", site="pbc")
    assert report.quarantined == {"hidden_file": 1}
    assert types(tmp_path / "d") == {
        "MMY": "METAMYELO", "MY": "MYELO", "PMY": "PROMYELO", "IG": "IG", "NEUTROPHIL": "NEUT", "BNE": "NEUT_BAND",
    }  # fmt: skip


def test_jhu_patients_accessions_and_unsigned_slides(tmp_path: Path, sites_folder: Path):
    root = tmp_path / "Data"
    put(root / "All" / "Patient_00" / "Signed slides" / "Blast, no lineage spec" / "BL_1.jpg", picture(1))
    put(root / "All" / "Patient_00" / "1002" / "Signed slides" / "Promonocyte" / "PMO_2.jpg", picture(2))
    put(root / "All" / "Patient_01" / "Unsigned slides" / "3.jpg", picture(3))
    put(
        root / "master.csv", "Patient_ID,Diagnosis,Cohort,Age at Diagnosis,Gender\nPatient_00,APL,Discovery,29,Female\n"
    )
    report = run("jhu", root, tmp_path / "d", site="jhu")
    assert (report.imported, report.tables, report.unlabelled) == (3, 1, 1)
    frame = dataset.labelled_index(tmp_path / "d")
    assert frame["patient"].nunique() == 2
    assert frame["smear"].nunique() == 3, "an accession is a smear of its own"
    assert sorted(frame["true_type"].dropna()) == ["BLAST", "BLAST"]
    patients = dataset.read_tables(tmp_path / "d", "labels/patients-*.parquet", dataset.PATIENTS)
    assert set(patients["diagnosis"].dropna()) == {"APL"}


def test_zheng_class_numbers_belong_to_their_own_set(tmp_path: Path, sites_folder: Path):
    for number, data_set in ((1, 1), (1, 2)):
        put(tmp_path / "z" / f"Dataset {data_set}" / f"{number:03}.bmp", picture(data_set, kind="BMP"))
    put(tmp_path / "z" / "Class Labels of Dataset 1.csv", "image ID,class label\n1,4\n")
    put(tmp_path / "z" / "Class Labels of Dataset 2.csv", "image ID,class\n1,2\n")
    run("zheng", tmp_path / "z", tmp_path / "d", site="zheng2")
    labels = dataset.read_labels(tmp_path / "d")
    assert sorted(labels["value"]) == ["EOS", "LYMPH"]


def test_wbcatt_joins_by_file_name_and_counts_what_is_not_here(tmp_path: Path, sites_folder: Path):
    put(tmp_path / "pbc" / "basophil" / "BA_1.jpg", picture(1))
    header = "img_name,label,cell_size,granularity,path\n"
    put(tmp_path / "w" / "pbc_attr_v1_train.csv", header + "BA_1.jpg,Basophil,big,yes,x\nBA_2.jpg,Basophil,big,yes,x\n")
    with pytest.raises(ImportSourceError, match="Import the images"):
        run("wbcatt", tmp_path / "w", tmp_path / "d", site="pbc")
    run("pbc", tmp_path / "pbc", tmp_path / "d", site="pbc")
    report = run("wbcatt", tmp_path / "w", tmp_path / "d", site="pbc")
    assert report.rows_without_image == 1
    row = dataset.labelled_index(tmp_path / "d").iloc[0]
    assert (row["true_type"], row["cell_size"], row["granularity"]) == ("BASO", "big", "yes")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP"])
def test_metadata_are_dropped_and_pixels_kept(kind: str, tmp_path: Path, sites_folder: Path):
    import hashlib
    import io

    import numpy as np
    from PIL import Image

    from smearline import images

    out, exif = io.BytesIO(), Image.Exif()
    exif[0x010E] = "Erika Mustermann"
    Image.open(io.BytesIO(picture(1))).save(
        out, kind, exif=exif, **({"comment": b"Mustermann"} if kind == "JPEG" else {})
    )
    data = out.getvalue() + b"Mustermann"
    if kind == "JPEG":
        data = data[:2] + b"\xff" * 3 + data[2:]  # fill bytes, which the format allows
        for marker in (b"\xe2", b"\xec"):
            data = data[:2] + b"\xff" + marker + b"\x00\x0cMustermann" + data[2:]
    if kind == "PNG":  # a chunk that no standard knows, behind the first
        data = data[:33] + b"\0\0\0\x0aptNmMustermann" + zlib.crc32(b"ptNmMustermann").to_bytes(4) + data[33:]
    put(tmp_path / "r" / "blast" / f"x.{kind.lower()}", data)
    run("folder", tmp_path / "r", tmp_path / "d")
    (block,) = dataset.iter_rows(tmp_path / "d", ["sha256", "image"])
    assert b"Mustermann" in data
    assert b"Mustermann" not in block["image"][0]
    np.testing.assert_array_equal(images.decode(block["image"][0]), images.decode(data))
    assert block["sha256"] == [hashlib.sha256(data).hexdigest()], "known by the file as it was found"


def conflicted(data: Path) -> dict[str, bool]:
    labels = dataset.read_labels(data)
    return labels.groupby("sha256")["conflicted"].any().to_dict()


@pytest.fixture
def two_deliveries(tmp_path: Path, sites_folder: Path) -> tuple[Path, Path]:
    """The second has a picture of the first under another class, a new one, a broken one, and names that the first has too."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, name, seed in (
        (one, "blast/1.jpg", 1), (one, "blast/2.jpg", 2), (two, "monocyte/9.jpg", 1), (two, "blast/2.jpg", 3),
    ):  # fmt: skip
        put(folder / name, picture(seed))
    put(one / "blast/bad.jpg", b"one"), put(two / "blast/bad.jpg", b"two")
    return one, two


def test_a_conflict_between_deliveries_stays_however_often_either_is_imported(two_deliveries, tmp_path: Path):
    for folder in (*two_deliveries, *two_deliveries[::-1], *two_deliveries):
        run("folder", folder, tmp_path / "d")
    assert sorted(conflicted(tmp_path / "d").values()) == [False, False, True]
    quarantine = pd.read_parquet(tmp_path / "d" / "quarantine.parquet")
    assert sorted(zip(quarantine["folder"].str.split("#").str[0], quarantine["file"], quarantine["reason"], strict=True)) == [
        ("one", "blast/bad.jpg", "unreadable"), ("two", "blast/bad.jpg", "unreadable"),
    ]  # fmt: skip


def test_a_second_delivery_killed_at_any_write_is_completed_by_running_it_again(
    two_deliveries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one, two = two_deliveries
    for folder in two_deliveries:
        run("folder", folder, tmp_path / "whole")
    real, writes = dataset.write_table, []

    def write(table: pa.Table, path: Path, **options: object) -> None:
        writes.append(path)
        if len(writes) > limit:
            if after:
                real(table, path, **options)
            raise KeyboardInterrupt
        real(table, path, **options)

    def contents(data: Path) -> list[object]:
        tables = (
            pq.read_table(path).to_pylist()
            for pattern in ("labels/*", "quarantine.parquet", "local/*.parquet")
            for path in sorted(data.glob(pattern))
        )
        return [conflicted(data), len(dataset.index(data)), *(sorted(map(str, rows)) for rows in tables)]

    for limit in range(12):
        for after in (False, True):
            data = tmp_path / f"killed-{limit}-{after}"
            run("folder", one, data)
            writes.clear()
            with monkeypatch.context() as patch:
                patch.setattr(dataset, "write_table", write)
                with contextlib.suppress(KeyboardInterrupt):
                    run("folder", two, data)
            run("folder", two, data)
            assert contents(data) == contents(tmp_path / "whole"), (limit, after, writes[-1])
        if len(writes) <= limit:
            assert limit > 2
            return
    raise AssertionError("more writes than were expected")


def test_two_files_that_are_broken_alike_are_both_told_so(tmp_path: Path, sites_folder: Path):
    for name in ("1", "2"):
        put(tmp_path / "raw" / "blast" / f"{name}.jpg", b"")
    put(tmp_path / "raw" / "blast" / "3.jpg", picture(3))
    assert run("folder", tmp_path / "raw", tmp_path / "d").quarantined == {"empty": 2}
    assert len(dataset.read_labels(tmp_path / "d")) == 1


def test_a_class_that_is_said_no_more_goes(folder: Path, tmp_path: Path):
    put(folder / "labels.csv", "file,type\nblast/c.jpg,blast\n")
    run("folder", folder, tmp_path / "d")
    before = len(dataset.read_labels(tmp_path / "d"))
    put(folder / "labels.csv", "file,type\nblast/c.jpg,\n")
    assert run("folder", folder, tmp_path / "d").relabelled == 1
    assert len(dataset.read_labels(tmp_path / "d")) == before - 1


def test_of_an_image_whose_patient_is_said_anew_nothing_is_taken(folder: Path, tmp_path: Path):
    def versioned() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in (tmp_path / "d").rglob("*.parquet") if "local" not in p.parts}

    put(folder / "labels.csv", "file,patient,smear\nblast/c.jpg,p1,s1\n")
    run("folder", folder, tmp_path / "d")
    before = versioned()
    put(folder / "labels.csv", "file,patient,smear\nblast/c.jpg,p2,s1\n")
    with pytest.raises(ImportSourceError, match="another patient"):
        run("folder", folder, tmp_path / "d")
    assert versioned() == before


def test_the_folder_of_images_is_not_the_data_set(folder: Path, tmp_path: Path):
    with pytest.raises(ImportSourceError, match="--into names the data set"):
        run("folder", folder, tmp_path / "d" / "cells")


def test_a_picture_that_breaks_its_reader_is_quarantined(folder: Path, tmp_path: Path):
    tiff = b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 259, 3, 1, 1) + struct.pack("<I", 0)
    put(folder / "blast" / "x.tiff", tiff)
    assert run("folder", folder, tmp_path / "d").quarantined == {"unreadable": 1}


def test_a_file_that_was_moved_to_another_class_is_in_conflict_until_the_next_import(folder: Path, tmp_path: Path):
    run("folder", folder, tmp_path / "d")
    (folder / "monocyte").mkdir()
    (folder / "blast" / "c.jpg").rename(folder / "monocyte" / "c.jpg")
    for _ in range(2):
        run("folder", folder, tmp_path / "d")
    assert types(tmp_path / "d") == {"Neutrophils": "NEUT", "monocyte": "MONO"}
    assert not dataset.read_labels(tmp_path / "d")["conflicted"].any()


def test_what_a_later_delivery_does_not_speak_of_stays(tmp_path: Path, sites_folder: Path):
    root = tmp_path / "inbox"
    for i in range(2):
        put(root / f"{i}.jpg", picture(i))
    put(root / "labels.csv", "file,type,patient,smear\n0.jpg,blast,p,s\n1.jpg,blast,p,s")
    put(root / "patients.csv", "patient,smear,diagnosis,age\np,s,AML,40")
    run("folder", root, tmp_path / "d")
    put(root / "2.jpg", picture(2))
    put(root / "labels.csv", "file,type,patient,smear\n2.jpg,eosinophil,p,s\n0.jpg,,p,s\n1.jpg,blast,p,s")
    (root / "patients.csv").unlink()
    run("folder", root, tmp_path / "d")
    labels = dataset.read_labels(tmp_path / "d")
    assert sorted(labels["value"]) == ["BLAST", "EOS"], "the blank class took its label back"
    patients = dataset.read_tables(tmp_path / "d", "labels/patients-*.parquet", dataset.PATIENTS)
    assert patients[["diagnosis", "age"]].to_numpy().tolist() == [["AML", 40.0]]


def test_a_table_that_is_gone_takes_no_label_back(tmp_path: Path, sites_folder: Path):
    put(tmp_path / "raw" / "0.jpg", picture(0))
    put(tmp_path / "raw" / "labels.csv", "file,type\n0.jpg,blast")
    run("folder", tmp_path / "raw", tmp_path / "d")
    (tmp_path / "raw" / "labels.csv").unlink()
    run("folder", tmp_path / "raw", tmp_path / "d")
    assert list(dataset.read_labels(tmp_path / "d")["value"]) == ["BLAST"]


@pytest.mark.mission("a corrected blood count replaces what was said before")
def test_blood_counts_are_corrected_and_another_patients_are_not_taken(folder: Path, tmp_path: Path):
    put(folder / "labels.csv", "file,type,patient,smear\nblast/c.jpg,BLAST,p1,s1\n")
    put(
        folder / "xn.csv",
        "smear,patient,WBC(10^9/L),PLT(10^9/L)\ns1,p1,42,\ns1,p2,5,9\ns9,p9,1,1\n".replace("s1,p2", "s2,p2"),
    )
    report = run("folder", folder, tmp_path / "d")
    assert (report.count_values, report.corrected_counts, report.counts_of_another) == (5, 0, 0)
    assert report.samples_without_image == 2
    put(folder / "xn.csv", "smear,patient,WBC(10^9/L),PLT(10^9/L)\ns1,p1,4.2,150\n")
    report = run("folder", folder, tmp_path / "d")
    assert (report.count_values, report.corrected_counts) == (6, 2) and "blood counts corrected: 2 values" in str(
        report
    )
    put(folder / "xn.csv", "smear,patient,sampled_at,WBC(10^9/L)\ns1,p1,,4.2\ns1,p2,2026-02-03,5\n")
    report = run("folder", folder, tmp_path / "d")
    assert (report.count_values, report.corrected_counts, report.counts_of_another) == (6, 0, 1)
    counts = dataset.read_tables(tmp_path / "d", "cbc/*.parquet", cbc.COUNTS)
    index = dataset.index(tmp_path / "d").dropna(subset=["smear"])
    assert cbc.laboratory_values(counts).loc[("lab", index["smear"].iloc[0]), "WBC"] == 4.2
    put(folder / "cbc.csv", "smear,patient,sampled_at,WBC(10^9/L)\ns1,p1,,4.3\n")
    with pytest.raises(ImportSourceError, match="the exports in this folder: WBC stands twice"):
        run("folder", folder, tmp_path / "d")


@pytest.mark.mission("a table speaks of the files below it, and two tables do not contradict each other in silence")
def test_a_table_speaks_of_the_files_below_it(folder: Path, tmp_path: Path):
    put(folder / "1.jpg", picture(11))
    put(folder / "slide2" / "1.jpg", picture(12))
    put(folder / "slide2" / "labels.csv", "file,type,patient\n1.jpg,BLAST,p9\n")
    mapped = {"slide2": None, "Neutrophils": "NEUT", "blast": "BLAST", "BLAST": "BLAST", "": None}
    run("folder", folder, tmp_path / "d", classes=mapped)
    found = dataset.labelled_index(tmp_path / "d")
    assert found["patient"].notna().sum() == 1 and (found["true_type"] == "BLAST").sum() == 2
    put(folder / "labels.csv", "file,type,patient\nslide2/1.jpg,BLAST,p1\n")
    with pytest.raises(ImportSourceError, match=r"labels\.csv says another patient of slide2/1\.jpg"):
        run("folder", folder, tmp_path / "e", classes=mapped)
    (folder / "slide2" / "labels.csv").unlink()
    put(folder / "patients.csv", "patient,diagnosis\np1,AML\n")
    put(folder / "more" / "patients.csv", "patient,diagnosis\np1,healthy\n")
    with pytest.raises(ImportSourceError, match="says another diagnosis"):
        run("folder", folder, tmp_path / "e", classes=mapped)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ("file,type,patient\nblast/c.jpg,Blast, no lineage,p1\nNeutrophils/a.jpg,Blast, no lineage,p2\n", "in quotes"),
        ("file,type,patient\nblast/c.jpg,BLAST,p1\nNeutrophils/a.jpg,Blast, no lineage,p2\n", "in quotes"),
        ("file,Type,type\nblast/c.jpg,BLAST,MONO\n", "column 'type' twice"),
    ],
)
def test_a_table_whose_cells_are_shifted_is_refused(folder: Path, tmp_path: Path, table: str, why: str):
    put(folder / "labels.csv", table)
    with pytest.raises(ImportSourceError, match=why):
        run("folder", folder, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_what_is_listed_is_counted_once_and_rows_of_nobody_are_told(folder: Path, tmp_path: Path):
    put(folder / "blast" / "x.webp", b"RIFF")
    put(
        folder / "labels.csv",
        "file,type,patient\nblast/x.webp,BLAST,p1\nblast/c.jpg,BLAST,0012\nNeutrophils/a.jpg,,p1\n,,\n",
    )
    put(folder / "patients.csv", 'patient,diagnosis,age\n12,AML,60\n0012,AML,"63,5"\np1,AML,adult\n')
    report = run("folder", folder, tmp_path / "d")
    assert dict(report.quarantined) == {"not_an_image": 1} and report.found == 6
    assert report.rows_without_image == 1 and "table rows without an image here: 1" in str(report)
    assert report.unread_ages == 1 and "no number of years, and is left out: 1" in str(report)
    patients = dataset.read_tables(tmp_path / "d", "labels/patients-*.parquet", dataset.PATIENTS)
    assert patients["age"].dropna().tolist() == [63.5] and patients["diagnosis"].tolist() == ["AML"] * 2


@pytest.mark.mission("no picture is read at a scale that no microscope has, or at one that was corrected since")
def test_a_scale_is_one_of_a_microscope_and_stays(folder: Path, tmp_path: Path, sites_folder: Path):
    put(folder / "labels.csv", "file,microns_per_px\nblast/c.jpg,10\nNeutrophils/a.jpg,0\nNeutrophils/b.png,0.07\n")
    assert run("folder", folder, tmp_path / "d", site="unscaled").quarantined == {"bad_table_value": 2}
    with pytest.raises(SiteError, match="no scale of a microscope"):
        run("folder", folder, tmp_path / "e", site="unscaled", microns_per_px=-10)
    (folder / "labels.csv").unlink()
    run("folder", folder, tmp_path / "f")
    site = sites_folder / "lab.yaml"
    put(site, site.read_text(encoding="utf-8").replace("microns_per_px: 0.2", "microns_per_px: 0.1"))
    with pytest.raises(ImportSourceError, match=r"3 images were imported before with another scale than 0\.1"):
        run("folder", folder, tmp_path / "f")


def test_the_folder_itself_names_the_class_and_not_a_link_to_it(tmp_path: Path, sites_folder: Path):
    put(tmp_path / "raw" / "z" / "promyelocyte" / "1.jpg", picture(1))
    (tmp_path / "raw" / "myelocyte").symlink_to(tmp_path / "raw" / "z" / "promyelocyte")
    assert import_folders.listing(tmp_path / "raw")[0] == ["z/promyelocyte/1.jpg"]
