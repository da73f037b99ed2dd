"""The flow monitor: cases that the service answered in, a verdict, its pages, a line in the audit log out; and `trace`."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from flows import audit
from flows import monitor as flow
from flows.monitor import monitor
from flows.trace import MISSING, trace
from flows.workspace import Workspace
from monitoring import reference, watch
from serving.cases import Answer, Case, CaseStore, case_of
from smearline import plain_json, staining, vocabulary
from smearline.errors import DataError

pytest_plugins = ["tiny_fixtures"]
START = datetime(2026, 3, 2, 8, tzinfo=UTC)


def cells(smear: int, number: int = 40, paler: float = 0.0) -> pd.DataFrame:
    """What a recogniser says of the cells of a smear, its staining `paler` than usual."""
    random = np.random.default_rng(smear)
    types = list(vocabulary.load().types)
    named = [types[i] for i in random.integers(0, 5, number)]
    frame = pd.DataFrame({"sha256": [f"{smear * 1000 + i:064x}" for i in range(number)], "site": "lab"})
    frame = frame.assign(patient=f"p{smear}", smear=f"s{smear}", predicted_type=named, scale_assumed=False)
    sure = random.uniform(0.6, 0.99, number)
    frame = frame.assign(
        **{f"p_{t}": np.where([t == n for n in named], sure, (1 - sure) / (len(types) - 1)) for t in types}
    )
    usual = random.normal(1.0, 0.02)
    colours = {name: usual - paler + random.normal(0, 0.05, number) for name in staining.FEATURES}
    return frame.assign(**colours, embedding=list(random.normal(0, 1, (number, 8)).astype("float32")))


def serve(space: Workspace, smears: range, day: int, paler: float = 0.0) -> None:
    store = CaseStore(home=space.service)
    for smear in smears:
        at = START + timedelta(days=day, minutes=smear)
        case = Case(case_of("lab", f"s{smear}"), "lab", f"s{smear}", f"p{smear}")
        answer = Answer(f"{smear:024d}", "recognise", package(space), "real", "scanner", at, at, b"{}")
        said = cells(smear, paler=paler)
        store.add(case, answer, pa.Table.from_pandas(said, preserve_index=False), [])


def package(space: Workspace) -> str:
    return str(json.loads((space.folder / "package/lineage.json").read_text())["version"])


@pytest.fixture
def watched(space: Workspace) -> Workspace:
    """The workspace with a reference of thirty smears."""
    frames = [cells(s).assign(split="test", acquired_at=START - timedelta(days=s)) for s in range(100, 130)]
    about = {"version": package(space), "embedding_version": "e1", "origin": "real"}
    reference.refer(pd.concat(frames), **about).save(space.folder / "reference")
    return space


def run(space: Workspace):
    return monitor(str(space.folder), return_state=True)


def test_nothing_served_is_nothing_new(space: Workspace):
    assert run(space).name == "NothingNew"


def test_a_site_is_judged_once_and_again_when_its_stain_changes(watched: Workspace):
    serve(watched, range(12), day=0)
    state = run(watched)
    assert state.is_completed(), state.message
    (first,) = audit.entries(watched.folder, "verdict")
    assert (first["site"], first["verdict"], first["day"]) == ("lab", "accept", "2026-03-02")
    assert (watched.folder / first["page"]).is_file()
    assert run(watched).name == "NothingNew"
    assert watched.git("status", "--porcelain", "--", "audit.jsonl") == ""

    serve(watched, range(12, 24), day=20, paler=0.4)
    assert "staining" in run(watched).message
    second = audit.entries(watched.folder, "verdict")[-1]
    assert second["verdict"] not in ("accept", "cannot be judged")

    told = trace(watched.folder, f"{13:024d}")
    assert told["verdict_of_that_day"]["verdict"] == second["verdict"]
    assert (told["version"], told["audit_log"]) == ("v1.0.0", "whole")
    assert told["metrics"]["accuracy"] == audit.entries(watched.folder, "candidate")[0]["metrics"]["accuracy"]
    assert (told["gate"], told["approvals"], told["production"]) == (MISSING, MISSING, MISSING)
    assert trace(watched.folder, f"{3:024d}")["verdict_of_that_day"]["verdict"] == "accept"
    text = plain_json.shown(told, as_json=False)
    assert second["sentence"] in text
    assert "approvals: missing" in text


def test_a_verdict_that_was_not_told_is_told_again(watched: Workspace, monkeypatch: pytest.MonkeyPatch):
    serve(watched, range(12), day=0)
    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(flow, "emit_event", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("killed")))
        assert "killed" in run(watched).message
    monkeypatch.setattr(flow, "emit_event", lambda name, *_, **__: told.append(name))
    assert run(watched).is_completed() and told == ["smearline.verdict.accept"]
    assert run(watched).name == "NothingNew"


def test_a_site_of_which_nothing_could_be_recognised_leaves_the_others_alone(watched: Workspace):
    store, at = CaseStore(home=watched.service), START
    nothing = pa.Table.from_pandas(cells(0), preserve_index=False).slice(0, 0)
    answer = Answer("0" * 23 + "x", "recognise", package(watched), "real", "scanner", at, at, b"{}")
    store.add(Case(case_of("aaa", "s"), "aaa", "s", None), answer, nothing, [])
    serve(watched, range(12), day=0)
    assert run(watched).is_completed()
    assert [row["site"] for row in audit.entries(watched.folder, "verdict")] == ["lab"]
    with pytest.raises(DataError, match="no picture of site 'aaa'"):
        watch.judge(store.home / "log", "aaa", watched.folder / "reference", watched.folder / "watch")


@pytest.mark.mission("the reviewers' witness is of the version that is judged, and of what it named")
def test_reviews_of_another_version_are_no_witness(watched: Workspace):
    serve(watched, range(12), day=0)
    store = CaseStore(home=watched.service)
    for smear in range(3):
        case, old = Case(case_of("lab", f"s{smear}"), "lab", f"s{smear}", f"p{smear}"), f"{900 + smear:024d}"
        at = START + timedelta(days=-1, minutes=smear)
        said = cells(500 + smear).assign(smear=f"s{smear}", patient=f"p{smear}")
        said = pa.Table.from_pandas(said.assign(named=True), preserve_index=False)
        store.add(case, Answer(old, "recognise", "another", "real", "scanner", at, at, b"{}"), said, [])
        newest = store.case(case.case_id)["answers"][-1]["answer_id"]
        sign_off = {"reviewer": "dr", "at": (START + timedelta(days=1)).isoformat(), "comment": None}
        store.review(case.case_id, b"{}", sign_off=sign_off, answer_id=newest)
    assert run(watched).is_completed()
    page = watched.folder / audit.entries(watched.folder, "verdict")[-1]["page"]
    said = json.loads(page.with_name("verdict.json").read_text())["witnesses"]["reviewers"]["says"]
    assert "of 120 signed-off cells" in said, "forty of each smear, and none of the other version's"


def test_without_a_reference_it_fails_and_says_what_to_do(space: Workspace):
    serve(space, range(12), day=0)
    state = run(space)
    assert state.is_failed()
    assert "no reference" in state.message
    assert audit.entries(space.folder, "verdict") == []


def test_an_answer_that_nobody_gave_cannot_be_traced(space: Workspace, tmp_path: Path):
    with pytest.raises(DataError, match="no answer 'abc'"):
        trace(space.folder, "abc")


def test_the_installed_command_traces_from_any_folder(watched: Workspace, tmp_path: Path):
    command = [Path(sys.executable).with_name("smearline"), "trace", "abc", "--workspace", str(watched.folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "no answer 'abc'" in done.stderr
