"""What is asked of a data set and what keeps it: which images it knows, counts, damage, and a patient's deletion."""

import hashlib
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import picture, put

from smearline import dataset, deletion, importing, integrity, labelling, lookup, sites, sources, stats
from smearline.errors import DataError, VocabularyError

NOW = datetime(2026, 11, 23, tzinfo=UTC)
EXACT = {"exact": 1, "exact_across_patients": 0, "exact_across_sites": 1}
CLASSES = ("blast", "lymphocyte", "Neutrophils")


@pytest.fixture
def made(tmp_path: Path, sites_folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(data set, raw folder): 24 pictures of 6 patients of 'lab', in four shards, and 3 of 'second'; one in conflict."""
    raw, into = tmp_path / "raw", tmp_path / "w" / "data"
    rows, patients = ["file,type,patient,smear,acquired_at"], ["patient,smear,diagnosis,age,sex"]
    for i in range(24):
        name = f"P{i // 4}/{CLASSES[i % 3]}/{i:02d}.jpg"
        put(raw / name, picture(i))
        rows.append(f"{name},{CLASSES[i % 3]},P{i // 4},S{i // 4},2026-0{1 + i // 12}-05T10:00:00+01:00")
    patients += [f"P{i},S{i},AML,40,F" for i in range(6)]
    put(raw / "labels.csv", "\n".join(rows))
    put(raw / "patients.csv", "\n".join(patients))
    monkeypatch.setattr(dataset.CellWriter.__init__, "__defaults__", (6 * len(picture(1)),))
    importing.import_source(sources.load("folder"), raw, sites.load("lab"), into)
    for i in range(3):
        put(tmp_path / "other" / "monocyte" / f"{i}.jpg", picture(100 + i))
    put(tmp_path / "other" / "monocyte" / "again.jpg", picture(0))  # a blast of 'lab'
    importing.import_source(sources.load("folder"), tmp_path / "other", sites.load("second"), into)
    return into, raw


def splits_of(data: Path, to: Path) -> Path:
    frame = dataset.index(data, ["sha256", "patient"])
    split = np.where(frame["patient"].isin(sorted(frame["patient"].dropna().unique())[:2]), "test", "train")
    group = frame["patient"].fillna("none")
    frame.assign(split=split, group=group, near_duplicate=False).to_parquet(to, index=False)
    return to


def test_what_is_known_is_found_whichever_shard_it_stands_in(made):
    data, _ = made
    frame, known = dataset.index(data, ["sha256", "site", "smear"]), lookup.Known(data)
    found = known.find([*frame["sha256"], "f" * 64], ["site", "smear"])
    smears = frame["smear"].astype(object).where(frame["smear"].notna(), None)
    assert found == dict(zip(frame["sha256"], zip(frame["site"], smears, strict=True), strict=True))
    assert len(dataset.shards(data)) == 5
    assert lookup.Known(data.parent / "nothing").find(["f" * 64]) == {}


def test_two_images_that_share_their_last_bits_are_told_apart(tmp_path: Path):
    with dataset.CellWriter(tmp_path / "cells", "lab") as writer:
        writer.add(dict.fromkeys(dataset.CELLS.names) | {"sha256": "a" * 64, "image": b"x"})
    assert lookup.Known(tmp_path).find(["b" * 48 + "a" * 16]) == {}
    assert list(lookup.Known(tmp_path).find(["a" * 64])) == ["a" * 64]


def test_the_counts_are_those_of_the_rows(made):
    data, _ = made
    found = stats.stats(data, splits_of(data, data.parent / "splits.parquet"))
    frame = dataset.labelled_index(data)
    expected = frame["true_type"].where(~frame["conflicted"], "conflicted").fillna("unlabelled").value_counts()
    assert found["by"]["type"] == expected.to_dict() | {} and found["by"]["type"]["conflicted"] == 1
    assert found["images"] == 27 == sum(found["by"]["site"].values())
    assert found["by"]["month"] == {"2026-01": 12, "2026-02": 12, "unknown": 3}
    assert found["sites"]["lab"] == {"images": 24, "smears": 6, "patients": 6}
    assert found["duplicates"] == EXACT | {"near": 0, "near_across_patients": 0, "near_across_sites": 0}
    assert {name: told["images"] for name, told in found["splits"].items()} == {"test": 8, "train": 19}
    assert found["image_bytes"] >= sum(len(picture(i)) for i in range(24))
    assert sum(told["labels"] for told in found["labels"]) == 28


def test_near_duplicates_are_counted_across_patients_and_sites(made):
    data, _ = made
    path = splits_of(data, data.parent / "splits.parquet")
    frame = pd.read_parquet(path)
    of_site = dataset.index(data, ["sha256", "site"]).set_index("sha256")["site"]
    second = frame.index[frame["sha256"].map(of_site) == "second"][0]
    two = [*frame.index[[0, 23]], second]
    frame.loc[two, ["group", "near_duplicate"]] = ["one", True]
    frame.to_parquet(path, index=False)
    found = stats.stats(data, path)["duplicates"]
    assert found == EXACT | {"near": 3, "near_across_patients": 1, "near_across_sites": 1}


def versioned(data: Path) -> integrity.Version:
    """What a version would say of the files, with copies of them in a cache."""
    files = [p for p in sorted(data.rglob("*.parquet")) if "local" not in p.parts]
    md5 = {p.relative_to(data).as_posix(): hashlib.md5(p.read_bytes()).hexdigest() for p in files}
    copies = {name: put(data.parent / "cache" / of, (data / name).read_bytes()) for name, of in md5.items()}
    return integrity.Version(md5, copies)


def mend(data: Path, found: list[integrity.Finding]) -> None:
    """Do as the remedies say."""
    for finding in found:
        if finding.kind in ("damaged", "missing"):
            subprocess.run(finding.remedy, shell=True, check=True)


def test_a_whole_data_set_has_no_findings(made):
    data, _ = made
    splits = splits_of(data, data.parent / "splits.parquet")
    assert integrity.verify(data, versioned(data), splits=splits, decode=True) == []
    assert integrity.verify(data) == []


def test_any_flipped_byte_is_found_and_its_smears_are_named(made):
    data, _ = made
    version, shard = versioned(data), dataset.shards(data)[1]
    whole, random = shard.read_bytes(), np.random.default_rng(3)
    for place in [0, len(whole) - 1, *random.integers(0, len(whole), 40)]:
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        kinds = {f.kind for f in integrity.verify(data, version) if f.where == f"cells/{shard.name}"}
        assert kinds == {"damaged"}, place
    shard.write_bytes(whole)
    middle = whole.index(b"\xff\xd8") + 200  # in a picture
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    (found,) = integrity.verify(data)
    assert found.kind == "damaged" and 0 < len(found.smears) < 4 and all(s.startswith("lab/") for s in found.smears)
    assert f"rm {shard}" in found.remedy and "import" in found.remedy, "no version has it"
    found = integrity.verify(data, version)
    mend(data, found)
    assert integrity.verify(data, version) == [] and len(found) == 1


def test_a_truncated_and_a_missing_shard_are_found_with_their_smears_and_got_back(made):
    data, _ = made
    version, shards = versioned(data), dataset.shards(data)
    smears = [{f"lab/{s}" for s in pa.parquet.read_table(path)["smear"].to_pylist()} for path in shards]
    whole = {path: path.read_bytes() for path in shards}
    shards[0].write_bytes(whole[shards[0]][:-100])
    shards[1].unlink()
    found = integrity.verify(data, version)
    assert {f.where: f.kind for f in found} == {
        f"cells/{shards[0].name}": "damaged",
        f"cells/{shards[1].name}": "missing",
        "labels/cells-lab.00001.parquet": "label_without_image",
    }
    assert smears[0] <= set(found[0].smears), "from what this machine imported"
    assert set(found[1].smears) == smears[1], "from the cache's copy"
    assert {f.kind for f in integrity.verify(data)} == {"damaged", "label_without_image"}, "without a version, too"
    mend(data, found)
    assert {path: path.read_bytes() for path in shards} == whole
    for path in shards:
        path.unlink()
    assert {f.kind for f in integrity.verify(data)} == {"label_without_image"}


def test_what_was_labelled_deleted_or_imported_since_is_no_damage(made, tmp_path: Path):
    data, raw = made
    version = versioned(data)
    frame = dataset.index(data, ["sha256", "site", "patient"]).query("site == 'lab'")
    table = put(tmp_path / "t.csv", f"sha256,type\n{frame['sha256'].iloc[-1]},EOS")
    labelling.label(data, "lab", table, "reader 2", NOW)
    deletion.forget(data, "lab", frame["patient"].iloc[0], "asked for it", NOW)
    put(raw / "P5" / "blast" / "new.jpg", picture(77))
    importing.import_source(sources.load("folder"), raw, sites.load("lab"), data)
    assert {f.kind for f in integrity.verify(data, version)} == {"unversioned"}
    deletion.compact(data)
    found = integrity.verify(data, version)
    assert {f.kind for f in found} == {"unversioned"}
    assert any("compacted" in f.remedy for f in found)
    assert integrity.verify(data) == []


def test_no_flipped_byte_of_any_file_stops_the_others_from_being_looked_at(made):
    data, _ = made
    patient = dataset.index(data, ["patient"])["patient"].dropna().iloc[0]
    deletion.forget(data, "lab", patient, "asked for it", NOW)
    splits = splits_of(data, data.parent / "splits.parquet")
    version, random = versioned(data), np.random.default_rng(4)
    dataset.shards(data)[-1].unlink()
    for path in [*sorted(data.rglob("*.parquet")), splits]:
        whole = path.read_bytes()
        for place in random.integers(0, len(whole), 40):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ int(random.integers(1, 256))]) + whole[place + 1 :])
            for said in (version, None):
                kinds = {f.kind for f in integrity.verify(data, said, splits=splits)}
                assert said is None or "missing" in kinds, (path.name, place)
            if path.name in {Path(name).name for name in version.md5}:
                found = integrity.verify(data, version)
                assert [f for f in found if f.where.endswith(path.name)], (path.name, place)
        path.write_bytes(whole)


def test_what_stands_twice_or_in_two_splits_is_found(made):
    data, _ = made
    path = splits_of(data, data.parent / "splits.parquet")
    frame = pd.read_parquet(path)
    again = frame.iloc[:1].assign(split="val")
    pd.concat([frame.iloc[:-1], again]).to_parquet(path, index=False)
    assert {f.kind for f in integrity.verify(data, splits=path)} == {"in_two_splits", "in_no_split"}
    shard = dataset.shards(data)[0]
    shard.with_name("lab-copy.parquet").write_bytes(shard.read_bytes())
    assert {f.kind for f in integrity.verify(data)} == {"twice", "damaged"}, "a name that is not what it holds"


def test_a_forgotten_patient_is_gone_at_once_and_does_not_come_back(made):
    data, raw = made
    frame = dataset.index(data, ["sha256", "patient"])
    patient = frame["patient"].dropna().iloc[0]
    gone = set(frame.loc[frame["patient"] == patient, "sha256"])
    before = {path: path.read_bytes() for path in dataset.shards(data)}
    done = deletion.forget(data, "lab", patient, "asked for it", NOW)
    assert (done["images"], done["labels"], done["patients"]) == (4, 4, 1)
    assert not gone & set(dataset.index(data, ["sha256"])["sha256"])
    assert not gone & {s for rows in dataset.iter_rows(data, ["sha256"]) for s in rows["sha256"]}
    assert len(dataset.index(data, ["thumbnail"])) == 23 == stats.stats(data)["images"]
    assert not gone & set(dataset.read_labels(data)["sha256"])
    assert {path: path.read_bytes() for path in dataset.shards(data)} == before, "no shard is rewritten yet"
    report = importing.import_source(sources.load("folder"), raw, sites.load("lab"), data)
    assert (report.imported, report.quarantined["deleted"]) == (0, 4)
    assert not gone & set(dataset.read_labels(data)["sha256"])
    assert deletion.forget(data, "lab", patient, "again", NOW) == dict.fromkeys(done, 0) | {"patients": 0}
    with pytest.raises(DataError, match="knows no patient 'nobody'"):
        deletion.forget(data, "lab", "nobody", "a mistake", NOW)


def test_a_compaction_rewrites_only_the_shards_concerned(made, monkeypatch: pytest.MonkeyPatch):
    data, raw = made
    frame = dataset.index(data, ["sha256", "patient"])
    patient = frame["patient"].dropna().iloc[0]
    mine = frame[frame["patient"] == patient]
    gone, concerned = set(mine["sha256"]), set(mine["shard"])
    before = {str(path): path.read_bytes() for path in dataset.shards(data)}
    images = [frame.set_index("sha256").loc[list(gone)].index[0]]
    deletion.forget(data, "lab", patient, "asked for it", NOW)
    kept = dataset.index(data).drop(columns=["shard", "row"]).sort_values("sha256", ignore_index=True)

    with monkeypatch.context() as patch:  # killed between a shard's new content and its new name
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            deletion.compact(data)
    deletion.compact(data)
    pd.testing.assert_frame_equal(
        dataset.index(data).drop(columns=["shard", "row"]).sort_values("sha256", ignore_index=True), kept
    )
    now = {str(path): path.read_bytes() for path in dataset.shards(data)}
    assert {p for p in before if p not in now or now[p] != before[p]} == concerned and len(concerned) < 3
    assert not any(sha256.encode() in content for sha256 in images for content in now.values())
    assert integrity.verify(data) == []
    named = [path for path in data.rglob("*") if path.is_file() and patient.encode() in path.read_bytes()]
    assert named == [], "the list of what was deleted names nobody"
    report = importing.import_source(sources.load("folder"), raw, sites.load("lab"), data)
    assert report.quarantined["deleted"] == 4
    assert deletion.compact(data)["shards"] == 0


def test_labels_from_a_table_stand_beside_or_in_place_of_the_earlier_ones(made, tmp_path: Path):
    data, _ = made
    frame = dataset.labelled_index(data).query("site == 'lab' and not conflicted").set_index("sha256")
    blast = frame.index[frame["true_type"] == "BLAST"][0]
    other = frame.index[frame["true_type"] == "LYMPH"][0]
    table = put(tmp_path / "again.csv", f"sha256,type,cell_size\n{blast},monocyte,\n{other},,big\n")

    def now() -> pd.DataFrame:
        return dataset.labelled_index(data).set_index("sha256")

    assert labelling.label(data, "lab", table, "reader 2", NOW) == {"labels": 2, "superseded": 0}
    assert now().loc[blast, "conflicted"] and now().loc[other, "cell_size"] == "big"
    done = labelling.label(data, "lab", table, "reader 2", NOW, supersede=True)
    assert done == {"labels": 2, "superseded": 1}
    assert now().loc[blast, "true_type"] == "MONO" and not now().loc[blast, "conflicted"]
    put(tmp_path / "again.csv", f"sha256,type\n{blast},EOS\n")
    assert labelling.label(data, "lab", table, "reader 2", NOW)["superseded"] == 1, "a reader may change his own mind"
    assert now().loc[blast, "true_type"] == "EOS"


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("sha256,typ\n{0},EOS", DataError, "nearest: 'type'"),
        ("sha256,type\n{0},EOSS", VocabularyError, "EOS"),
        ("sha256,type\n{0},EOS\n{0},EOS", DataError, "twice"),
        ("sha256,type\n" + "f" * 64 + ",EOS", DataError, "1 images that site 'lab' does not have"),
        ("file,type\na.jpg,EOS", DataError, "no column sha256"),
        ("sha256,type\nabc,EOS", DataError, "'abc' is no SHA-256"),
        ("", DataError, "cannot be read as a table"),
    ],
)
def test_labels_that_cannot_be_taken_are_refused_whole(made, tmp_path: Path, text: str, error: type, says: str):
    data, _ = made
    sha256 = dataset.index(data).query("site == 'lab'")["sha256"].iloc[0]
    before = dataset.label_paths(data, "lab")[0].read_bytes()
    with pytest.raises(error, match=says):
        labelling.label(data, "lab", put(tmp_path / "t.csv", text.format(sha256)), "reader 2", NOW)
    assert dataset.label_paths(data, "lab")[0].read_bytes() == before


def label_rows(*sha256s: str, value: str = "EOS") -> pa.Table:
    common = {"name": "type", "value": value, "labelled_by": "r", "role": "reference", "source": "labels"}
    return pa.Table.from_pylist([{"sha256": s, **common} for s in sha256s], schema=dataset.LABELS)


def test_new_labels_fill_the_last_table_and_a_relabelling_writes_those_it_touches(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(dataset, "LABEL_PART", 4)
    images = [f"{i:064x}" for i in range(11)]

    def held() -> list[list[int]]:
        tables = [pa.parquet.read_table(path)["sha256"].to_pylist() for path in dataset.label_paths(tmp_path, "lab")]
        return [sorted(images.index(s) for s in table) for table in tables]

    dataset.merge_labels(tmp_path, "lab", label_rows(*images[:6]))
    assert held() == [[0, 1, 2, 3], [4, 5]]
    first = dataset.label_paths(tmp_path, "lab")[0]
    before = first.stat().st_mtime_ns
    dataset.merge_labels(tmp_path, "lab", label_rows(*images[4:]))
    assert held() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert first.stat().st_mtime_ns == before

    second = dataset.label_paths(tmp_path, "lab")[1]
    before = second.stat().st_mtime_ns
    went = dataset.merge_labels(tmp_path, "lab", label_rows(images[1], images[9], value="BASO"), lambda row: True)
    assert went == 2
    assert second.stat().st_mtime_ns == before
    assert held() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    labels = pd.concat(map(pd.read_parquet, dataset.label_paths(tmp_path, "lab")))
    assert sorted(images.index(s) for s in labels.loc[labels["value"] == "BASO", "sha256"]) == [1, 9]
    dataset.merge_labels(tmp_path, "la", label_rows(images[0]))  # a site whose name begins alike has its own
    assert len(dataset.label_paths(tmp_path, "la")) == 1
    assert len(dataset.label_paths(tmp_path, "lab")) == 3


def test_an_image_under_two_labels_has_both_in_one_table(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(dataset, "LABEL_PART", 2)
    images = [f"{i:064x}" for i in range(5)]
    both = pa.concat_tables([label_rows(*images), label_rows(images[0], value="BASO")])
    dataset.merge_labels(tmp_path, "lab", both)
    tables = [pd.read_parquet(path) for path in dataset.label_paths(tmp_path, "lab")]
    assert [len(table) for table in tables] == [3, 2, 1]
    assert tables[0].loc[tables[0]["sha256"] == images[0], "conflicted"].all()


def test_an_image_under_two_patients_is_counted_and_once_alone(tmp_path: Path, sites_folder: Path):
    into, rows = tmp_path / "data", ["file,type,patient,smear"]
    for name, seed, patient in (("a", 1, "P1"), ("b", 1, "P2"), ("c", 1, "P1"), ("d", 2, "P3")):
        put(tmp_path / "raw" / f"{name}.jpg", picture(seed))
        rows.append(f"{name}.jpg,blast,{patient},{patient}")
    put(tmp_path / "raw" / "labels.csv", "\n".join(rows))
    for _ in range(2):
        importing.import_source(sources.load("folder"), tmp_path / "raw", sites.load("lab"), into)
        assert stats.stats(into)["duplicates"] == {"exact": 2, "exact_across_patients": 1, "exact_across_sites": 0}


def test_a_label_that_supersedes_goes_for_every_site_that_labelled_the_picture(made, tmp_path: Path):
    data, _ = made
    (both,) = {s for s, c in dataset.read_labels(data).groupby("sha256")["conflicted"].any().items() if c}
    table = put(tmp_path / "t.csv", f"sha256,type\n{both},EOS")
    assert labelling.count(data) == (28, 1)
    assert labelling.label(data, "lab", table, "reader 2", NOW, supersede=True) == {"labels": 1, "superseded": 2}
    assert labelling.count(data) == (27, 0)
    assert dataset.resolved_labels(data).set_index("sha256").loc[both, "true_type"] == "EOS"
