"""What differs is called in its own family, what does not is not, and chance is called as often as is stated."""

import numpy as np
import pandas as pd
import pytest
from drawn import WARD, draw, lab

from monitoring import drift
from monitoring.drift import compare
from monitoring.reference import Reference
from monitoring.smears import by_smear, families, named
from monitoring.verdict import decide, find, sentence
from smearline.staining import STAINING


@pytest.fixture
def reference() -> Reference:
    return lab()


def window(num: int = 10, seed: int = 9, **changes) -> pd.DataFrame:
    """Smears of the site, from later days, measured against the reference's centres."""
    cells = draw(num, seed, first_day=changes.pop("first_day", "2024-04-01"), **changes)
    return by_smear(named(cells), lab().centres["lab"])


def moved(comparison: drift.Comparison) -> set[str]:
    return {family for family, features in comparison.features.items() if any(f.moved for f in features)}


def test_smears_like_the_reference_are_not_called(reference):
    found = compare(window(), reference.smears, {})
    assert moved(found) == set() and not found.because


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({"stain_red_cell": 1.2}, "staining"),
        ({"stain_glass": 0.9}, "staining"),
        ({"optics_sharpness": 0.8}, "optics"),
        ({"confidence": -0.1}, "confidence"),
        ({"embedding": 0.3}, "embedding"),
    ],
)
def test_each_change_is_called_in_its_own_family(reference, change, family):
    assert moved(compare(window(5, **change), reference.smears, {})) == {family}


def test_a_leukaemia_ward_is_another_mix_and_no_fault_of_the_stain(reference):
    """Its blasts have paler nuclei and are named less surely, and neither is taken for a drift."""
    found = compare(window(10, mix=WARD), reference.smears, {})
    assert moved(found) == {"mix"}
    blast = next(f for f in found.features["mix"] if f.name == "share_BLAST")
    assert blast.moved and blast.now > 50 and blast.unit == "%"


def test_false_alarms_come_as_often_as_is_stated():
    """60 windows without drift, each against its own reference; 3 are expected, and 9 or more have a chance of 0.3 %."""
    names, alarms = [n for family in families().values() for n in family], 0
    for seed in range(60):
        values = np.random.default_rng(seed).normal(size=(30, len(names)))
        values[:, ::2] = np.exp(values[:, ::2])  # shares and distances are skewed
        table = pd.DataFrame(values, columns=names).assign(day=None, patient=None, seen=False)
        table["smear"] = [f"s{i}" for i in range(30)]
        alarms += compare(table.iloc[:10], table.iloc[10:], {}).farthest > 1
    assert 1 <= alarms <= 8


def test_days_that_differ_in_themselves_are_no_drift(reference):
    """The stain of each day is its own. Smears dealt as if they were independent call that a drift, days do not."""
    own = np.random.default_rng(3)

    def by_day(table: pd.DataFrame) -> pd.DataFrame:
        days = {d: 1 + 0.15 * own.normal(size=len(STAINING)) for d in table["day"].unique()}
        return table.assign(**{n: table[n] * [days[d][i] for d in table["day"]] for i, n in enumerate(STAINING)})

    pairs = [(by_day(window(16, seed)), by_day(reference.smears)) for seed in range(20, 32)]
    by_days, by_smears = (
        sum(bool(moved(compare(now.assign(**change), base, {}))) for now, base in pairs)
        for change in ({}, {"day": None})
    )
    assert by_days <= 2 and by_smears >= 6


def test_too_few_days_to_deal_are_said(reference):
    assert compare(window(5, per_day=5), reference.smears, {}).too_few == "days"  # 1 day and 6: 7 ways to deal
    assert compare(window(20, per_day=4), reference.smears, {}).too_few is None  # 5 days and 6: 462


def test_a_patient_s_smears_count_once_where_days_are_not_known():
    """Five patients with four smears each: their smears are no twenty witnesses."""
    names, by_patients, by_smears = [n for family in families().values() for n in family], 0, 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        own = random.normal(size=(25, len(names)))[np.arange(100) // 4]
        table = pd.DataFrame(own + random.normal(size=own.shape), columns=names).assign(day=None, seen=False)
        table["smear"] = [f"s{i}" for i in range(100)]
        for patient in ([f"p{i // 4}" for i in range(100)], None):
            called = (
                compare(
                    *(
                        t.assign()
                        for t in (table.assign(patient=patient).iloc[:20], table.assign(patient=patient).iloc[20:])
                    ),
                    {},
                ).farthest
                > 1
            )
            by_patients, by_smears = (by_patients + called, by_smears) if patient else (by_patients, by_smears + called)
    assert by_patients <= 4 and by_smears >= 10


def test_a_busy_window_is_called_though_the_reference_s_days_are_thin():
    names, called = [n for family in families().values() for n in family], 0
    for seed in range(10):
        random = np.random.default_rng(seed)
        days = [*(f"r{i}" for i in range(40)), *(f"w{i // 10}" for i in range(50))]
        table = pd.DataFrame(random.normal(size=(90, len(names))), columns=names).assign(
            day=days, patient=None, seen=False
        )
        table["smear"] = [f"s{i}" for i in range(90)]
        table.loc[40:, names[0]] += 3
        called += compare(table.iloc[40:], table.iloc[:40], {}).farthest > 1
    assert called >= 8


def test_a_stain_that_has_faded_away_is_not_as_the_reference(reference):
    table = window(12)
    red = [c for c in table if "red_cell" in c and not c.endswith("seen")]
    faded = table.assign(**dict.fromkeys(red, np.nan), stain_red_cell_seen=0.0, stain_nucleus_seen=0.0)
    found = find(compare(faded, reference.smears, {}), faded)
    assert found["staining"].status == "moved" and set(found["staining"].lost) == set(red)
    assert found["staining"].size is None, "of what is left no size can be given"
    assert decide(found, {}, None) == "hold"
    assert "do not show red cells in red light" in sentence("hold", "12 smears of lab", found, {}, None)
    table.loc[:7, red] = np.nan  # the last four cannot speak for the others
    assert decide(find(compare(table, reference.smears, {}), table), {}, None) == "hold"


def test_too_few_smears_cannot_be_judged(reference):
    found = compare(window(4), reference.smears, {})
    assert found.features == {} and "4 smears" in found.because["staining"]
    found = compare(window(5), reference.smears.iloc[:7], {})
    assert found.features == {} and "the reference has 7 smears" in found.because["optics"]


def test_confidence_is_not_judged_on_what_training_saw(reference):
    seen = reference.smears.assign(seen=[True] * 18 + [False] * 6)
    found = compare(window(10, confidence=-0.2), seen, {})
    assert set(found.features) == {"staining", "optics", "mix"}
    assert "training did not see" in found.because["confidence"]


def test_a_smear_without_neutrophils_says_nothing_of_nuclei(reference):
    table = window(6)
    table.loc[:2, [c for c in table if "nucleus" in c]] = np.nan
    names = {f.name for f in compare(table, reference.smears, {}).features["staining"]}
    assert "stain_red_cell_G" in names and "stain_nucleus_G" not in names


def test_a_shift_that_is_nothing_to_a_reader_is_not_called(reference):
    """However sure: here no smear differs from another by chance."""
    table, base = window(10), reference.smears.copy()
    table["stain_red_cell_G"], base["stain_red_cell_G"] = 0.134, 0.130
    assert not next(f for f in compare(table, base, {}).features["staining"] if f.name == "stain_red_cell_G").moved
    table["stain_red_cell_G"] = 0.140
    assert next(f for f in compare(table, base, {}).features["staining"] if f.name == "stain_red_cell_G").moved


def test_since_is_the_day_from_which_on_it_stayed(reference):
    before, after = window(12), window(12, 11, first_day="2024-04-04", stain_red_cell=1.3)
    history = pd.concat([before, after])
    finding = find(compare(after, reference.smears, {}), history)["staining"]
    assert (finding.status, finding.since) == ("moved", "2024-04-04")
    assert finding.size == pytest.approx(0.13 * 0.3 / 3**0.5, rel=0.2)  # three of nine features by 30 %
