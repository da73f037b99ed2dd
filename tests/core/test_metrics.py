"""The metrics of a recogniser, on examples small enough to be checked by hand."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from smearline.errors import DataError
from smearline.metrics import evaluate, headline
from smearline.metrics.blasts import false_alarm_share, probability_for_ppv
from smearline.metrics.intervals import auc, bootstrap_counts, exact_bounds, proportion_bounds
from smearline.metrics.readers import score_readers
from smearline.vocabulary import load

TYPES = tuple(load().types)
NO_TRUTH = pd.DataFrame({"sha256": [], "name": [], "value": []}, dtype=object)


def table(
    pairs: Sequence[tuple[str | None, str]], patients: Sequence[str | None] | None = None, sure: float = 0.83
) -> pd.DataFrame:
    """A table of predictions from (label, answer), the answer with probability `sure`, each cell its own patient."""
    frame = pd.DataFrame(pairs, columns=["true_type", "predicted_type"], dtype=object)
    frame["sha256"] = [f"{i:064x}" for i in range(len(frame))]
    frame["site"] = "alpha"
    frame["patient"] = [f"p{i}" for i in range(len(frame))] if patients is None else list(patients)
    frame["smear"] = frame["patient"].map(lambda p: None if p is None else f"s-{p}")
    frame["scale_assumed"] = False
    chances = {f"p_{t}": np.where(frame["predicted_type"] == t, sure, (1 - sure) / (len(TYPES) - 1)) for t in TYPES}
    return pd.concat([frame, pd.DataFrame(chances)], axis=1)


def scored(frame: pd.DataFrame, truth: pd.DataFrame = NO_TRUTH, **more: Any) -> dict[str, Any]:
    train = frame.rename(columns={c: c.removeprefix("c_") for c in frame if c.startswith("c_")})
    return evaluate(frame, truth, origin="simulated", context={}, **{"train_labels": train, **more})


def row(metrics: dict[str, Any], code: str) -> dict[str, Any]:
    return dict(metrics["types"]["overall"]["per_class"][code])


def width(estimate: dict[str, float]) -> float:
    return estimate["high"] - estimate["low"]


def test_sensitivity_ppv_and_f1_strict_and_tolerant() -> None:
    band = [("NEUT_BAND", "NEUT_BAND")] * 6 + [("NEUT_BAND", "NEUT_SEG")] * 3 + [("NEUT_BAND", "MONO")]
    metrics = scored(table([*band, ("NEUT_SEG", "NEUT_BAND"), ("LYMPH", "NEUT_BAND")]))
    found = row(metrics, "NEUT_BAND")
    assert found["support"] == 10
    assert found["sensitivity"]["value"] == 0.6
    assert found["tolerant_sensitivity"]["value"] == 0.9  # segmented is a neighbour, monocyte is not
    assert found["ppv"]["value"] == 0.75  # 6 of 8
    assert found["tolerant_ppv"]["value"] == 0.875  # the segmented one is tolerated
    assert found["f1"]["value"] == pytest.approx(2 * 6 / (2 * 6 + 4 + 2), abs=1e-6)
    assert metrics["types"]["overall"]["accuracy"]["value"] == 0.5
    assert metrics["types"]["overall"]["tolerant_accuracy"]["value"] == pytest.approx(10 / 12, abs=1e-6)


def test_a_parent_label_is_right_by_any_child_and_decides_nothing_for_the_children() -> None:
    neutrophils = [("NEUT", "NEUT_SEG")] * 3 + [("NEUT", "NEUT_BAND"), ("NEUT", "MONO"), ("NEUT", "METAMYELO")]
    others = [("NEUT_SEG", "NEUT_BAND"), ("NEUT_SEG", "NEUT_SEG"), ("MONO", "MONO"), ("LYMPH", "NEUT_SEG")]
    metrics = scored(table([*neutrophils, *others]))
    parent = row(metrics, "NEUT")
    assert (parent["support"], parent["sensitivity"]["value"]) == (6, pytest.approx(4 / 6, abs=1e-6))
    assert parent["tolerant_sensitivity"] == parent["sensitivity"]  # a metamyelocyte does not neighbour every child
    assert parent["ppv"]["value"] == pytest.approx(6 / 7, abs=1e-6)  # collapsed: the lymphocyte alone is wrong
    segmented = row(metrics, "NEUT_SEG")
    assert (segmented["support"], segmented["sensitivity"]["value"], segmented["ppv"]["value"]) == (2, 0.5, 0.5)
    assert row(metrics, "MONO")["ppv"]["value"] == 0.5  # a neutrophil is certainly no monocyte
    collapsed = metrics["parents"]["overall"]["NEUT"]
    assert (collapsed["support"], collapsed["sensitivity"]["value"]) == (8, 0.75)
    assert metrics["confusion"]["overall"]["true"][:2] == ["NEUT_SEG", "NEUT"]


def test_one_against_the_rest_flatters_and_stands_beside_the_paper() -> None:
    metrics = scored(table([("LYMPH", "LYMPH")] * 99 + [("BLAST", "LYMPH")]))
    assert metrics["paper"]["types"]["BLAST"]["one_vs_rest_accuracy"]["value"] == 0.99
    assert row(metrics, "BLAST")["sensitivity"]["value"] == 0


def test_only_classes_with_twenty_cells_are_averaged() -> None:
    cells = [("LYMPH", "LYMPH")] * 40 + [("MONO", "MONO")] * 10 + [("MONO", "LYMPH")] * 10 + [("BLAST", "LYMPH")] * 19
    overall = scored(table(cells))["types"]["overall"]
    assert overall["averaged"] == ["LYMPH", "MONO"]
    assert overall["balanced_accuracy"]["value"] == 0.75
    f1 = f1_score(*zip(*cells, strict=True), average=None, labels=["LYMPH", "MONO"]).mean()
    assert overall["macro_f1"]["value"] == pytest.approx(f1, abs=1e-6)
    assert overall["per_class"]["BLAST"]["listed_only"]
    assert not overall["per_class"]["MONO"]["listed_only"]
    few = scored(table(cells[:19]))["types"]["overall"]
    assert few["macro_f1"] == {"value": None, "low": None, "high": None}


def test_an_interval_widens_when_errors_cluster_in_few_patients() -> None:
    cells = [("LYMPH", "LYMPH")] * 150 + [("LYMPH", "MONO")] * 50
    apart = scored(table(cells))["types"]["overall"]
    clustered = scored(table(cells, [f"p{i // 50}" for i in range(200)]))["types"]["overall"]
    assert apart["accuracy"]["value"] == clustered["accuracy"]["value"] == 0.75
    assert width(clustered["accuracy"]) > 3 * width(apart["accuracy"])
    assert apart["accuracy"]["low"] <= 0.686  # Wilson's for 150 of 200 is 0.686 to 0.805
    assert (clustered["patients"], clustered["interval_by"]) == (4, "patient")
    frame = table(cells, [None] * 200).assign(smear=[f"s{i // 50}" for i in range(200)])
    by_smear = scored(frame)["types"]["overall"]
    assert by_smear["accuracy"] == clustered["accuracy"] and by_smear["interval_by"] == "smear", (
        "where no patient is known"
    )
    frame.loc[:9, ["patient", "smear"]] = [["p", None]] * 10
    assert scored(frame)["types"]["overall"]["interval_by"] == "patient, else smear"


def test_the_bootstrap_is_that_of_whole_clusters() -> None:
    rng = np.random.default_rng(4)
    cluster = np.concatenate([np.repeat(np.arange(12), 10), np.arange(12, 60)])  # 12 patients, and 48 lone cells
    category = np.where(rng.random(len(cluster)) < 0.1 + 0.8 * (cluster % 2), 1, 0)
    counts = bootstrap_counts(cluster, category[:, None], 2, rng)
    observed, drawn = counts[0], counts[1:]
    assert observed.tolist() == np.bincount(category).tolist()
    own = np.stack([np.bincount(cluster[category == c], minlength=60) for c in (0, 1)], axis=1)
    plain = own[rng.integers(0, 60, (4000, 60))].sum(axis=1)
    assert drawn.mean(axis=0) == pytest.approx(plain.mean(axis=0), rel=0.03)
    assert drawn.std(axis=0) == pytest.approx(plain.std(axis=0), rel=0.1)


def test_the_same_pseudonym_at_two_sites_is_two_patients() -> None:
    frame = table([("LYMPH", "LYMPH")] * 40, ["p"] * 40)
    frame.loc[20:, "site"] = "beta"
    assert scored(frame)["counts"]["patients"] == 2


def test_patients_and_smears_are_those_of_the_labelled_cells() -> None:
    counts = scored(
        table([("LYMPH", "LYMPH")] * 10 + [(None, "LYMPH")] * 20, ["p"] * 10 + [f"q{i}" for i in range(20)])
    )
    for found in (counts["counts"], counts["counts"]["by_site"]["alpha"]):
        assert [found[n] for n in ("cells", "labelled", "unlabelled", "patients", "smears")] == [30, 10, 20, 1, 1]


def test_a_perfect_recogniser_keeps_an_interval() -> None:
    overall = scored(table([("LYMPH", "LYMPH")] * 30 + [("MONO", "MONO")] * 30))["types"]["overall"]
    for estimate in (overall["accuracy"], overall["macro_f1"], overall["per_class"]["MONO"]["f1"]):
        assert estimate["value"] == estimate["high"] == 1
        assert 0.8 < estimate["low"] < 0.99
    assert overall["per_class"]["MONO"]["sensitivity"]["low"] == pytest.approx(0.025 ** (1 / 30), abs=1e-6)


def test_a_random_recogniser_scores_as_chance() -> None:
    rng = np.random.default_rng(0)
    kinds = np.array(["LYMPH", "MONO", "EOS", "BLAST"])
    pairs = list(zip(rng.choice(kinds, 4000), rng.choice(kinds, 4000), strict=True))
    metrics = scored(table(pairs, [f"p{i % 100}" for i in range(4000)]))
    overall = metrics["types"]["overall"]
    assert overall["balanced_accuracy"]["low"] < 0.25 < overall["balanced_accuracy"]["high"]
    assert metrics["blast"]["overall"]["auc"]["low"] < 0.5 < metrics["blast"]["overall"]["auc"]["high"]
    assert metrics["calibration"]["overall"]["ece"] == pytest.approx(0.83 - overall["accuracy"]["value"], abs=0.01)


def test_unlabelled_cells_are_counted_and_never_scored() -> None:
    cells = [("LYMPH", "LYMPH")] * 20 + [("LYMPH", "MONO")] * 5
    plain = scored(table(cells))
    more = scored(table([*cells, *[(None, "BLAST")] * 30]))
    assert (more["counts"]["labelled"], more["counts"]["unlabelled"]) == (25, 30)
    for part in ("types", "confusion", "calibration"):
        assert more[part] == plain[part]


def test_calibration_by_hand() -> None:
    pairs = [("LYMPH", "LYMPH"), ("NEUT", "NEUT_SEG"), ("MONO", "LYMPH"), ("MONO", "NEUT_SEG")]
    found, small = scored(table(pairs, sure=0.83))["calibration"]["overall"], 0.01
    # A parent's children are added where the site labels by it, in a wrong answer as in a right one: 0.84.
    assert found["ece"] == pytest.approx((0.17 + 0.16 + 0.83 + 0.84) / 4, abs=1e-6)
    rest = [0.17**2 + 17 * small**2, 0.16**2 + 16 * small**2, *[0.83**2 + 0.99**2 + 16 * small**2] * 2]
    assert found["brier"] == pytest.approx(sum(rest) / 4, abs=1e-6)
    assert found["nll"] == pytest.approx(-np.log([0.83, 0.84, small, small]).mean(), abs=1e-6)


def test_auc_is_scikit_learns_and_does_not_collapse_at_one() -> None:
    rng = np.random.default_rng(1)
    positive = rng.random(300) < 0.3
    score = np.round(rng.normal(size=300) + positive, 1)
    found = auc(score, positive, np.arange(300), rng)
    assert found["value"] == pytest.approx(roc_auc_score(positive, score))
    assert found["low"] < found["value"] < found["high"]
    perfect = auc(positive.astype(float), positive, np.arange(300), rng)
    assert (perfect["value"], perfect["high"]) == (1, 1)
    assert perfect["low"] < 1


def test_published_intervals() -> None:
    low, high = proportion_bounds(81, 263)  # Newcombe 1998, Stat Med 17:857, table I: Wilson without continuity
    assert (round(float(low), 4), round(float(high), 4)) == (0.2553, 0.3662)
    low, high = exact_bounds(5, 100)  # the 100-cell differential at 5 %: 1.6 to 11.3 %
    assert (round(float(low), 3), round(float(high), 3)) == (0.016, 0.113)


def test_blasts_smear_by_smear() -> None:
    missed = [("BLAST", "LYMPH")] + [("LYMPH", "LYMPH")] * 9
    found = [("BLAST", "BLAST")] * 2 + [("LYMPH", "LYMPH")] * 8
    clear = [("LYMPH", "LYMPH")] * 10
    smears = scored(table([*missed, *found, *clear], [f"p{i // 10}" for i in range(30)]))["blast"]["smears"]
    assert (smears["any_blast_found"]["smears"], smears["any_blast_found"]["value"]) == (2, 0.5)
    assert smears["no_blast_and_none_predicted"]["value"] == 1
    assert [r["predicted_blasts"] for r in smears["rows"]] == [0, 2, 0]
    assert smears["rows"][1]["true_share"]["value"] == 0.2


def test_the_probability_from_which_enough_cells_are_blasts_takes_ties_together() -> None:
    chance = np.array([0.9, 0.8, 0.8, 0.6, 0.4, 0.4, 0.1])
    true = np.array([True, True, True, False, True, False, True])
    assert probability_for_ppv(chance, true, 0.99, 1) == 0.8
    assert probability_for_ppv(chance, true, 0.8, 1) == 0.8, "of the two at 0.4 one is none: 4 of 6"
    assert probability_for_ppv(chance, true, 0.7, 1) == 0.1
    assert probability_for_ppv(chance, ~true, 0.9, 1) is None
    assert probability_for_ppv(chance, true, 0.7, 4) == 0.1 and probability_for_ppv(chance, true, 0.8, 4) is None
    assert probability_for_ppv(chance, true, 0.7) is None, "seven cells are too few for a limit"
    falling, first_ten = np.linspace(0.95, 0.5, 12), np.arange(12) < 10
    limit = probability_for_ppv(falling, first_ten, 0.8, 1)
    assert falling[10] < limit <= falling[9], "no further blast is found below, and PPV is not given away for none"


@pytest.mark.mission("possible blasts are counted from the model's own limit on")
def test_possible_blasts_are_counted_from_the_limit_on() -> None:
    frame = table([("BLAST", "BLAST")] * 6 + [("BLAST", "LYMPH")] * 2 + [("LYMPH", "LYMPH")] * 12, [None] * 20)
    assert "screen" not in scored(frame)["blast"]["overall"]
    chance = frame["p_BLAST"].to_numpy()
    limit = probability_for_ppv(chance, (frame["true_type"] == "BLAST").to_numpy(), 1.0, 6)
    screen = scored(frame, blast_from=limit)["blast"]["overall"]["screen"]
    assert screen["from"] == limit and screen["ppv"]["value"] == 1.0
    assert screen["sensitivity"]["value"] == 6 / 8
    assert scored(frame, blast_from=0.0)["blast"]["overall"]["screen"]["sensitivity"]["value"] == 1.0


@pytest.mark.mission("a smear is flagged beyond what blast-free smears of the validation showed")
def test_a_smear_is_flagged_beyond_the_limit_and_pseudo_smears_are_counted_apart() -> None:
    clear = [("LYMPH", "LYMPH")] * 47 + [("LYMPH", "BLAST")] * 3  # 6 %
    few = [("BLAST", "BLAST")] * 2 + [("LYMPH", "LYMPH")] * 48  # 4 %
    many = [("BLAST", "BLAST")] * 10 + [("LYMPH", "LYMPH")] * 40
    known = table([*clear, *few, *many], [f"p{i // 50}" for i in range(150)])
    apart = table(([("LYMPH", "BLAST")] * 4 + [("LYMPH", "LYMPH")] * 96) * 2 + [("LYMPH", "BLAST")] * 50, [None] * 250)
    frame = pd.concat([known, apart.assign(site="beta")], ignore_index=True)
    frame["sha256"] = [f"{i:064x}" for i in range(len(frame))]
    says = frame["predicted_type"].tolist()
    assert false_alarm_share(frame[:150], says[:150]) == {"above": 0.06, "smears": 1, "pseudo_smears": 0}
    assert false_alarm_share(frame[50:150], says[50:150])["above"] is None, "every smear has blasts"
    found = false_alarm_share(frame, says)
    assert found == {"above": 0.06, "smears": 1, "pseudo_smears": 2}, "the last 50 of beta are no hundred"
    found = scored(frame, flag_above=0.03)["blast"]
    assert (found["smears"]["any_blast_flagged"]["smears"], found["smears"]["any_blast_flagged"]["value"]) == (2, 1.0)
    assert (found["smears"]["no_blast_flagged"]["smears"], found["smears"]["no_blast_flagged"]["value"]) == (1, 1.0)
    assert found["pseudo_smears"] == {"beta": {"smears": 2, "flagged": 2}}
    found = scored(frame, flag_above=0.06)["blast"]
    assert (
        found["smears"]["any_blast_flagged"]["value"] == 0.5 and found["smears"]["many_blasts_flagged"]["value"] == 1.0
    )
    assert found["smears"]["no_blast_flagged"]["value"] == 0.0
    assert found["pseudo_smears"] == {"beta": {"smears": 2, "flagged": 0}}


@pytest.mark.mission("blasts are a share of the cells that a differential counts")
def test_smudge_cells_are_no_part_of_a_smear_of_which_blasts_are_a_share() -> None:
    smudged = [("BLAST", "BLAST")] * 7 + [("LYMPH", "LYMPH")] * 60 + [("SMUDGE", "SMUDGE")] * 424
    small = [("LYMPH", "LYMPH")] * 30 + [("LYMPH", "BLAST")] * 10 + [("SMUDGE", "SMUDGE")] * 20
    frame = table([*smudged, *small], ["p1"] * 491 + ["p2"] * 60)
    assert false_alarm_share(frame[491:], frame["predicted_type"][491:].tolist())["above"] is None, "forty are too few"
    smears = scored(frame, flag_above=0.1)["blast"]["smears"]
    assert [round(row["true_share"]["value"], 3) for row in smears["rows"]] == [round(7 / 67, 3), 0.0]
    assert smears["many_blasts_found"]["smears"] == 1 and smears["many_blasts_flagged"]["value"] == 1.0
    assert smears["too_few_cells"] == 1 and smears["no_blast_flagged"]["smears"] == 0


@pytest.mark.parametrize("label", ["fine", "parent"])
def test_what_follows_from_the_type_does_not_beat_the_type(label: str) -> None:
    kinds = ["NEUT_SEG", "EOS", "LYMPH", "MONO", "NEUT_BAND"] * 60
    granular = {"NEUT_SEG": "yes", "EOS": "yes"}
    values = [granular.get(k, "no") for k in kinds]
    labels = ["NEUT" if label == "parent" and k.startswith("NEUT") else k for k in kinds]
    frame = table(list(zip(labels, kinds, strict=True)), [f"p{i % 30}" for i in range(300)])
    frame["c_granularity"] = values
    truth = pd.DataFrame({"sha256": frame["sha256"], "name": "granularity", "value": values})
    train = pd.DataFrame({"true_type": kinds, "granularity": values})
    found = scored(frame, truth, train_labels=train)["characteristics"]["granularity"]
    assert found["accuracy"]["value"] == found["type_only"]["accuracy"]["value"] == 1
    assert found["majority_accuracy"] == 0.6
    assert not found["beats_type_only"]


def test_a_characteristic_that_is_seen_beats_the_type() -> None:
    rng = np.random.default_rng(2)
    values = np.where(rng.random(300) < 0.4, "yes", "no")
    frame = table([("LYMPH", "LYMPH")] * 300, [f"p{i % 30}" for i in range(300)])
    frame["c_cytoplasm_vacuole"] = np.where(rng.random(300) < 0.9, values, "no")
    truth = pd.DataFrame({"sha256": frame["sha256"], "name": "cytoplasm_vacuole", "value": values})
    # An artefact has no cytoplasm: what is said of its vacuoles teaches nothing.
    train = pd.DataFrame(
        {"true_type": ["LYMPH"] * 2 + ["ARTEFACT"] * 9, "cytoplasm_vacuole": ["no", None] + ["yes"] * 9}
    )
    train["sha256"] = [f"t{i}" for i in range(11)]
    metrics = scored(frame, truth, train_labels=train)
    found = metrics["characteristics"]["cytoplasm_vacuole"]
    assert found["beats_type_only"]
    assert found["type_only"]["accuracy"]["value"] == found["majority_accuracy"] == round((values == "no").mean(), 6)
    assert found["readers"] == {"agreement": 0.986, "kappa": 0.92}
    assert metrics["characteristics"]["auer_rod"]["status"] == "not tested"
    for nothing in (train.drop(columns="cytoplasm_vacuole"), train.assign(cytoplasm_vacuole=None)):
        with pytest.raises(DataError, match="no training cell has a value of cytoplasm_vacuole"):
            scored(frame, truth, train_labels=nothing)
    lucky = frame.assign(c_cytoplasm_vacuole="no")
    lucky.loc[np.flatnonzero(values == "yes")[:1], "c_cytoplasm_vacuole"] = "yes"
    by_chance = scored(lucky, truth, train_labels=train)["characteristics"]["cytoplasm_vacuole"]
    assert by_chance["advantage"]["value"] > 0
    assert not by_chance["beats_type_only"]
    two_patients = frame.assign(patient=[f"p{i % 2}" for i in range(300)])
    assert not scored(two_patients, truth)["characteristics"]["cytoplasm_vacuole"]["beats_type_only"]


def test_labels_that_do_not_apply_or_are_not_trained_are_said() -> None:
    frame = table([("BLAST", "BLAST")] * 3 + [("LYMPH", "LYMPH")] * 5)
    truth = pd.DataFrame({"sha256": frame["sha256"], "name": "auer_rod", "value": "absent"})
    found = scored(frame, truth)["characteristics"]["auer_rod"]
    assert (found["status"], found["support"], found["labelled_where_it_does_not_apply"]) == ("not trained", 3, 5)


def test_cells_without_patients_are_said_to_be() -> None:
    frame = table([("LYMPH", "LYMPH")] * 30, [None] * 30)
    metrics = scored(frame)
    assert not metrics["patient_independent"]
    assert "alpha" in metrics["patient_note"]
    assert metrics["types"]["overall"]["interval_by"] == "cell"
    assert metrics["blast"]["smears"] == {"num_smears": 0}
    named = frame.assign(smear=["s"] * 30, patient=["p", *[None] * 29])
    assert scored(named)["patient_note"] is None, "one cell of the smear says whose it is"


def test_the_result_is_json_and_independent_of_the_order_of_rows() -> None:
    frame = table([("LYMPH", "LYMPH"), ("LYMPH", "MONO"), ("NEUT", "NEUT_SEG"), ("BLAST", "BLAST")] * 10)
    first = json.dumps(scored(frame), allow_nan=False)
    assert first == json.dumps(scored(frame.sample(frac=1, random_state=3)), allow_nan=False)


def test_headline_is_flat_and_leaves_out_what_is_unknown() -> None:
    metrics = scored(table([("LYMPH", "LYMPH")] * 30 + [("MONO", "MONO")] * 30))
    flat = headline(metrics)
    assert flat["accuracy"] == flat["alpha.accuracy"] == 1
    assert all(isinstance(v, float) for v in flat.values())
    assert "blast_auc" not in flat  # no blast: absent, not 0
    assert flat["accuracy_low"] == metrics["types"]["overall"]["accuracy"]["low"] < 1


def test_types_and_characteristics_without_cells_are_named() -> None:
    frame = table([("LYMPH", "LYMPH")] * 30).drop(columns="p_PLASMA")
    frame["p_LYMPH"] += 0.01
    missing = scored(frame)["not_tested"]
    assert "BLAST" in missing["types"]
    assert missing["types_not_trained"] == ["PLASMA"]
    assert len(missing["characteristics"]) == 24


def test_blasts_that_a_recogniser_was_never_taught_have_no_auc() -> None:
    """Its tables give every type of the vocabulary a probability, and those that it was not taught 0."""
    frame = table([("LYMPH", "LYMPH")] * 30 + [("BLAST", "LYMPH")] * 30)
    untaught = frame.assign(p_BLAST=np.float32(0), p_LYMPH=frame["p_LYMPH"] + frame["p_BLAST"])
    assert scored(frame)["blast"]["overall"]["trained"]
    blast = scored(untaught)["blast"]["overall"]
    assert not blast["trained"] and blast["auc"]["value"] is None and blast["sensitivity"]["value"] == 0
    assert scored(untaught)["not_tested"]["types_not_trained"] == ["BLAST"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda f: f.drop(columns="patient"), "lack the columns"),
        (lambda f: f.assign(true_type="LYMPHO"), "'LYMPHO'.*'LYMPH'"),
        (lambda f: f.assign(predicted_type="NEUT"), "predicted_type 'NEUT'"),
        (lambda f: f.assign(true_type=None), "none of the 4 cells"),
        (lambda f: f.assign(p_LYMPH=0.5), "no distribution"),
        (lambda f: f.assign(p_LYMPH=np.nan), "no distribution"),
        (lambda f: f.assign(sha256="a"), "twice"),
        (lambda f: f.drop(columns="p_LYMPH"), "lack the column p_LYMPH"),
    ],
)
def test_what_cannot_be_scored_is_refused(broken: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        scored(broken(table([("LYMPH", "LYMPH")] * 4)))


def test_conflicting_or_unknown_characteristic_labels_are_refused() -> None:
    frame = table([("LYMPH", "LYMPH")] * 4)
    truth = pd.DataFrame({"sha256": frame["sha256"], "name": "cell_size", "value": "small"})
    with pytest.raises(DataError, match="two labels of cell_size"):
        scored(frame, pd.concat([truth, truth.assign(value="big")]))
    with pytest.raises(DataError, match=r"no characteristic.*cell_size"):
        scored(frame, truth.assign(name="cell_sise"))
    with pytest.raises(DataError, match="'huge'"):
        scored(frame, truth.assign(value="huge"))


@pytest.mark.mission("reader against reader beside model against reader, wherever a source has two labels")
def test_readers_are_compared_where_there_are_two_labels():
    def label(sha: str, value: str, role: str = "reference", conflicted: bool = False, by: str = "first") -> dict:
        return {
            "sha256": sha,
            "name": "type",
            "value": value,
            "role": role,
            "conflicted": conflicted,
            "labelled_by": by,
        }

    labels = [label(f"r{i}", "BLAST") for i in range(10)]
    labels += [label(f"r{i}", "BLAST" if i < 8 else "MONO", "reannotation", by="again") for i in range(10)]
    labels += [label(f"r{i}", "MONO", "reannotation", by="and again") for i in range(2)]
    labels += [label("d", t, conflicted=True) for t in ("LYMPH", "LYMPH_ATYP", "MONO")] + [label("x", "EOS")]
    said = ["BLAST"] * 6 + ["MONO"] * 4
    rows = [(f"r{i}", "lmu", f"p{i}", said[i], i == 0, None) for i in range(10)]
    rows += [("d", "jhu", "q", "MONO", True, None), ("x", "jhu", "q", "EOS", False, None)]
    columns = ["sha256", "site", "patient", "predicted_type", "seen_in_training", "smear"]
    disputed, again, third = score_readers(pd.DataFrame(rows, columns=columns), pd.DataFrame(labels), seed=1)
    about = (disputed["site"], disputed["reading"], disputed["cells"], disputed["of_patients_trained_on"])
    assert about == ("jhu", "disputed", 1, 1)
    assert disputed["model_agrees_with_first"]["value"] == 1 and "readers_agree" not in disputed, (
        "any of its three labels"
    )
    coarse = [
        label("n", "NEUT"),
        label("n", "NEUT_BAND", by="expert"),
        label("n", "NEUT_SEG", "reannotation", by="again"),
    ]
    one = pd.DataFrame([("n", "lmu", "p", "NEUT_SEG", False, None)], columns=columns)
    (finer,) = score_readers(one, pd.DataFrame(coarse), seed=1)
    assert finer["readers_agree"]["value"] == 0 and finer["model_agrees_with_first"]["value"] == 0, "the child's label"
    values = {name: again[name]["value"] for name in again if isinstance(again[name], dict)}
    assert again["cells"] == 9, "the cell that training saw is left out"
    assert values["readers_agree"] == pytest.approx(7 / 9)
    assert values["model_agrees_with_first"] == pytest.approx(5 / 9)
    assert values["model_agrees_with_second"] == pytest.approx(7 / 9)
    assert again["readers_agree"]["low"] < 7 / 9 < again["readers_agree"]["high"]
    assert (third["reading"], third["cells"], third["readers_agree"]["value"]) == ("and again", 1, 0)
