"""The gate says no where it must: worse, incomplete, worse at one site, blind to blasts, or trained on the frozen smears."""

import random
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import gate, smears
from smearline import dataset

TYPES = ("BLAST", "LYMPH", "MONO", "EOS")


@pytest.fixture
def cells() -> pd.DataFrame:
    """Two sites of ten patients with forty cells each; a quarter are blasts."""
    rows = [
        {"sha256": f"{site}{p}.{i}", "site": site, "patient": f"{site}{p}", "smear": None, "true_type": TYPES[i % 4]}
        for site in ("north", "south")
        for p in range(10)
        for i in range(40)
    ]
    return pd.DataFrame(rows)


def model(cells: pd.DataFrame, wrong: float, of_site: str = "", of_type: str = "", more: float = 0.0) -> dict[str, str]:
    """Names every cell rightly but a share `wrong`; and a further share `more` of a site or a type."""
    named = {}
    for number, row in enumerate(cells.itertuples()):
        share = wrong + (more if of_site == row.site or of_type == row.true_type else 0.0)
        named[row.sha256] = "PLASMA" if random.Random(number).random() < share else row.true_type
    return named


def judged(cells: pd.DataFrame, challenger: dict[str, str], champion: dict[str, str] | None) -> dict[str, gate.Check]:
    return {c.metric: c for c in gate.compare(cells, challenger, champion, margin=0.03, seed=7)}


def refused(found: dict[str, gate.Check]) -> list[str]:
    return [metric for metric, check in found.items() if not check.passed]


def test_an_equal_challenger_passes(cells: pd.DataFrame):
    found = judged(cells, model(cells, 0.1), model(cells, 0.1))
    assert list(found) == [
        "accuracy",
        "north.accuracy",
        "south.accuracy",
        "balanced_accuracy",
        "blast_sensitivity",
        "blast_specificity",
    ]
    assert refused(found) == []
    assert gate.verdict(found.values(), champion={})["passed"]


def test_a_better_challenger_passes(cells: pd.DataFrame):
    assert refused(judged(cells, model(cells, 0.05), model(cells, 0.15))) == []


def test_a_worse_challenger_is_refused(cells: pd.DataFrame):
    found = judged(cells, model(cells, 0.2), model(cells, 0.1))
    assert "accuracy" in refused(found)
    assert not gate.verdict(found.values(), champion={})["passed"]
    assert found["accuracy"].says.startswith("worse")


def test_better_over_all_but_worse_at_one_site_is_refused(cells: pd.DataFrame):
    found = judged(cells, model(cells, 0.0, of_site="south", more=0.2), model(cells, 0.15))
    assert found["accuracy"].challenger > found["accuracy"].champion
    assert "south.accuracy" in refused(found)
    assert "north.accuracy" not in refused(found)


def test_fewer_blasts_found_is_refused_though_the_rest_is_better(cells: pd.DataFrame):
    found = judged(cells, model(cells, 0.0, of_type="BLAST", more=0.1), model(cells, 0.1, of_type="BLAST", more=-0.1))
    assert found["accuracy"].challenger > found["accuracy"].champion
    assert refused(found) == ["blast_sensitivity"]


def test_a_rare_type_that_is_lost_is_refused_though_few_cells_are(cells: pd.DataFrame):
    rare = cells.assign(true_type=cells["true_type"].where(cells.groupby("site").cumcount() % 38 > 0, "PROMYELO"))
    champion = model(rare, 0.0)
    lost = champion | dict.fromkeys(rare.loc[rare["true_type"] == "PROMYELO", "sha256"], "MYELO")
    found = {c.metric: c for c in gate.compare(rare, lost, champion, margin=0.05, seed=7)}
    assert refused(found) == ["balanced_accuracy"]


def test_calling_other_cells_blasts_is_refused(cells: pd.DataFrame):
    champion = model(cells, 0.0)
    others = cells.loc[cells["true_type"] != "BLAST", "sha256"].to_numpy()[::50]
    assert refused(judged(cells, champion | dict.fromkeys(others, "BLAST"), champion)) == ["blast_specificity"]


def test_a_site_with_few_cells_or_patients_does_not_vote(cells: pd.DataFrame):
    few = pd.concat([cells[cells["site"] == "north"], cells[cells["site"] == "south"].head(100)])
    found = judged(few, model(few, 0.0), model(few, 0.0))
    assert refused(found) == [] and found["south.accuracy"].says.startswith("not tested: 100 cells of 3 patients")
    three = cells[cells["patient"].isin(["north0", "north1", "south0"])]
    assert "accuracy" in refused(judged(three, model(three, 0.0), model(three, 0.0)))


def test_cells_without_any_patient_are_judged_one_by_one(cells: pd.DataFrame):
    for patient in (None, float("nan"), pd.NA):
        loose = cells.assign(patient=patient)
        assert refused(judged(loose, model(loose, 0.1), model(loose, 0.1))) == []


def test_a_missing_metric_is_refused(cells: pd.DataFrame):
    champion = model(cells, 0.1)
    of_one_site = {s: t for s, t in champion.items() if s.startswith("north")}
    found = judged(cells, of_one_site, champion)
    assert set(refused(found)) == set(found) - {"north.accuracy"}
    assert found["south.accuracy"].challenger is None
    no_blasts = cells[cells["true_type"] != "BLAST"]
    assert refused(judged(no_blasts, champion, champion)) == ["blast_sensitivity"]
    assert refused(judged(no_blasts, champion, None)) == ["blast_sensitivity"]
    assert not gate.verdict([], champion=None)["passed"]


def test_the_first_has_nothing_to_be_compared_with(cells: pd.DataFrame):
    found = judged(cells, model(cells, 0.5), None)
    assert refused(found) == []
    assert gate.verdict(found.values(), champion=None)["says"] == "passed: no champion, nothing to compare"


def test_few_cells_prove_nothing_though_nothing_differs(cells: pd.DataFrame):
    few = cells.groupby("patient").head(2)
    found = judged(few, model(few, 0.0), model(few, 0.0))
    assert found["blast_sensitivity"].says.startswith("too few cells")


def test_patients_are_resampled_and_not_cells(cells: pd.DataFrame):
    """One patient's forty cells all lost are less certain than forty cells lost among all patients."""
    champion = model(cells, 0.0)
    of_one = {s: "PLASMA" if s.startswith("north0.") else t for s, t in champion.items()}
    spread = {s: "PLASMA" if s.endswith((".7", ".11")) else t for s, t in champion.items()}
    one, many = judged(cells, of_one, champion)["accuracy"], judged(cells, spread, champion)["accuracy"]
    assert one.challenger == many.challenger
    assert one.low < many.low - 0.03


def test_a_parent_label_is_met_by_its_children():
    frame = pd.DataFrame({"sha256": ["a"], "site": ["s"], "patient": ["p"], "smear": [None], "true_type": ["NEUT"]})
    assert judged(frame, {"a": "NEUT_BAND"}, None)["accuracy"].challenger == 1


def test_a_challenger_that_was_trained_on_a_frozen_patient_is_refused(cells: pd.DataFrame):
    seen = pd.DataFrame({"sha256": ["x"], "site": ["north"], "patient": ["north3"]})
    assert not gate.seen_in_training(cells, seen).passed
    assert gate.seen_in_training(cells, seen.assign(site="south")).passed
    assert gate.seen_in_training(cells, seen.assign(patient=None)).passed
    assert not gate.seen_in_training(
        cells, pd.DataFrame({"sha256": ["south1.3"], "site": ["x"], "patient": [None]})
    ).passed


def test_a_challenger_without_the_champions_diagnosis_is_refused():
    def lineage(auc: float | None, *groups: str) -> dict:
        return {
            "metrics": {} if auc is None else {"diagnosis/auc": auc},
            "diagnosis": {"groups": groups} if auc else None,
        }

    champion = lineage(0.9, "AML", "APL")
    passed = {
        name: all(check.passed for check in gate.diagnosis(challenger, champion, 0.03))
        for name, challenger in {
            "better": lineage(0.95, "AML", "APL", "ALL"),
            "within": lineage(0.88, "AML", "APL"),
            "worse": lineage(0.86, "AML", "APL"),  # however wide the champion's interval
            "fewer groups": lineage(0.99, "AML"),
            "missing": lineage(None),
        }.items()
    }
    assert passed == {"better": True, "within": True, "worse": False, "fewer groups": False, "missing": False}
    assert gate.diagnosis(champion, lineage(None), 0.03) == []


def test_a_challenger_that_loses_diagnoses_of_frozen_smears_is_refused():
    truth = {("s", str(i)): "AML" if i % 2 else "ALL" for i in range(20)}

    def but(num: int, said: str | None) -> dict:
        return {k: said if int(k[1]) < num else v for k, v in truth.items()}

    passed = {
        name: all(check.passed for check in gate.diagnosed(truth, named, truth, 0.1))
        for name, named in {
            "same": truth,
            "two wrong": but(2, "MDS"),
            "three wrong": but(3, "MDS"),
            "four abstained": but(4, None),
            "five abstained": but(5, None),
            "missing": None,
        }.items()
    }
    refused = {name for name, did in passed.items() if not did}
    assert refused == {"three wrong", "five abstained", "missing"}
    assert gate.diagnosed(truth, truth, None, 0.1) == gate.diagnosed({}, truth, truth, 0.1) == []


def test_a_disputed_diagnosis_judges_nobody(tmp_path: Path):
    told = [("p0", "s0", "AML"), ("p0", "s1", "AML"), ("p1", "s2", "AML"), ("p1", "s2", "MDS"), ("p2", "s3", None)]
    rows = [{"site": "lab", "patient": p, "smear": s, "diagnosis": d} for p, s, d in told]
    (tmp_path / "labels").mkdir()
    table = pa.Table.from_pylist(rows, schema=dataset.PATIENTS)
    pq.write_table(table, tmp_path / "labels" / "patients-lab.parquet")
    frozen = pd.DataFrame(rows)[["site", "patient", "smear"]]
    assert smears.diagnoses(tmp_path, frozen) == {("lab", "s0"): "AML", ("lab", "s1"): "AML"}


def test_smears_are_resampled_where_no_patient_is_known(cells: pd.DataFrame):
    champion = model(cells, 0.0)
    of_one = {s: "PLASMA" if s.startswith("north0.") else t for s, t in champion.items()}
    by_smear = cells.assign(smear=cells["patient"], patient=None)
    assert judged(by_smear, of_one, champion)["accuracy"].low == judged(cells, of_one, champion)["accuracy"].low
    few = by_smear[by_smear["smear"].str.endswith(("0", "1"))]
    assert "4 smears cannot show it" in judged(few, champion, champion)["blast_sensitivity"].says
