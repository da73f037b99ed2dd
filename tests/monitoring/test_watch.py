"""From an inference log to a verdict in one sentence, its page and Evidently's."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import CHECKOUT
from drawn import WARD, draw, lab, write_log

from monitoring import verdict
from monitoring.reference import refer
from monitoring.verdict import Verdict
from monitoring.watch import judge
from smearline import cbc
from smearline.errors import DataError

LATER = "2024-04-01"


@pytest.fixture
def reference_folder(tmp_path):
    lab().save(tmp_path / "reference")
    return tmp_path / "reference"


@pytest.fixture
def log(tmp_path):
    return lambda cells, version="v1": write_log(tmp_path / "log", cells, version)


@pytest.fixture
def watched(log, reference_folder, tmp_path, request, monkeypatch):
    """A verdict over a log of smears drawn so. Evidently's report takes ten times as long as all else: only the tests whose
    name says so have it made."""
    if "evidently" not in request.node.name:
        monkeypatch.setattr("monitoring.report.write", lambda *_: None)

    def made(
        num: int = 10, *, seed: int = 9, version: str = "v1", site: str = "lab", judging: dict | None = None, **changes
    ) -> Verdict:
        folder = log(draw(num, seed, site=site, first_day=LATER, **changes), version)
        return judge(folder, site, reference_folder, tmp_path / "watch", **(judging or {}))

    return made


@pytest.fixture
def limits(monkeypatch):
    """As if measured: a staining shift of 0.02 costs accuracy, and reviewers change one cell in ten."""
    table = {
        **verdict.limits(),
        "staining": {"limit": 0.02, "unit": "OD", "measured_on": "a test"},
        "overrides": {"limit": 0.1},
    }
    monkeypatch.setattr("monitoring.verdict.limits", lambda: table)
    monkeypatch.setattr("monitoring.watch.limits", lambda: table)
    monkeypatch.setattr("monitoring.page.limits", lambda: table)


def test_smears_like_the_reference_are_accepted(watched):
    made = watched()
    assert made.verdict == "accept"
    assert (
        made.sentence
        == "Accept: 10 smears of lab are as the reference in staining, optics, mix, confidence and embedding."
    )
    assert (made.num_smears, made.num_cells, made.false_alarm_rate) == (10, 400, 0.05)
    assert made.reference["own"] and made.version == "v1" and made.origin == "simulated"


def test_missing_witnesses_are_missing_and_no_agreement(watched):
    made = watched()
    assert {w.status for w in made.witnesses.values()} == {"missing"}
    page = (made.path / "index.html").read_text(encoding="utf-8")
    assert page.count(">missing</span>") == 2 and ">agrees</span>" not in page


def test_a_change_of_stain_is_observed_with_what_how_much_and_since_when(watched):
    made = watched(stain_red_cell=1.4)
    assert made.verdict == "observe"
    assert re.match(
        r"Observe: on 10 smears of lab the staining has moved \(red cells in \w+ light from 0\.1\d\d to 0\.1\d\d OD\), "
        r"since 2024-04-01\.",
        made.sentence,
    )


def test_a_leukaemia_ward_is_said_to_be_patients_and_no_fault_of_the_stain(watched):
    made = watched(mix=WARD)
    assert made.verdict == "observe" and made.families["staining"].status == "as the reference"
    assert "the mix has moved (blast from" in made.sentence
    assert "other patients, not a fault of the stain" in made.sentence


def test_beyond_the_shift_that_cost_accuracy_it_is_held(watched, limits):
    assert watched(stain_red_cell=1.15).verdict == "observe"
    made = watched(stain_red_cell=1.6)
    assert made.verdict == "hold"
    assert made.sentence.startswith("Hold automatic release: ") and "accuracy was seen to fall" in made.sentence


def test_colour_and_a_witness_against_it_are_held_and_beyond_the_limit_stopped(watched, limits):
    said = {"witnesses": {"reviewers": {"cases_reviewed": 5, "cells_reviewed": 200, "cells_overridden": 60}}}
    assert watched(stain_red_cell=1.15, judging=said).verdict == "hold"
    stopped = watched(stain_red_cell=1.6, judging=said)
    assert stopped.verdict == "stop" and "the reviewers: changed 60 of 200" in stopped.sentence
    assert watched(judging=said).verdict == "observe"  # the pictures are as ever, the answers are not
    few = {"witnesses": {"reviewers": {"cases_reviewed": 5, "cells_reviewed": 200, "cells_overridden": 8}}}
    made = watched(judging=few)
    assert (made.verdict, made.witnesses["reviewers"].status) == ("accept", "agrees")
    one = {"witnesses": {"reviewers": {"cases_reviewed": 1, "cells_reviewed": 50, "cells_overridden": 25}}}
    assert watched(judging=one).witnesses["reviewers"].status == "too little"


def counts(cells: pd.DataFrame, **added: float) -> pd.DataFrame:
    """An analyser that counted as the recogniser did, plus so many points."""
    rows = []
    for smear, part in cells.groupby("smear"):
        white = part[~part["predicted_type"].isin(["UNIDENTIFIED"])]
        for parameter, code in (("NEUT%", "NEUT_SEG"), ("LYMPH%", "LYMPH")):
            share = 100 * float((white["predicted_type"] == code).mean()) + added.get(parameter[:-1], 0)
            rows.append({"smear": smear, "parameter": parameter, "value": share})
    rows.append({"smear": "s9-0", "parameter": "WBC", "value": 7.1})
    return pa.Table.from_pylist([row | {"site": "lab"} for row in rows], schema=cbc.COUNTS).to_pandas()


def test_the_analyser_agrees_or_disagrees(watched):
    cells = draw(10, 9, first_day=LATER)
    made = watched(judging={"witnesses": {"analyser": counts(cells)}})
    assert (made.verdict, made.witnesses["analyser"].status) == ("accept", "agrees")
    made = watched(judging={"witnesses": {"analyser": counts(cells, LYMPH=25.0)}})
    assert (made.verdict, made.witnesses["analyser"].status) == ("observe", "disagrees")
    assert "LYMPH%: ours is -25" in made.sentence
    noisy = counts(cells, LYMPH=-25.0)  # the widest mean gap, but an unsure one, hides no sure one
    noisy.loc[noisy["parameter"] == "NEUT%", "value"] += [90, -30, 90, -30, 90, -30, 90, -30, 90, -30]
    made = watched(judging={"witnesses": {"analyser": noisy}})
    assert made.witnesses["analyser"].status == "disagrees" and "LYMPH%" in made.witnesses["analyser"].says
    four = counts(cells[cells["smear"].isin([f"s9-{i}" for i in range(4)])])
    assert watched(judging={"witnesses": {"analyser": four}}).witnesses["analyser"].status == "too little"


def test_too_few_smears_cannot_be_judged(watched):
    made = watched(4, stain_red_cell=2.0)
    assert made.verdict == "cannot be judged"
    assert made.sentence == "Cannot be judged: 4 smears with enough cells came in; 5 are needed."
    assert (made.path / "index.html").exists()


def test_smears_that_are_left_out_are_counted_and_not_accepted(log, reference_folder, tmp_path):
    few = draw(20, 12, first_day=LATER, cells=15).assign(smear=lambda f: "few-" + f["smear"])
    made = judge(log(pd.concat([draw(6, 9, first_day=LATER), few])), "lab", reference_folder, tmp_path / "watch")
    assert made.verdict == "cannot be judged" and "20 of 26 smears were left out" in made.sentence


def test_another_recogniser_is_not_compared_and_not_accepted(watched):
    made = watched(version="v2")
    assert made.verdict == "cannot be judged" and "another recogniser (v2)" in made.sentence
    assert {f for f, v in made.families.items() if v.status == "cannot be judged"} == {"mix", "confidence", "embedding"}
    assert watched(version="v2", stain_red_cell=1.4).verdict == "observe"  # what needs no recogniser is still seen


def test_after_a_change_of_recogniser_the_days_of_the_reference_s_own_are_judged(watched, log):
    log(draw(8, 8, first_day="2024-03-30"), "v0")
    made = watched(12)
    assert made.verdict == "accept" and made.num_smears == 12
    assert any("another recogniser" in note for note in made.notes)


def test_a_site_without_a_reference_is_compared_and_says_with_whom(watched):
    made = watched(site="other")
    assert made.verdict == "accept" and not made.reference["own"]
    assert any("other has no reference of its own; it was compared with lab" in note for note in made.notes)
    with pytest.raises(DataError, match="no site 'nowhere'"):
        watched(judging={"against": "nowhere"})


def test_a_site_without_a_reference_is_compared_with_the_nearest_of_those_that_can_judge_most(
    watched, reference_folder, monkeypatch
):
    def told(**changes) -> str:
        return watched(site="other", **changes).notes[0].split("compared with ")[1].split(",")[0]

    sharp = draw(24, 2, site="sharp", optics_sharpness=1.5)
    unmeasured = draw(24, 1, site="unmeasured")
    unmeasured[[name for name in unmeasured if name.startswith("optics")]] = np.nan
    cells = pd.concat([draw(24, 1), sharp, unmeasured], ignore_index=True)
    refer(cells, version="v1", embedding_version="e1", origin="simulated").save(reference_folder)
    assert told() == "lab"
    assert told(optics_sharpness=1.5) == "sharp"
    assert told(optics_sharpness=1.35) == "sharp", "what cannot be judged is not near"


def test_a_reference_without_smears_judges_nothing(watched, reference_folder):
    about = json.loads((reference_folder / "reference.json").read_text())
    about["sites"]["lab"]["num_smears"] = 3
    (reference_folder / "reference.json").write_text(json.dumps(about))
    made = watched()
    assert made.verdict == "cannot be judged" and "the reference has 0 smears" in made.sentence


def test_pseudo_smears_are_said(log, reference_folder, tmp_path):
    folder = log(draw(12, 9, first_day=LATER).assign(smear=None))
    made = judge(folder, "lab", reference_folder, tmp_path / "watch")
    assert any("pseudo-smears" in note for note in made.notes)


def test_a_day_can_be_named_and_only_its_window_counts(log, reference_folder, tmp_path):
    log(draw(8, 9, first_day=LATER))
    folder = log(draw(8, 10, first_day="2024-04-20", stain_red_cell=1.5))
    out = tmp_path / "watch"
    assert judge(folder, "lab", reference_folder, out, day="2024-04-02").verdict == "accept"
    assert judge(folder, "lab", reference_folder, out).day == "2024-04-21"
    assert sorted(p.name for p in (out / "lab").iterdir()) == ["2024-04-02", "2024-04-21"]
    with pytest.raises(DataError, match="no day of site 'lab' from 2024-04-04 to 2024-04-10"):
        judge(folder, "lab", reference_folder, out, day="2024-04-10")
    with pytest.raises(DataError, match="no day of site 'nobody'"):
        judge(folder, "nobody", reference_folder, out)
    with pytest.raises(DataError, match="no reference"):
        judge(folder, "lab", tmp_path / "none", out)


def test_the_same_log_gives_the_same_verdict(watched):
    def without_time(made: Verdict) -> dict:
        found = json.loads((made.path / "verdict.json").read_text(encoding="utf-8"))
        del found["created_at"]
        return found

    assert without_time(watched(stain_red_cell=1.1)) == without_time(watched(stain_red_cell=1.1))


def test_verdict_json_keeps_its_keys(watched):
    found = json.loads((watched().path / "verdict.json").read_text(encoding="utf-8"))
    assert set(found) == {
        "site", "day", "verdict", "sentence", "version", "window", "num_smears", "num_cells", "families", "witnesses",
        "false_alarm_rate", "notes", "reference", "origin", "intended_use", "created_at",
    }  # fmt: skip
    assert set(found["families"]) == {"staining", "optics", "mix", "confidence", "embedding"}
    feature = found["families"]["staining"]["features"][0]
    assert {"name", "reference", "low", "high", "now", "shift", "distance", "threshold", "moved"} <= set(feature)


def test_the_page_needs_nothing_from_outside_and_says_what_it_must(watched):
    page = (watched(stain_red_cell=1.4).path / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?:|//[a-z]|@import|<script|<link", page)
    for text in ("Research use only", "Simulated data", "5 verdicts in 100", 'href="evidently.html"', "Observe:"):
        assert text in page
    assert page.count("<svg") == 5


def test_evidently_says_the_same_as_the_verdict(watched, tmp_path):
    watched()
    made = watched(stain_red_cell=1.4)  # the day judged again takes the place of the first
    html = (made.path / "evidently.html").read_text(encoding="utf-8")
    assert not re.findall(r"<script[^>]+src=|<link[^>]+href=", html)
    snapshots = list((tmp_path / ".smearline" / "evidently").glob("*/snapshots/*.json"))
    assert len(snapshots) == 1
    snapshot = json.loads(snapshots[0].read_text(encoding="utf-8"))
    assert {"metric_results", "tests_widgets", "metadata", "tags", "name", "timestamp"} <= set(snapshot)
    assert snapshot["metadata"]["verdict"] == "observe" and snapshot["timestamp"].startswith("2024-04-03")
    metrics = [(r["metric_value_location"]["metric"]["params"], r) for r in snapshot["metric_results"].values()]
    failed = {params["column"]: r["tests"][0]["status"] == "FAIL" for params, r in metrics if "column" in params}
    assert failed == {f.name: f.moved for v in made.families.values() for f in v.features}
    assert {params["method"] for params, _ in metrics if "column" in params} == {"wasserstein"}


def test_no_evidently_report_is_made_of_what_was_not_judged(watched):
    assert not (watched(4).path / "evidently.html").exists()


def test_it_runs_as_a_command_in_a_workspace_where_evidently_ui_finds_it(log, reference_folder, tmp_path):
    log(draw(6, 9, first_day=LATER))
    done = subprocess.run(
        [sys.executable, "-m", "monitoring.watch", "--site", "lab", "--log", "log"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Accept: 6 smears of lab") and "watch/lab/2024-04-02/index.html" in done.stdout
    assert {p.name for p in (tmp_path / "watch/lab/2024-04-02").iterdir()} == {
        "verdict.json",
        "index.html",
        "evidently.html",
        "smears.parquet",
    }
    assert (tmp_path / ".smearline" / "evidently").is_dir()


def test_the_limits_are_those_that_were_measured_and_each_says_where():
    measured = json.loads((CHECKOUT / "bench" / "results" / "drift.json").read_text(encoding="utf-8"))["limits"]
    for family, limit in verdict.limits().items():
        assert limit["measured_on"] and limit["unit"], family
        if family != "analyser":  # set by hand, and says so
            assert limit["limit"] == measured.get(family, {}).get("limit"), family
    assert verdict.limits()["analyser"]["measured_on"].startswith("set by hand")
