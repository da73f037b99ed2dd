"""Retrain, promote, approve, rollback and trace on a small workspace with real git, DVC, gto and Prefect."""

import contextlib
import json
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import put
from tiny import cell, copied

from flows import audit, registry, smears
from flows.production import POINTER, rollback
from flows.promote import approve, approved, promote
from flows.retrain import retrain
from flows.workspace import FlowError, Workspace
from smearline import cbc, dataset, tokens
from smearline.errors import TokenError

pytest_plugins = ["tiny_fixtures"]


def run(flow, space: Workspace, *given: str):
    return flow(str(space.folder), *given, return_state=True)


def more_data(space: Workspace, seed: int = 5000) -> None:
    with dataset.CellWriter(space.folder / "data/cells", "lab") as writer:
        writer.add(cell(seed, "lab", "new", "new"))
    space.run("dvc", "add", "-q", "data/cells")
    space.commit("more data", "data/cells.dvc")


def says(space: Workspace, version: str, wrong: float = 0.0) -> None:
    """What the package of a version names on the frozen smears: all rightly, but a share `wrong` of them."""
    with contextlib.chdir(space.folder):
        cells = smears.frozen(Path("data"))
        kept = smears.kept(space, registry.find(space, version), Path("data"), cells)
    named = [t if i % 20 >= 20 * wrong else "PLASMA" for i, t in enumerate(cells["true_type"])]
    package = registry.find(space, version).package
    kept.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"sha256": cells["sha256"], "predicted_type": named}).to_parquet(kept / "cells.parquet")
    bento = space.folder / ".smearline/bentoml/bentos/smearline" / package / "bento.yaml"
    bento.parent.mkdir(parents=True, exist_ok=True)
    bento.touch()


def serving(space: Workspace) -> str:
    """The version that the pointer names."""
    found = registry.of_package(space, (space.folder / POINTER).read_text().strip())
    assert found is not None
    return found.name


@pytest.fixture(scope="session")
def promoted(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """v1 in production, and v2 after it; with the token that approved them."""
    folder = tmp_path_factory.mktemp("promoted")
    with pytest.MonkeyPatch.context() as patch:
        space = copied(made, folder, patch)
        token = tokens.create(space.service / "tokens.yaml", "haematologist", ["review", "approve"])
        patch.setenv("SMEARLINE_TOKEN", token)
        for version in ("v1", "v2"):
            if version == "v2":
                more_data(space)
                assert run(retrain, space).is_completed()
            says(space, version)
            assert run(promote, space).name == "AwaitingApproval"
            approve(space.folder, version, "looked at every error")
            assert run(promote, space).name == "Completed"
    return folder, token


@pytest.fixture
def second(promoted: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    space = copied(promoted[0], tmp_path, monkeypatch)
    monkeypatch.setenv("SMEARLINE_TOKEN", promoted[1])
    return space


def test_retrain_ends_in_a_candidate_that_is_tagged_pushed_and_logged(space: Workspace):
    (version,) = registry.versions(space)
    (tag,) = registry.tags(space)
    lineage = json.loads((space.folder / "package/lineage.json").read_text())
    assert (version.name, version.package) == ("v1.0.0", lineage["version"])
    assert version.commit == space.git("rev-parse", "HEAD")
    assert tag.said == {"package": lineage["version"], "audit": audit.head(space.folder)}
    assert [(e["what"], e["version"]) for e in audit.entries(space.folder)] == [("candidate", "v1.0.0")]
    assert space.git("status", "--porcelain") == ""
    assert any((space.folder.parent / "remote/files").rglob("*.dir"))
    assert not (space.folder / POINTER).exists()


def test_retrain_with_nothing_new_says_so_and_new_data_make_the_next_candidate(space: Workspace):
    assert run(retrain, space).name == "NothingNew"
    more_data(space)
    assert run(retrain, space).name == "Completed"
    assert [v.name for v in registry.versions(space)] == ["v1.0.0", "v2.0.0"]
    assert len({v.package for v in registry.versions(space)}) == 2


def test_a_retrain_that_was_killed_before_its_tag_makes_the_same_candidate(space: Workspace):
    space.git("tag", "-d", "smearline@v1.0.0")
    assert run(retrain, space).is_completed()
    assert [v.name for v in registry.versions(space)] == ["v1.0.0"]
    assert len(audit.entries(space.folder, "candidate")) == 1


def test_a_stage_that_fails_stops_those_after_it(space: Workspace):
    script = space.folder / "package.py"
    script.write_text("raise SystemExit('no more disk')")
    assert "uncommitted changes in package.py" in run(retrain, space).message
    space.commit("broken", "package.py")
    state = run(retrain, space)
    assert state.is_failed()
    assert "no more disk" in state.message
    assert len(registry.versions(space)) == 1


def test_data_that_are_no_version_are_not_trained_on(space: Workspace):
    with dataset.CellWriter(space.folder / "data/cells", "lab") as writer:
        writer.add(cell(5000, "lab", None, None))
    assert "data is no version yet" in run(retrain, space).message


def test_a_second_run_is_cancelled_and_names_the_first(space: Workspace):
    with space.lock("ingest"):
        state = run(retrain, space)
    assert state.is_cancelled()
    assert "'ingest'" in state.message


def test_what_a_flow_started_ends_with_it(space: Workspace):
    """A retrain that is cancelled leaves no training behind: not what DVC started, nor what that started."""
    ticks = space.folder / "ticks"
    put(
        space.folder / "slow.py",
        "import subprocess; subprocess.run('while true; do echo >>ticks; sleep .1; done', shell=True)",
    )

    def cancel(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, cancel)
    signal.alarm(3)
    try:
        with pytest.raises(KeyboardInterrupt):
            space.run("slow")
    finally:
        signal.signal(signal.SIGALRM, before)
    last = ticks.stat().st_size
    time.sleep(0.5)
    assert 0 < last == ticks.stat().st_size


def test_a_stage_waits_for_another_dvc_command_to_end(space: Workspace):
    from dvc.repo import Repo

    more_data(space)
    with Repo(str(space.folder)) as repo:
        repo.lock.lock()
        held = threading.Timer(4, repo.lock.unlock)
        held.start()
        state = run(retrain, space)
    assert state.is_completed() and not held.is_alive(), state.message


def test_nothing_is_promoted_without_an_approval(space: Workspace, token: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FlowError, match="no gate has compared"):
        approve(space.folder, "v1", "trust me")
    says(space, "v1")
    state = run(promote, space)
    assert state.name == "AwaitingApproval"
    assert "approve v1.0.0" in state.message
    assert not (space.folder / POINTER).exists()

    monkeypatch.setenv("SMEARLINE_TOKEN", tokens.create(space.service / "tokens.yaml", "scanner", ["recognise"]))
    with pytest.raises(TokenError, match="not approve"):
        approve(space.folder, "v1", "looks good")
    monkeypatch.delenv("SMEARLINE_TOKEN")
    with pytest.raises(TokenError, match="SMEARLINE_TOKEN"):
        approve(space.folder, "v1", "looks good")
    monkeypatch.setenv("SMEARLINE_TOKEN", token)
    with pytest.raises(FlowError, match="reason"):
        approve(space.folder, "v1", " ")
    assert run(promote, space).name == "AwaitingApproval"

    approve(space.folder, "v1", "looked at every error")
    assert run(promote, space).name == "Completed"
    assert serving(space) == "v1.0.0"
    (told,) = audit.entries(space.folder, "promote")
    assert (told["approved_by"], told["reason"]) == ("haematologist", "looked at every error")
    (tag,) = [t for t in registry.tags(space) if "#" in t.name]
    assert (tag.name, tag.said["audit"]) == ("smearline#production#1", audit.head(space.folder))
    assert run(promote, space).name == "NothingNew"
    assert len(audit.entries(space.folder, "gate")) == 1
    assert space.git("status", "--porcelain") == ""


def test_what_came_into_production_meanwhile_is_not_replaced(second: Workspace, monkeypatch: pytest.MonkeyPatch):
    more_data(second, 6000)
    run(retrain, second)
    says(second, "v3")
    assert run(promote, second).name == "AwaitingApproval"
    approve(second.folder, "v3", "looks good")

    def and_meanwhile(*given):
        found = approved(*given)
        run(rollback, second, "an alarm, between the look at production and the switch")
        return found

    monkeypatch.setattr("flows.promote.approved", and_meanwhile)
    state = run(promote, second)
    assert state.is_failed() and "v1.0.0 came into production meanwhile" in state.message
    assert serving(second) == "v1.0.0"


def test_a_worse_challenger_is_refused_and_cannot_be_approved(second: Workspace):
    more_data(second, 6000)
    run(retrain, second)
    says(second, "v3", wrong=0.1)
    state = run(promote, second)
    assert (state.name, state.is_failed()) == ("Refused", True)
    result = json.loads((second.folder / "gate/v3.0.0.json").read_text())
    assert not result["passed"]
    assert "lab.accuracy" in [c["metric"] for c in result["checks"] if not c["passed"]]
    with pytest.raises(FlowError, match="cannot be approved"):
        approve(second.folder, "v3", "please")
    path = second.folder / "gate/v3.0.0.json"
    path.write_text(path.read_text().replace("false", "true"))
    with pytest.raises(FlowError, match="not what the gate wrote"):
        approve(second.folder, "v3", "please")
    assert run(promote, second).name == "NothingNew"  # it was refused before
    assert serving(second) == "v2.0.0"


def test_nothing_is_promoted_on_an_audit_log_that_was_changed(second: Workspace):
    log = second.folder / audit.LOG
    log.write_text(log.read_text().replace("looked at every error", "looked at nothing"))
    assert "cannot be trusted" in run(promote, second).message


def test_the_lines_after_the_last_tag_are_guarded_by_git(second: Workspace):
    more_data(second, 6000)
    run(retrain, second)
    says(second, "v3")
    run(promote, second)
    approve(second.folder, "v3", "looked")
    log = second.folder / audit.LOG
    whole = log.read_text()
    for forged in (
        whole.rsplit("\n", 2)[0] + "\n",
        whole.rsplit("haematologist", 1)[0] + "somebody" + whole.rsplit("haematologist", 1)[1],
    ):
        log.write_text(forged)
        assert "cannot be trusted" in run(promote, second).message
        with pytest.raises(FlowError, match="cannot be trusted"):
            approve(second.folder, "v3", "looked")
    log.write_text(whole + '{"time": "2026')  # a writer was killed: nothing is blocked
    assert run(promote, second).name == "Completed"


def test_approvals_that_would_mean_nothing_are_refused(second: Workspace, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FlowError, match="in production already"):
        approve(second.folder, "v2", "again")
    with pytest.raises(FlowError, match="another version than serves now"):
        approve(second.folder, "v1", "again")
    of_one_site = tokens.create(second.service / "tokens.yaml", "of lab", ["approve"], ["lab"])
    monkeypatch.setenv("SMEARLINE_TOKEN", of_one_site)
    assert "every site's" in run(rollback, second, "misses blasts").message


def test_a_candidate_may_not_rest_on_files_that_git_does_not_know(space: Workspace):
    more_data(space)
    put(space.folder / "helper.py", "x = 1")
    assert "uncommitted changes in helper.py" in run(retrain, space).message
    (space.folder / "helper.py").unlink()
    put(space.folder / "curves" / "learning_curve.json", "{}")
    assert "uncommitted changes in curves/learning_curve.json" in run(retrain, space).message
    space.commit("A curve", "curves/learning_curve.json")
    assert "learning_curve.json is no curve of this version" in run(retrain, space).message, (
        "before anything is trained"
    )


def test_a_new_label_of_a_frozen_cell_needs_a_new_approval(space: Workspace, token: str):
    says(space, "v1")
    run(promote, space)
    approve(space.folder, "v1", "looked")
    path = dataset.label_paths(space.folder / "data", "lab")[0]
    table = pd.read_parquet(path)
    table.loc[0, "value"] = "EOS"
    table.to_parquet(path)
    says(space, "v1")
    assert "data is no version yet" in run(promote, space).message
    space.run("dvc", "add", "-q", "data/labels")
    space.commit("a label", "data/labels.dvc")
    assert run(promote, space).name == "AwaitingApproval"


def test_what_is_frozen_stays(second: Workspace):
    more_data(second, 6000)
    run(retrain, second)
    says(second, "v3")
    frozen = second.folder / smears.FROZEN
    pd.read_parquet(frozen).iloc[10:].to_parquet(frozen)
    assert "what is frozen stays" in run(promote, second).message
    second.git("checkout", str(smears.FROZEN))
    dataset.label_paths(second.folder / "data", "second")[0].unlink()
    second.run("dvc", "add", "-q", "data/labels")
    second.commit("labels gone", "data/labels.dvc")
    assert "no frozen cell of second" in run(promote, second).message


def test_a_frozen_file_that_nobody_committed_is_made_anew(space: Workspace):
    says(space, "v1")
    easy = space.folder / smears.FROZEN
    easy.parent.mkdir(exist_ok=True)
    index = dataset.index(space.folder / "data", ["sha256", "site", "patient", "smear"])
    index.head(3).to_parquet(easy)  # picked by hand
    assert run(promote, space).name == "AwaitingApproval"
    assert len(pd.read_parquet(easy)) > 3 and space.git("status", "--porcelain") == ""


def test_a_gate_that_was_cut_off_before_its_commit_is_committed(space: Workspace, monkeypatch: pytest.MonkeyPatch):
    says(space, "v1")
    real = Workspace.commit
    with monkeypatch.context() as patch:
        patch.setattr(
            Workspace, "commit", lambda self, why, *paths: None if why.startswith("Gate") else real(self, why, *paths)
        )
        run(promote, space)
    assert space.git("status", "--porcelain") != ""
    run(promote, space)
    assert space.git("status", "--porcelain") == ""
    assert len(audit.entries(space.folder, "gate")) == 1


def test_what_a_model_says_is_asked_anew_where_counts_or_scales_are_others(
    second: Workspace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(second.folder)
    data, version = Path("data"), registry.find(second, "v1")
    cells, found = smears.frozen(data), list[Path]()

    def asked() -> int:
        """How many different questions there were by now."""
        found.append(smears.kept(second, version, data, cells))
        return len(set(found))

    assert asked() == 1
    row = cells.dropna(subset=["smear"]).iloc[0]
    told = {"site": row["site"], "smear": row["smear"], "parameter": "WBC", "value": 4.0, "raw": "4"}
    dataset.merge_rows(data / "cbc" / "more.parquet", [told], cbc.COUNTS, cbc.KEY)
    assert asked() == 2
    dataset.merge_rows(data / "cbc" / "more.parquet", [told | {"smear": "not frozen"}], cbc.COUNTS, cbc.KEY)
    assert asked() == 2
    real = dataset.index(data, ["sha256", "site", "microns_per_px"])
    monkeypatch.setattr(smears.dataset, "index", lambda *_: real.assign(microns_per_px=None))
    for scale, number in ((0.1, 3), (0.2, 4)):
        site = SimpleNamespace(name="lab", microns_per_px=scale, assumed_microns_per_px=None)
        monkeypatch.setattr(smears.sites, "load", lambda _, site=site: site)
        assert asked() == number


def test_a_fetch_that_was_cut_off_is_made_anew(second: Workspace):
    version = registry.find(second, "v1")
    folder = second.folder / ".smearline" / "packages" / version.package
    shutil.rmtree(folder, ignore_errors=True)
    half = folder.with_suffix(".unfinished")
    half.mkdir(parents=True)
    (half / "lineage.json").write_text("{}")
    found = registry.fetched(second, version, "package")
    assert (found / "recogniser").exists() == (second.folder / "package" / "recogniser").exists()
    assert (
        json.loads((found / "lineage.json").read_text())["version"] == version.package
        and not (found / "package").exists()
    )


@pytest.mark.mission("a rollback goes to what served before")
def test_after_an_older_version_came_back_a_rollback_goes_to_the_one_that_served(monkeypatch: pytest.MonkeyPatch):
    known = [registry.Version(f"v{n}.0.0", f"c{n}", f"p{n}") for n in (1, 2, 3)]
    steps = [(1, "promote"), (2, "promote"), (3, "promote"), (2, "promote")]

    def stack() -> list[str]:
        tags = [
            registry.Tag(f"smearline#production#{i}", f"c{n}", {"package": f"p{n}", "audit": "a", "what": what})
            for i, (n, what) in enumerate(steps, 1)
        ]
        monkeypatch.setattr(registry, "tags", lambda _: tags)
        monkeypatch.setattr(registry, "versions", lambda _: known)
        return [version.name[1] for version in registry.productions(Workspace(Path()))]

    assert stack() == ["1", "2", "3", "2"]
    steps.append((3, "rollback"))
    assert stack() == ["1", "2", "3"]
    steps.append((2, "rollback"))
    assert stack() == ["1", "2"]
    steps += [(3, "promote"), (2, "promote"), (1, "promote"), (2, "rollback")]
    assert stack() == ["1", "2", "3", "2"]


def test_rollback_needs_neither_remote_nor_cache_and_holds(second: Workspace):
    shutil.rmtree(second.folder.parent / "remote")
    shutil.rmtree(second.folder / ".dvc/cache")
    assert "reason" in run(rollback, second).message
    with second.lock("retrain"):  # nobody waits for hours of training to go back
        state = run(rollback, second, "misses blasts")
    assert state.is_completed(), state.message
    assert serving(second) == "v1.0.0"
    told = audit.entries(second.folder)[-1]
    assert (told["what"], told["who"], told["back_from"]) == ("rollback", "haematologist", "v2.0.0")
    assert "no version was in production before" in run(rollback, second, "again").message
    # The approval that v2 had does not bring it back by itself.
    assert run(promote, second).name == "AwaitingApproval"
    assert registry.audit_problems(second) == []


def test_rollback_without_a_token_or_a_bento_is_refused(second: Workspace, monkeypatch: pytest.MonkeyPatch):
    shutil.rmtree(second.folder / ".smearline/bentoml/bentos/smearline" / registry.find(second, "v1").package)
    assert "has no bento" in run(rollback, second, "misses blasts").message
    monkeypatch.delenv("SMEARLINE_TOKEN")
    assert "SMEARLINE_TOKEN" in run(rollback, second, "misses blasts").message
    assert serving(second) == "v2.0.0"


def test_a_switch_that_was_cut_off_is_finished(second: Workspace):
    (second.folder / POINTER).write_text(registry.find(second, "v1").package)
    run(promote, second)
    assert serving(second) == "v2.0.0"


def test_a_rollback_that_was_cut_off_is_finished_and_does_not_go_further(second: Workspace):
    v2 = registry.find(second, "v2").package
    assert run(rollback, second, "misses blasts").is_completed()
    (second.folder / POINTER).write_text(v2)  # as if it had been killed between tag and pointer
    assert "had been cut off, is finished" in run(rollback, second, "misses blasts").message
    assert serving(second) == "v1.0.0"
