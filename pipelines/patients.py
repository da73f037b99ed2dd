"""Which smears have a patient whose diagnosis is known, and which of them may be learned from."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pipelines.cells import MODEL, SPLITS
from smearline import cbc, dataset, diagnosis, settings, vocabulary
from smearline.recognition import RecognitionModel

DIFFERENTIALS = Path("differentials.parquet")
PREDICTIONS = Path("predictions.parquet")
DIAGNOSIS = Path("models/diagnosis")
EMPTY = "no smear of this data set has a patient whose diagnosis is known"


@dataclass(frozen=True)
class Patients:
    """Smears fit to learn from (a row each; `group`, `split`), their counts, and why the rest was left out."""

    summary: pd.DataFrame
    counts: pd.DataFrame
    not_available: dict[str, str]
    left_out: dict[str, int]
    origin: str


def diagnosed(params: settings.Settings) -> Patients:
    """The differentials whose patient has a diagnosis, enough cells, and a group with enough patients.

    With a recogniser of real cells only real patients count.
    """
    summary = pd.read_parquet(DIFFERENTIALS)
    real = RecognitionModel(MODEL).card.origin == "real"
    folder = params.data.folder
    left_out: dict[str, int] = {}
    if summary.empty:
        summary = summary.assign(patient=None, group=None, split=None)
    else:
        groups = dataset.diagnoses(folder).rename(columns={"diagnosis": "group"})
        summary = summary.merge(groups, on=["site", "patient"], how="left")
        cells = dataset.index(folder, ["sha256", "site", "smear"]).merge(
            pd.read_parquet(SPLITS, columns=["sha256", "split"]), on="sha256"
        )
        of_smear = cells.dropna(subset=["smear"]).groupby(["site", "smear"])["split"].first()
        summary["split"] = of_smear.reindex(pd.MultiIndex.from_frame(summary[["site", "smear"]])).to_numpy()
        for why, keep in (
            ("diagnosis not known, or disputed", summary["group"].notna()),
            ("simulated patient", summary["origin"].eq("real") | (not real)),
            (f"fewer than {params.diagnosis.min_cells} cells", summary["num_counted"] >= params.diagnosis.min_cells),
        ):
            left_out[why] = int((~keep[summary.index]).sum())
            summary = summary[keep[summary.index]]
    learnable = summary[summary["split"] != "test"]
    num_patients = diagnosis.patient_keys(learnable).groupby(learnable["group"]).nunique()
    not_available = {
        code: f"not trained on {'real ' if real else ''}patients: the training data has {num_patients.get(code, 0)} with enough "
        f"cells, and {params.diagnosis.min_patients} are needed"
        for code in vocabulary.load().diagnoses
        if num_patients.get(code, 0) < params.diagnosis.min_patients
    }
    if len(summary):
        few = summary["group"].isin(list(not_available))
        left_out["group with too few patients"] = int(few.sum())
        summary = summary[~few].reset_index(drop=True)
    counts = dataset.read_tables(folder, "cbc/*.parquet", cbc.COUNTS)
    return Patients(summary, counts, not_available, left_out, "real" if real else "simulated")
