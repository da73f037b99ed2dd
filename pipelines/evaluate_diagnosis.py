"""Stage evaluate_diagnosis: cross-validation over patients beside null models, and the packaged model on test patients."""

from typing import Any

import pandas as pd

from pipelines.cells import EVALUATION, in_force
from pipelines.patients import DIAGNOSIS, PREDICTIONS, diagnosed
from smearline import diagnosis, diagnosis_evaluation, plain_json, staining
from smearline.diagnosis import DiagnosisModel

NULLS = ("number of cells", "mean colour")


def tables(summary: pd.DataFrame, counts: pd.DataFrame, parts: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """The model's features, each part of them alone, and the nulls."""
    whole = diagnosis.features(summary, counts, parts)
    whole = whole[[c for c in whole if whole[c].notna().mean() > 0.5]]
    found = {"model": whole}
    for part in parts:
        alone = whole[[c for c in whole if c.startswith(diagnosis.PARTS[part])]]
        if alone.shape[1]:
            found[f"{part} alone"] = alone
    cells = pd.read_parquet(PREDICTIONS, columns=["site", "smear", *staining.STAINING]).dropna(subset=["smear"])
    colour = cells.groupby(["site", "smear"])[list(staining.STAINING)].mean()
    colour = colour.reindex(pd.MultiIndex.from_frame(summary[["site", "smear"]].astype(object)))
    # The nulls go the model's own way, under its own names for parts, so that they differ in what they know alone.
    found[NULLS[0]] = summary[["num_cells"]].astype(float).add_prefix("share_")
    found[NULLS[1]] = colour.set_axis(summary.index).add_prefix("share_")
    return found


def main() -> None:
    params = in_force()
    found = diagnosed(params)
    out, table = EVALUATION / "diagnosis.json", EVALUATION / "diagnosis.csv"
    EVALUATION.mkdir(exist_ok=True)
    figures: dict[str, Any]
    if (DIAGNOSIS / diagnosis.ABSENT_FILE).is_file():
        figures = {"evidence": None, "absent_because": plain_json.read(DIAGNOSIS / diagnosis.ABSENT_FILE)["because"]}
        table.write_text("site,smear\n", encoding="utf-8")
    else:
        model, summary = DiagnosisModel(DIAGNOSIS), found.summary
        groups, patients = summary["group"], diagnosis.patient_keys(summary)
        by_model, predicted = diagnosis_evaluation.evaluate(
            tables(summary, found.counts, params.diagnosis.parts),
            groups,
            patients,
            params.diagnosis,
            lambda text: print(text, flush=True),
            seen=summary["split"] == "train",
        )
        test = summary[summary["split"] == "test"]
        figures = {
            "evidence": _evidence(by_model, int(patients.nunique()), found.origin),
            "origin": found.origin,
            "intended_use": model.card.intended_use,
            "num_patients": {g: int(n) for g, n in patients.groupby(groups).nunique().items()},
            "left_out": found.left_out,
            "cross_validation": by_model,
            "test": _test(model, test, found.counts) if len(test) else "no diagnosed patient is in the test split",
        }
        summary[["site", "smear", "split", "group"]].join(predicted).to_csv(table, index=False)
        for name, row in by_model.items():
            low, high = row["auc_interval"]
            print(f"{name:28} AUC {row['auc']:.3f} ({low:.3f} to {high:.3f})")
    plain_json.write(out, plain_json.plain(figures))
    plain_json.write(EVALUATION / "diagnosis_headline.json", _headline(figures))


def _test(model: DiagnosisModel, test: pd.DataFrame, counts: pd.DataFrame) -> dict[str, Any]:
    answers = model.diagnose(test, counts).set_index(test.index)
    answered = answers["status"] == "diagnosed"
    right = answers["group"] == test["group"]
    return {
        "smears": len(test),
        "answered": int(answered.sum()),
        "right": int((right & answered).sum()),
        "abstained_because": answers.loc[~answered, "abstained_because"].explode().value_counts().head(10).to_dict(),
    }


def _evidence(by_model: dict[str, Any], num_patients: int, origin: str) -> str:
    """What an answer of this model is worth, in a sentence that goes with every answer."""
    low, high = by_model["model"]["auc_interval"]
    said = f"cross-validated on {num_patients} {origin} patients: AUC {by_model['model']['auc']:.2f} ({low:.2f} to {high:.2f})"
    parts = by_model["model"]["by_recogniser_training"]
    if parts["seen"]["smears"]:
        num, auc, bounds = (parts["not_seen"][name] for name in ("smears", "auc", "auc_interval"))
        rest = "not known" if auc is None else f"{auc:.2f} ({bounds[0]:.2f} to {bounds[1]:.2f})"
        said += f"; on the {num} smears on whose cells the recogniser was not trained: {rest}"
    beaten = [null for null in NULLS if by_model[null]["model_gains_interval"][0] > 0]
    for null in NULLS:
        if null not in beaten:
            said += f"; not shown to be better than the {null} alone ({by_model[null]['auc']:.2f})"
    return said + (f"; better than the {' and the '.join(beaten)} alone" if beaten else "")


def _headline(figures: dict[str, Any]) -> dict[str, float]:
    if "cross_validation" not in figures:
        return {}
    rows, test = figures["cross_validation"], figures["test"]
    found = {
        "diagnosis/auc": rows["model"]["auc"],
        "diagnosis/auc_low": rows["model"]["auc_interval"][0],
        "diagnosis/balanced_accuracy": rows["model"]["balanced_accuracy"],
    }
    for null in NULLS:
        found[f"diagnosis/auc_{null.replace(' ', '_')}"] = rows[null]["auc"]
    if isinstance(test, dict) and test["answered"]:
        found["diagnosis/test_accuracy"] = test["right"] / test["answered"]
    return {name: round(value, 6) for name, value in found.items()}


if __name__ == "__main__":
    main()
