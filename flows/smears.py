"""The frozen smears on which every challenger meets its champion, and what a package says of them.

gate/smears.parquet is written at the first promotion from labelled test cells, and kept in git: a site, once frozen, stays
as it is. A site that comes later is frozen when it first has labelled test cells. Where no smear is known, cells are frozen.

`python -m flows.smears PACKAGE DATA CELLS OUT` asks one package, in a process of its own, so that its memory goes when it is
done.
"""

import shutil
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa

from flows import audit
from flows.registry import Version, fetched
from flows.workspace import STATE, FlowError, Workspace
from smearline import cbc, dataset, sites

FROZEN = Path("gate/smears.parquet")
CELLS_PER_SITE = 4000
"""Whole patients are taken, in an order that only their names decide, until a site has this many cells."""


def frozen(data: Path) -> pd.DataFrame:
    """The frozen cells that have an undisputed type today: sha256, site, patient, smear, true_type.

    Raises:
        FlowError: no test cell has a label.
    """
    labels = dataset.resolved_labels(data).dropna(subset=["true_type"])[["sha256", "true_type"]]
    columns = ["sha256", "site", "patient", "smear"]
    known = pd.read_parquet(FROZEN) if FROZEN.exists() else pd.DataFrame(columns=columns)
    splits = pd.read_parquet("splits.parquet", columns=["sha256", "split", "group"])
    fresh = dataset.index(data, columns).merge(splits[splits["split"] == "test"], on="sha256")
    fresh = fresh[fresh["sha256"].isin(labels["sha256"]) & ~fresh["site"].isin(known["site"])]
    if len(fresh):
        fresh = fresh.assign(place=fresh["group"].map(lambda name: audit.digest(str(name))))
        fresh = fresh.sort_values(["site", "place", "sha256"])
        before = fresh.groupby("site").cumcount().groupby([fresh["site"], fresh["place"]]).transform("min")
        known = pd.concat([known, fresh.loc[before < CELLS_PER_SITE, columns]], ignore_index=True)
        dataset.write_table(pa.Table.from_pandas(known, preserve_index=False), FROZEN)
    cells = known.merge(labels, on="sha256")
    cells["patient"] = cells["patient"].astype("string")  # of nothing but nulls Parquet gives back another type
    if gone := sorted(set(known["site"]) - set(cells["site"])):
        raise FlowError(f"no frozen cell of {', '.join(gone)} has an undisputed label any more; bring its labels back")
    if cells.empty:
        raise FlowError("no test cell has an undisputed label, so no model can be compared; label some and run retrain")
    return cells


def digest(cells: pd.DataFrame) -> str:
    """Of the cells and their labels."""
    return audit.digest("\n".join(sorted(f"{row.sha256}={row.true_type}" for row in cells.itertuples())))


def diagnoses(data: Path, cells: pd.DataFrame) -> dict[tuple[str, str], str | None]:
    """(site, smear) to the diagnosis of the patient, for the frozen smears whose patient has one that is not disputed."""
    smears = cells.dropna(subset=["patient", "smear"]).drop_duplicates(["site", "smear"])
    found = smears.merge(dataset.diagnoses(data), on=["site", "patient"])
    return {(row.site, row.smear): row.diagnosis for row in found.itertuples()}


def named(
    space: Workspace, version: Version, data: Path, cells: pd.DataFrame
) -> tuple[dict[str, str], dict[tuple[str, str], str | None] | None]:
    """What a version says: sha256 to the type, and (site, smear) to the group, None where it abstained; None for all of them
    where the package has no diagnostic model."""
    out = kept(space, version, data, cells)
    if not out.exists():
        space.run("flows.smears", str(fetched(space, version, "package")), str(data), str(FROZEN), str(out))
    types = pd.read_parquet(out / "cells.parquet")
    smears = None
    if (out / "smears.parquet").exists():
        found = pd.read_parquet(out / "smears.parquet")
        smears = {(r.site, r.smear): None if pd.isna(r.group) else r.group for r in found.itertuples()}
    return dict(zip(types["sha256"], types["predicted_type"], strict=True)), smears


def kept(space: Workspace, version: Version, data: Path, cells: pd.DataFrame) -> Path:
    """Where a version's answers are kept: another folder for other cells or labels, and where the pictures' scales or the blood
    counts of their smears are others."""
    index = dataset.index(data, ["sha256", "site", "microns_per_px"])
    unscaled = index["sha256"].isin(cells["sha256"]) & index["microns_per_px"].isna()
    files = [sites.load(site) for site in sorted(set(index["site"][unscaled]))]  # which then say the scale
    scales = [(site.name, site.microns_per_px, site.assumed_microns_per_px) for site in files]
    counts = dataset.read_tables(data, "cbc/*.parquet", cbc.COUNTS)
    frozen = pd.MultiIndex.from_frame(cells[["site", "smear"]].dropna().astype(object))
    theirs = counts[pd.MultiIndex.from_frame(counts[["site", "smear"]].astype(object)).isin(frozen)]
    told = theirs.sort_values(list(cbc.KEY)).to_csv(index=False)
    return space.folder / STATE / "gate" / f"{version.package}-{audit.digest(f'{digest(cells)}{scales}{told}')[:12]}"


def ask(package: Path, data: Path, cells: Path, out: Path) -> None:
    """What the package says of the cells in `cells` (Parquet, sha256): OUT/cells.parquet gets sha256 and predicted_type,
    OUT/smears.parquet site, smear and group of their smears (none where the package has no diagnosis)."""
    from smearline import diagnosis
    from smearline.differential import summarise
    from smearline.recognition import RecognitionModel, recognise

    model = RecognitionModel(package / "recogniser")
    predictions, vectors = recognise(model, data, keep=set(pd.read_parquet(cells, columns=["sha256"])["sha256"]))
    unfinished = out.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    predictions[["sha256", "predicted_type"]].to_parquet(unfinished / "cells.parquet", index=False)
    if (package / "diagnosis").is_dir() and predictions["smear"].notna().any():
        summary = summarise(predictions, vectors).assign(embedding_version=model.embedding_version)
        counts = dataset.read_tables(data, "cbc/*.parquet", cbc.COUNTS)
        answers = diagnosis.DiagnosisModel(package / "diagnosis").diagnose(summary, counts)
        answers[["site", "smear", "group"]].astype("string").to_parquet(unfinished / "smears.parquet", index=False)
    unfinished.replace(out)


if __name__ == "__main__":
    ask(*map(Path, sys.argv[1:]))
