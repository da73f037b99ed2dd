"""The diagnostic model: its reasons are exact, it knows when to be silent, and it never mixes what must not be mixed."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from smearline import cbc, diagnosis, diagnosis_evaluation, differential, settings, sites, vocabulary
from smearline.errors import DataError, ModelError

TYPES = vocabulary.load().differential_types
PARAMS = settings.load(Path(__file__).parents[2] / "params.yaml").diagnosis.model_copy(update={"repeats": 3})
GROUPS = {"AML": "BLAST", "HEALTHY": "NEUT_SEG", "MPN": "BASO"}


def smears(
    num: int, seed: int = 3, groups: tuple[str, ...] = ("AML", "HEALTHY", "MPN")
) -> tuple[pd.DataFrame, pd.Series]:
    """`num` smears a group in the form of `differential.summarise`; a group has more of one type, and less haemoglobin."""
    random = np.random.default_rng(seed)
    rows, truth = [], []
    for group, i in itertools.product(groups, range(num)):
        weights = np.full(len(TYPES), 1.0)
        weights[TYPES.index(GROUPS[group])] += 8
        counts = random.multinomial(100, random.dirichlet(weights * 3))
        rows.append(
            {
                "site": "sim_north",
                "smear": f"{group}{i}",
                "patient": f"p{group}{i}",
                "num_cells": 100,
                "num_counted": 100,
            }
            | {f"share_{t}": c / 100 for t, c in zip(TYPES, counts, strict=True)}
            | {"rate_auer_rod_present": random.random() if group == "AML" else None}
            | {"embedding": random.normal(size=4).astype(np.float32), "embedding_version": "e-1", "origin": "simulated"}
            | {"summary_version": differential.VERSION}
        )
        truth.append(group)
    return pd.DataFrame(rows), pd.Series(truth)


def counts_of(summary: pd.DataFrame, haemoglobin: float = 12.0) -> pd.DataFrame:
    site = sites.load("sim_north")
    parts = [
        cbc.counts_from_json(
            {"HGB(g/dL)": haemoglobin + 0.3 * (7 * i % 5), "WBC(10^9/L)": 5 + i % 4}, site, row.smear, row.patient
        )
        for i, row in enumerate(summary.itertuples())
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> diagnosis.DiagnosisModel:
    summary, truth = smears(12)
    return diagnosis.write(
        tmp_path_factory.mktemp("diagnosis"),
        summary,
        counts_of(summary),
        truth,
        PARAMS,
        not_available={"MDS": "not trained on patients"},
        embedding_version="e-1",
        origin="simulated",
    )


def test_it_learns_and_answers_in_probabilities(model: diagnosis.DiagnosisModel):
    summary, truth = smears(6, seed=9)
    answers = model.diagnose(summary, counts_of(summary))
    answered = answers["status"] == "diagnosed"
    assert answered.mean() > 0.7
    assert (answers["group"] == truth)[answered].all()
    assert np.allclose(answers[[f"p_{g}" for g in model.card.groups]].sum(axis=1), 1)
    assert answers["not_available"][0] == [{"group": "MDS", "because": "not trained on patients"}]


def test_reasons_are_the_shapley_values(model: diagnosis.DiagnosisModel):
    """Against their definition: the mean gain of a feature over all orders in which features become known."""
    summary, truth = smears(8, seed=5)
    table = diagnosis.features(summary, None, ("differential",)).iloc[:, :6]
    fitted = diagnosis.fit(table, truth, diagnosis.patient_keys(summary), PARAMS)
    usual = table.mean()
    one = table.iloc[0]

    def centred_logits(known: tuple[str, ...]) -> np.ndarray:
        mixed = usual.copy()
        mixed[list(known)] = one[list(known)]
        logits = fitted.logits(mixed.to_frame().T)[0]
        return logits - logits.mean()

    columns = list(table.columns)
    expected = np.zeros((len(fitted.groups), len(columns)))
    for j, feature in enumerate(columns):
        others = [c for c in columns if c != feature]
        for size in range(len(columns)):
            weight = math.factorial(size) * math.factorial(len(others) - size) / math.factorial(len(columns))
            for known in itertools.combinations(others, size):
                expected[:, j] += weight * (centred_logits((*known, feature)) - centred_logits(known))
    np.testing.assert_allclose(fitted.contributions(table.iloc[:1])[0], expected, atol=1e-9)


def test_reasons_change_when_the_input_changes(model: diagnosis.DiagnosisModel):
    summary, _ = smears(1, seed=11)
    counts = counts_of(summary)
    before = model.diagnose(summary, counts)["reasons"][0]
    changed = summary.copy()
    changed.loc[0, "share_BLAST"] += 0.2
    after = model.diagnose(changed, counts)["reasons"][0]
    contribution = lambda reasons: next(r["contribution"] for r in reasons if r["feature"] == "share_BLAST")  # noqa: E731
    assert contribution(after) > contribution(before) > 0
    assert "blast" in next(r["says"] for r in after if r["feature"] == "share_BLAST")


def test_a_missing_value_says_nothing(model: diagnosis.DiagnosisModel):
    summary, _ = smears(1, seed=11)
    counts = counts_of(summary)
    counts.loc[counts["parameter"] == "HGB", ["value", "reason"]] = [np.nan, "not_determined"]
    reasons = model.diagnose(summary, counts)["reasons"][0]
    assert all(r["feature"] != "cbc_HGB" for r in reasons)


@pytest.mark.parametrize(
    ("change", "because"),
    [
        (lambda s, c: (s.assign(num_counted=20), c), "20 cells were counted, and 50 are needed"),
        (lambda s, c: (s, c.assign(value=c["value"] * 10)), r"haemoglobin \(HGB\) is 120 g/dL; taken from"),
        (lambda s, c: (s, None), "2 of the 2 laboratory values that it reads are missing"),
        (lambda s, c: (s.assign(embedding=[e + 50 for e in s["embedding"]]), c), "the smear is unlike all 36"),
    ],
)
def test_it_abstains_and_says_why(model: diagnosis.DiagnosisModel, change, because: str):
    summary, _ = smears(1, seed=11)
    answer = model.diagnose(*change(summary, counts_of(summary))).iloc[0]
    assert answer["status"] == "abstained" and answer["group"] is None
    assert pd.Series(answer["abstained_because"]).str.contains(because).any(), answer["abstained_because"]


def test_the_ranges_taken_are_those_that_the_docs_state(model: diagnosis.DiagnosisModel):
    low, high = model.card.ranges["cbc_WBC"]  # spans decades
    white = 10 ** model.seen["cbc_WBC"] - 1
    assert (10**low - 1, 10**high - 1) == pytest.approx((white.min() / 1.5, white.max() * 1.5))
    low, high = model.card.ranges["cbc_HGB"]
    red = model.seen["cbc_HGB"]
    assert (low, high) == pytest.approx((red.min() - 0.1 * np.ptp(red), red.max() + 0.1 * np.ptp(red)))


def test_the_number_of_cells_is_no_feature(model: diagnosis.DiagnosisModel):
    summary, _ = smears(2, seed=11)
    more = summary.assign(num_cells=5000, num_counted=4000)
    columns = [f"p_{g}" for g in model.card.groups]
    pd.testing.assert_frame_equal(
        model.diagnose(summary, counts_of(summary))[columns], model.diagnose(more, counts_of(more))[columns]
    )


def test_units_of_two_laboratories_come_to_the_same():
    site = sites.load("sim_north")
    grams = cbc.laboratory_values(cbc.counts_from_json({"HGB(g/L)": 91, "WBC(/uL)": 4200}, site, "s", "p"))
    usual = cbc.laboratory_values(cbc.counts_from_json({"HGB(g/dL)": 9.1, "WBC(10^3/uL)": 4.2}, site, "s", "p"))
    pd.testing.assert_frame_equal(grams, usual)
    vague = cbc.counts_from_json({"HGB": 91, "MCV": 88, "PLT(10^9/L)": "++++", "Foo": 3}, site, "s", "p")
    assert cbc.laboratory_values(vague).iloc[0].dropna().to_dict() == {"MCV": 88}
    assert cbc.unused(vague) == {"HGB": "unit_not_stated", "PLT": "over_range", "Foo": "not_read_by_models"}


def test_models_that_do_not_belong_together_are_refused(model: diagnosis.DiagnosisModel):
    summary, _ = smears(1)
    with pytest.raises(ModelError, match="do not belong together"):
        model.diagnose(summary.assign(embedding_version="e-2"))
    with pytest.raises(ModelError, match="reads 'summary-1'"):
        model.diagnose(summary.assign(summary_version="summary-0"))

    class Recogniser:
        embedding_version = "e-1"
        card = type("Card", (), {"origin": "real"})

    with pytest.raises(ModelError, match="only diagnoses learned from real patients"):
        diagnosis.check_pair(Recogniser(), model.card)  # type: ignore[arg-type]


def test_a_model_file_with_foreign_types_is_refused(model: diagnosis.DiagnosisModel, tmp_path: Path):
    import shutil

    import skops.io
    from sklearn.preprocessing import FunctionTransformer

    folder = shutil.copytree(model.folder, tmp_path / "model")
    skops.io.dump(FunctionTransformer(shutil.rmtree), folder / diagnosis.SKOPS_FILE)
    with pytest.raises(ModelError, match=r"not trusted: shutil\.rmtree"):
        diagnosis.DiagnosisModel(folder)


def test_one_patient_is_never_on_both_sides():
    summary, truth = smears(8, seed=2)
    twice = pd.concat([summary, summary.assign(smear=summary["smear"] + "b")], ignore_index=True)
    random = np.random.default_rng(0)
    # Features that tell the patient and nothing else: a leak would give an AUC of 1.
    noise = pd.DataFrame(random.normal(size=(len(summary), 40)), columns=[f"embedding_{i}" for i in range(40)])
    tables = {"model": pd.concat([noise, noise], ignore_index=True)}
    shuffled = pd.Series(random.permutation(truth.to_numpy()))
    figures, _ = diagnosis_evaluation.evaluate(
        tables, pd.concat([shuffled, shuffled], ignore_index=True), diagnosis.patient_keys(twice), PARAMS
    )
    assert figures["model"]["auc"] < 0.75


def test_the_area_under_the_curve_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(1)
    truth, scores = random.random(40) < 0.4, random.random((40, 2)).round(1)
    expected = roc_auc_score(truth, scores[:, 1])
    assert diagnosis_evaluation._Ranking([scores], truth, 1).auc() == pytest.approx(expected)


def test_a_group_with_one_patient_is_refused():
    summary, truth = smears(3)
    with pytest.raises(DataError, match="two patients each"):
        diagnosis.fit(
            diagnosis.features(summary, None, ("differential",)), truth, pd.Series(["same"] * len(summary)), PARAMS
        )


def test_a_csv_of_differentials_keeps_names_that_look_like_numbers(tmp_path: Path):
    names = ["0012", "1e5", "NA"]
    table = {"site": "lab", "smear": names, "patient": [*names[:2], None], "num_counted": [9, 9, 9]}
    table |= {"summary_version": "v", "share": [0.5, None, 0.25], "embedding": "0.1 0.2"}
    pd.DataFrame(table).to_csv(tmp_path / "d.csv", index=False)
    found = differential.read(tmp_path / "d.csv")
    assert found["smear"].tolist() == names and found["patient"].isna().tolist() == [False, False, True]
    assert found["share"].isna().tolist() == [False, True, False]
