"""Flow ingest: what reviewers signed off, and new files in inbox/SITE, become a version of the data set.

Every step may be cut off and done again: images are known by their SHA-256, rows by their keys, a case is marked only when
the version that holds it is in git and pushed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows import audit
from flows.frame import in_workspace, nothing_new, table
from flows.retrain import push
from flows.workspace import STATE, Workspace
from serving.cases import CaseStore, SignedCase
from smearline import cbc, dataset, settings, sites, vocabulary
from smearline.errors import SmearlineError
from smearline.import_folders import listing, only_one

INBOX = Path("inbox")


@flow(name="ingest", log_prints=True)
@in_workspace()
def ingest(workspace: str = ".") -> State[Any]:
    """Take in signed-off cases and new files, version the data, and drop the images that no retention allows."""
    space, data = Workspace(Path(workspace)), settings.load().data.folder
    store = CaseStore(home=space.service)
    try:
        commit, counts, failed = _take_in(space, store, data)
    finally:  # though the rest may fail for many nights
        purged = {f"purged: {name}": number for name, number in store.purge(datetime.now(UTC)).items()}
    if failed:
        return Failed(message="\n".join(failed))
    if not commit:
        return nothing_new("no case was signed off and no file came since the last time")
    rows = [{"what": name.replace("_", " "), "number": number} for name, number in {**counts, **purged}.items()]
    table("ingest", rows, f"Data version {commit}")
    return Completed(
        message=f"data version {commit}: {counts.get('cases', 0)} cases, {counts['folders of new files']} folders of files"
    )


def _take_in(space: Workspace, store: CaseStore, data: Path) -> tuple[str, dict[str, int], list[str]]:
    """The commit of the new version (empty: nothing is new), what it took in, and what failed."""
    # Somebody labelled or deleted; refused where the data are older than their pointers.
    changed = space.data_changed(data)
    signed, failed = _fitting(store.signed_off(), data)
    counts = take_cases(signed, data) if signed else {}
    looked_at: dict[Path, str] = {}
    for folder in sorted(p for p in INBOX.glob("*") if p.is_dir()):
        seen, now = STATE / f"inbox-{folder.name}", contents(folder)
        if not now or (seen.exists() and seen.read_text() == now):
            continue
        try:
            private = sites.load(folder.name).identifiers != "public"
            command = ("import", "folder", str(folder), "--site", folder.name, "--into", str(data))
            space.run("smearline.cli", *command, private=private)
            looked_at[seen] = now
        except SmearlineError as error:
            failed.append(f"{folder}: {error}")
    changed = changed or bool(signed or looked_at)
    commit = version(space, data, counts | {"folders": len(looked_at)}) if changed else ""
    if signed:  # a sign-off that came meanwhile is left to the next run
        store.mark_ingested(signed, commit)
    for seen, now in looked_at.items():
        seen.write_text(now)
    return commit, {**counts, "folders of new files": len(looked_at)}, failed


def _fitting(signed: list[SignedCase], data: Path) -> tuple[list[SignedCase], list[str]]:
    """The cases but for those whose smear is another patient's in the data set, and why those are left out."""
    known = dataset.smear_patients(data) if signed else {}
    taken, refused = list[SignedCase](), []
    for case in signed:
        whose = known.get((case.site, case.smear or ""))
        if case.patient and whose and whose != case.patient:
            refused.append(
                f"case {case.case_id} of {case.site} was not taken in: the data set has its smear as another patient's; which of "
                "the two is right is for a person to say"
            )
        else:
            taken.append(case)
    return taken, refused


@task(cache_policy=NO_CACHE)
def take_cases(signed: list[SignedCase], data: Path) -> dict[str, int]:
    """Images, labels, diagnoses and blood counts of signed-off cases into the data set; what is there is not added again."""
    with only_one(data):
        there = set(dataset.index(data, ["sha256"])["sha256"]) if any((data / "cells").glob("[!.]*.parquet")) else set()
        found: Counter[str] = Counter()
        for site in sorted({case.site for case in signed}):
            found.update(_take_site(site, [case for case in signed if case.site == site], data, there))
        return dict(found)


def _take_site(site: str, signed: list[SignedCase], data: Path, there: set[str]) -> dict[str, int]:
    forgotten = dataset.Forgotten(data)
    cases = [case for case in signed if not forgotten.has(site, case.patient, case.smear)]
    whose = {cell.sha256: {"patient": case.patient, "smear": case.smear} for case in cases for cell in case.cells}
    named, missing, gone = set(whose), set(whose) - there, set(dataset.deleted(data))
    with dataset.CellWriter(data / "cells", site) as writer:
        for shard in sorted({shard for case in cases for shard in case.shards}):
            for part in pq.ParquetFile(shard).iter_batches(batch_size=dataset.ROW_GROUP):
                for row in part.to_pylist():
                    if row["sha256"] in missing and row["sha256"] not in gone:  # nothing of a patient who was deleted
                        missing.remove(row["sha256"])
                        writer.add(row | whose[row["sha256"]])  # the patient may have been named later
    labels = [row for case in cases for row in _labels(case) if row["sha256"] not in missing]
    said = {(row["sha256"], row["name"], row["source"]): row["value"] for row in labels}
    again = {_source(case) for case in cases}

    def withdrawn(old: Any) -> bool:
        """A case that is signed again says what it says now, and nothing of what it said before. What another case says of the
        same picture stays: then the two are in conflict."""
        return old.source in again and said.get((old.sha256, old.name, old.source)) != old.value

    dataset.merge_labels(data, site, pa.Table.from_pylist(labels, schema=dataset.LABELS), withdrawn, named)
    path, of_smear = data / "labels" / f"patients-{site}.parquet", ["site", "patient", "smear"]
    known = {tuple(row[k] for k in of_smear): row for row in pq.read_table(path).to_pylist()} if path.exists() else {}
    diagnosed = [_patient(case, known) for case in cases if case.patient and case.diagnosis]
    if diagnosed:
        dataset.merge_rows(path, diagnosed, dataset.PATIENTS, of_smear, keep="last")
    counts = [row | {"patient": case.patient} for case in cases for row in case.counts.to_pylist()]
    if counts:
        dataset.merge_rows(data / "cbc" / f"{site}.parquet", counts, cbc.COUNTS, cbc.KEY, keep="last")
    found = {
        "cases": len(cases),
        "cases_of_deleted_patients": len(signed) - len(cases),
        "images_added": len(named - there - missing),
        "images_known": len(named & there),
        "images_gone": len(missing),
        "labels": len(labels),
        "diagnoses": len(diagnosed),
        "count_values": len(counts),
    }
    there |= named - missing  # the same picture may be signed off at another site too
    return found


def _source(case: SignedCase) -> str:
    return f"review of {case.case_id}"


def _labels(case: SignedCase) -> Iterator[dict[str, Any]]:
    """Rows of LABELS: the type of every cell, as confirmed or overridden, and what characteristics the reviewer set.

    A cell that the model left unidentified, and to which the reviewer gave no type, gets none by the sign-off."""
    by = {"labelled_by": case.reviewer, "labelled_at": case.signed_at, "role": "reference"}
    by |= {"source": _source(case), "vocabulary": vocabulary.load().version, "conflicted": False}
    for cell in case.cells:
        for name, value in {**({"type": cell.type} if cell.looked_at else {}), **cell.characteristics}.items():
            yield {"sha256": cell.sha256, "name": name, "value": value, "source_label": value, **by}


def _patient(case: SignedCase, known: Mapping[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """A row of PATIENTS: what is known of the patient stays, the diagnosis is the reviewer's."""
    row = known.get((case.site, case.patient, case.smear), {"age": None, "sex": None})
    said = {"diagnosis": case.diagnosis, "source_diagnosis": case.diagnosis, "source": _source(case)}
    whose = {"site": case.site, "patient": case.patient, "smear": case.smear, "origin": sites.load(case.site).origin}
    return {**row, **whose, **said}


@task(cache_policy=NO_CACHE)
def version(space: Workspace, data: Path, counts: dict[str, int]) -> str:
    """`dvc add`, a commit of the pointers with a line in the audit log, `dvc push`. Returns the commit of this version."""
    pointers = space.add_data(data)
    files = [space.folder / path for path in pointers if path.suffix == ".dvc"]
    held = {path.stem: yaml.safe_load(path.read_text())["outs"][0]["md5"] for path in files}
    if not audit.entries(space.folder, "ingest", data=held):  # else: cut off before, or labels that were there already
        audit.append(space.folder, "flow ingest", "ingest", data=held, counts=counts)
    space.commit("A version of the data", audit.LOG, *pointers)
    push(space)
    return space.git("log", "-1", "--format=%h", "--", str(data))


def contents(folder: Path) -> str:
    """A digest of the names, sizes and times of the files in a folder; empty where there is none."""
    files = [(name, (folder / name).stat()) for name in listing(folder)[0]]
    told = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)
    return audit.digest(told) if files else ""
