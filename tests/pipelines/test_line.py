"""The whole line in a small workspace: DVC, Ray, a second clone, an experiment, a killed worker."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import psutil
import pytest
import torch
import yaml
from conftest import CHECKOUT, put
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from flows.workspace import environment
from pipelines import adapt, calibrate, learning_curve, new_site, train_cells, training, tune
from pipelines import cells as of_workspace
from smearline import (
    confidence,
    curves,
    dataset,
    importing,
    recogniser,
    recognition,
    settings,
    simulator,
    sites,
    sources,
    splits,
)
from smearline.errors import DataError, ModelError, SettingsError
from smearline.initial_weights import save_weights

pytestmark = pytest.mark.slow
SMALL = {
    "image": {"size_px": 32},
    "model": {"weights": "none"},
    "train": {"epochs": 2, "batch_size": 16, "workers": 1},
    "split": {"val": 0.2, "test": 0.3},
}


def shell(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def dvc(folder: Path, *arguments: str) -> str:
    return shell(folder, sys.executable, "-m", "dvc", *arguments)


def metrics(folder: Path) -> bytes:
    return (folder / "evaluation" / "metrics.json").read_bytes()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated data set, imported."""
    raw, into = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("data") / "data"
    laboratories = [sites.load(n, CHECKOUT / "sites") for n in ("sim_north", "sim_south")]
    simulator.simulate(raw, sites=laboratories, seed=3, num_patients=8, cells_per_smear=24)
    for site in laboratories:
        importing.import_source(sources.load("folder"), raw / site.name, site, into)
    return into


@pytest.fixture(scope="session")
def workspace(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the checkout's last commit with the tree's files, its own data, and one run of the pipeline."""
    folder = tmp_path_factory.mktemp("workspace") / "first"
    shell(CHECKOUT, "git", "clone", "-q", str(CHECKOUT), str(folder))
    tracked = shell(CHECKOUT, "git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in tracked:
        if (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, folder / name)
    shell(folder, "git", "config", "user.name", "test")
    shell(folder, "git", "config", "user.email", "test@localhost")
    shutil.copytree(data, folder / "data", dirs_exist_ok=True)
    base = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    (folder / "params.yaml").write_text(yaml.safe_dump(settings.overlaid(base, SMALL)), encoding="utf-8")
    dvc(folder, "remote", "add", "--local", "-d", "local", str(folder.parent / "remote"))
    dvc(folder, "add", "data/cells", "data/labels", "data/cbc", "data/quarantine.parquet")
    dvc(folder, "repro")
    shell(folder, "git", "add", "-A")
    shell(folder, "git", "commit", "-q", "-m", "a run")
    dvc(folder, "push", "-q")
    return folder


@pytest.fixture(scope="session")
def second(workspace: Path) -> Path:
    """A second clone that has pulled."""
    folder = workspace.parent / "second"
    shell(workspace.parent, "git", "clone", "-q", str(workspace), str(folder))
    shell(folder, "git", "config", "user.name", "test")
    shell(folder, "git", "config", "user.email", "test@localhost")
    dvc(folder, "remote", "add", "--local", "-f", "-d", "local", str(workspace.parent / "remote"))
    dvc(folder, "pull", "-q")
    return folder


@pytest.fixture
def frame(data: Path) -> pd.DataFrame:
    """Labelled, split and scaled cells for calling `training.fit` directly."""
    cells = dataset.labelled_index(data)
    cells["thumbnail"] = dataset.index(data, ["thumbnail"])["thumbnail"]
    cells["split"] = splits.assign(cells, seed=1, val=0.2, test=0.2)["split"]
    return cells.drop(columns="thumbnail").assign(scale=cells["microns_per_px"])


def parameters(**train) -> settings.Settings:
    base = yaml.safe_load((CHECKOUT / "params.yaml").read_text(encoding="utf-8"))
    return settings.check(settings.overlaid(settings.overlaid(base, SMALL), {"train": train}), "test")


@pytest.mark.mission("the pipeline makes every declared output and leaves nothing else behind")
def test_the_pipeline_makes_what_it_declares(workspace: Path):
    assert shell(workspace, "git", "status", "--porcelain") == ""
    lineage = json.loads((workspace / "package" / "lineage.json").read_text(encoding="utf-8"))
    assert lineage["onnx_max_difference"] <= 1e-3
    assert set(lineage["data"]["dvc"]) == {"cells", "labels", "cbc", "quarantine.parquet"}
    assert lineage["origin"] == "simulated"
    differentials = pd.read_parquet(workspace / "differentials.parquet")
    assert len(differentials) == 16
    shares = differentials[[c for c in differentials if c.startswith("share_")]]
    np.testing.assert_allclose(shares.sum(axis=1)[differentials["num_counted"] > 0], 1.0)
    assert not list((workspace / ".smearline" / "runs").glob("*/checkpoint*")), (
        "a run that has ended leaves no checkpoint"
    )


@pytest.mark.mission("a second clone reproduces the result")
def test_the_package_is_asked_about_frozen_cells_by_the_flows_own_command(workspace: Path, tmp_path: Path):
    test = pd.read_parquet(workspace / "splits.parquet").query("split == 'test'")
    test[["sha256"]].iloc[:20].to_parquet(tmp_path / "frozen.parquet")
    out = tmp_path / "out"
    shell(workspace, "python", "-m", "flows.smears", "package", "data", str(tmp_path / "frozen.parquet"), str(out))
    named = pd.read_parquet(out / "cells.parquet").set_index("sha256")["predicted_type"]
    judged = pd.read_parquet(workspace / "evaluation/predictions.parquet").set_index("sha256")["predicted_type"]
    assert len(named) == 20 and (named == judged[named.index]).all()
    # Of so few patients no diagnosis is learned: then the package says none, and neither does this.
    assert (out / "smears.parquet").exists() == (workspace / "package" / "diagnosis").is_dir()


@pytest.mark.mission("no answer rules out what it says, nor what it calls a possible blast")
def test_sets_hold_the_name_and_every_possible_blast(workspace: Path):
    limits = recognition.RecognitionModel(workspace / "package/recogniser").card.confidence
    found = pd.read_parquet(workspace / "evaluation/predictions.parquet")
    assert limits is not None
    if limits.blast_from is not None:  # so short a training may reach no PPV
        possible = found["type_set"][found["p_BLAST"] >= limits.blast_from]
        assert possible.str.split().map(lambda said: "BLAST" in said).all()
    assert all(c in s.split() for c, s in zip(found["predicted_type"], found["type_set"], strict=True))


def test_a_second_clone_has_nothing_to_do(second: Path):
    assert "Running stage" not in dvc(second, "repro")
    assert dvc(second, "metrics", "diff").strip() == ""


@pytest.mark.mission("a forced run gives the same metrics byte for byte")
def test_a_forced_run_gives_the_same_bytes(workspace: Path, second: Path):
    dvc(second, "repro", "--force", "--no-run-cache", "evaluate_cells")
    assert metrics(second) == metrics(workspace)
    assert (second / "models/recogniser.safetensors").read_bytes() == (
        workspace / "models/recogniser.safetensors"
    ).read_bytes()


@pytest.mark.mission("experiments, metrics and plots by DVC")
def test_an_experiment_shows_what_it_changed(workspace: Path, second: Path):
    shell(second, "git", "checkout", "-q", ".")
    dvc(second, "checkout", "-q")
    dvc(second, "exp", "run", "-q", "-S", "train.lr=0.004", "evaluate_cells")
    shown = dvc(second, "exp", "show", "--json")
    assert "0.004" in shown
    assert metrics(second) != metrics(workspace)
    assert "evaluation/headline.json" in dvc(second, "metrics", "diff").replace("\\", "/")
    dvc(second, "plots", "show", "-o", "plots")
    assert "confusion" in (second / "plots" / "index.html").read_text(encoding="utf-8")


@pytest.mark.mission("a killed training worker costs at most what came since the last checkpoints")
@pytest.mark.parametrize(
    ("steps", "epochs", "resumed_as"),
    [(0, 6, r"resumed after epoch \d$"), (2, 2, r"resumed after epoch \d and \d+ batches")],
)
def test_a_killed_worker_costs_little(
    steps: int,
    epochs: int,
    resumed_as: str,
    frame: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    params = parameters(epochs=epochs, workers=2, checkpoint_steps=steps)
    killed: list[int] = []

    def may_die() -> bool:
        """Two epochs are done, so that the first is surely registered; or a checkpoint within an epoch lies there."""
        if not steps:
            return any("epoch 2/6" in p.read_text() for p in (tmp_path / training.RUNS).glob("*.progress"))
        for state in (tmp_path / training.RUNS).glob("*/checkpoint_*/state.pt"):
            with contextlib.suppress(Exception):  # half written, or removed meanwhile
                return len(torch.load(state, weights_only=True)["losses"]) > steps  # the first is surely registered
        return False

    def kill_a_worker() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not killed:
            time.sleep(0.1)
            if may_die():
                for process in psutil.Process().children(recursive=True):  # of this test's Ray alone
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    result = training.fit(frame, params)
    killer.join()
    assert killed, "no worker was running when a checkpoint was there"
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(resumed_as, line) for line in lines), "\n".join(lines)
    assert [row["epoch"] for row in result.history] == list(range(1, epochs + 1))
    trained = [line.split(":")[0] for line in lines if line.startswith("epoch ")]
    assert len(trained) <= epochs + 1, "at most one epoch was trained twice"
    undisturbed = training.fit(frame, params)
    assert result.history == undisturbed.history, "a run that was resumed is the run that it would have been"
    assert all(torch.equal(tensor, undisturbed.state[name]) for name, tensor in result.state.items())


def test_a_run_of_another_vocabulary_is_another_run(
    frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name, real = training.run_name(frame, parameters()), training.files
    words = shutil.copytree(str(real("smearline.vocabulary")), tmp_path / "vocabulary")
    monkeypatch.setattr(training, "files", lambda _: words)
    assert training.run_name(frame, parameters()) == name
    put(words / "types.yaml", (words / "types.yaml").read_text(encoding="utf-8") + "\n")
    assert training.run_name(frame, parameters()) != name


@pytest.mark.mission("a batch cut into parts gives the step of the whole")
def test_parts_of_a_batch_add_up(frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    whole, parts = (training.fit(frame, parameters(epochs=1, **given)).history[0] for given in ({}, {"accumulate": 4}))
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-3)
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=5e-3)


@pytest.mark.mission("the result does not hang on the number of workers")
def test_one_worker_and_two_draw_the_same_loss_curve(
    frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    # Steps so small that noise in the last digit does not grow as fast as the network learns.
    one, two = (training.fit(frame, parameters(workers=n, lr=2e-4)).history for n in (1, 2))
    # The same cells, the same random numbers, the same divisors: what is left is the order of sums.
    assert one[-1]["val_loss"] == pytest.approx(two[-1]["val_loss"], rel=0.01)
    assert one[0]["val_loss"] == pytest.approx(two[0]["val_loss"], rel=0.001)
    assert one[0]["train_loss"] == pytest.approx(two[0]["train_loss"], rel=0.001), "the loss of the whole batch"


@pytest.mark.mission("a search runs its trials side by side, prunes, and goes on after a kill")
def test_a_search_goes_on_where_it_stood(
    frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "split_cells", lambda _: frame)
    base = parameters().model_dump(mode="json")  # the first trial's training is named as the study is
    search = lambda trials, **more: tune.search(  # noqa: E731
        settings.check(
            settings.overlaid(base, {"tune": {"trials": trials, "epochs": 2, "unpruned": 1, **more}}), "test"
        )
    )
    first = tune.table(search(2)[1])
    assert first["number"].tolist() == [0, 1]
    journal = next((tmp_path / training.RUNS).glob("*.study"))
    study = optuna.load_study(
        study_name=journal.stem.removeprefix("search-"), storage=JournalStorage(JournalFileBackend(str(journal)))
    )
    cut_off = study.ask(
        {"lr": optuna.distributions.FloatDistribution(2e-4, 4e-3, log=True)}
    )  # as a killed search leaves it
    overlay, study = search(4)
    trials = tune.table(study)
    assert len(trials) == 4 and trials["lr"].tolist()[:2] == first["lr"].tolist(), "the first two were not run again"
    again = [t for t in study.trials if t.user_attrs.get("again") == cut_off.number]
    assert [t.params["lr"] for t in again] == [cut_off.params["lr"]]
    assert study.trials[cut_off.number].state.name == "FAIL"
    assert set(overlay["train"]) == set(tune._SPACE)
    assert {name: base["train"][name] for name in tune._SPACE} == study.trials[0].params, "first what is in force"
    done = trials[trials["state"] == "complete"]
    best = done.loc[done["val_balanced_accuracy"] == done["val_balanced_accuracy"].max(), "lr"]
    assert any(overlay["train"]["lr"] == pytest.approx(lr) for lr in best)
    shown = tune.page(study)
    assert "Optimization History" in shown and "<script src=" not in shown
    assert "trial 0: epoch 1/2" in capsys.readouterr().out


def test_no_more_trials_run_at_a_time_than_the_machine_has_cores_for(monkeypatch: pytest.MonkeyPatch):
    given = {"tune": {"parallel": 8, "workers": 2}, "train": {"threads_per_worker": 1}}
    params = settings.check(settings.overlaid(parameters().model_dump(mode="json"), given), "test")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for cores, at_once in ((1, 1), (2, 1), (6, 3), (64, 8)):
        monkeypatch.setattr(tune.os, "cpu_count", lambda cores=cores: cores)
        assert tune.side_by_side(params) == at_once
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(tune.os, "cpu_count", lambda: 1)
    assert tune.side_by_side(params) == 8


@pytest.mark.mission("hopeless trials are pruned, and the best is of those that went to their end")
def test_a_search_prunes_below_the_median(frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "split_cells", lambda _: frame)
    monkeypatch.setattr(training, "start_ray", lambda *_: None)

    def drawn(_: pd.DataFrame, tried: settings.Settings, stop, label: str) -> training.Trained:
        """A run whose figure at every epoch hangs on its learning rate alone."""
        history: list[dict[str, float]] = []
        for epoch in range(1, tried.train.epochs + 1):
            history.append({"epoch": float(epoch), "val_balanced_accuracy": tried.train.lr * epoch})
            if stop(history[-1]):
                break
        return training.Trained({}, history)

    monkeypatch.setattr(training, "fit", drawn)
    base = parameters(epochs=1).model_dump(mode="json")
    given = {"tune": {"trials": 12, "epochs": 5, "unpruned": 3, "parallel": 1}}
    overlay, study = tune.search(settings.check(settings.overlaid(base, given), "test"))
    trials = tune.table(study)
    assert len(trials) == 12 and set(trials["state"]) == {"complete", "pruned"}
    assert (trials["epochs"] == 5).equals(trials["state"] == "complete")
    assert overlay["train"]["lr"] == pytest.approx(trials["lr"].max())


def test_where_no_validation_cell_can_judge_nothing_is_trained(
    frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their labels are of a type that no training cell has."""
    monkeypatch.chdir(tmp_path)
    frame = frame[(frame["split"] == "val") | (frame["true_type"] != "BLAST")]
    given = frame.assign(true_type=frame["true_type"].where(frame["split"] != "val", "BLAST"))
    given.loc[given.index[given["split"] == "val"][0], "true_type"] = float("nan")  # as an image without a label has it
    for module in (tune, learning_curve):
        monkeypatch.setattr(module, "split_cells", lambda _: given)
    monkeypatch.setattr(learning_curve, "in_force", lambda: parameters(epochs=1))
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(DataError, match="a search is judged on validation cells"):
        tune.search(parameters(epochs=1))
    with pytest.raises(DataError, match="a curve is judged on validation cells"):
        learning_curve.learning_curve(tmp_path / "curve", [0.5, 1.0], 1, 1)


def test_a_trial_that_failed_is_tried_again(frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried: list[float] = []

    def fit(frame: pd.DataFrame, params: settings.Settings, *_: object) -> training.Trained:
        tried.append(params.train.lr)
        if len(tried) == 1:
            raise OSError("the disk is full")
        return training.Trained({}, [{"epoch": float(e + 1), tune._METRIC: 0.5} for e in range(params.tune.epochs)])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "split_cells", lambda _: frame)
    monkeypatch.setattr(training, "start_ray", lambda *_: None)
    monkeypatch.setattr(training, "fit", fit)
    given = settings.check(
        settings.overlaid(parameters().model_dump(mode="json"), {"tune": {"trials": 2, "parallel": 1}}), "test"
    )
    with pytest.raises(OSError, match="the disk is full"):
        tune.search(given)
    tune.search(given)
    assert tried[:2] == [given.train.lr] * 2 and len(tried) == 3, "params.yaml's own values are the first to be judged"


def test_what_cannot_be_trained_is_said_before_a_worker_starts(
    frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "start_ray", lambda *_: None)
    monkeypatch.setattr(training.ray, "cluster_resources", lambda: {"CPU": 2.0})
    base = parameters(workers=1).model_dump(mode="json")
    for section, change, error, why in (
        ("model", {"backbone": "resnet_eighteen"}, ModelError, "timm makes no 'resnet_eighteen'"),
        ("model", {"weights": "gone.pth"}, ModelError, r"no file gone\.pth"),
        ("train", {"gpus_per_worker": 1}, SettingsError, "1 GPUs are asked for in all, and Ray sees 0"),
    ):
        with pytest.raises(error, match=why):
            training.fit(frame, settings.check(settings.overlaid(base, {section: change}), "test"))
    with pytest.raises(SettingsError, match="2 workers cannot share a GPU"):
        settings.check(settings.overlaid(base, {"train": {"workers": 2, "gpus_per_worker": 0.5}}), "test")
    with pytest.raises(SettingsError, match=r"train\.seed"):
        settings.check(settings.overlaid(base, {"train": {"seed": -1}}), "test")


def test_what_the_first_weights_were_trained_on_is_no_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "first.safetensors").touch()
    assert train_cells.seen_before(str(tmp_path / "first.safetensors")) == []
    assert "are judged as new ones" in capsys.readouterr().out
    (tmp_path / "first").mkdir()
    pd.DataFrame({"sha256": ["a"]}).to_parquet(tmp_path / "first" / recognition.SEEN_FILE)
    [seen] = train_cells.seen_before(str(tmp_path / "first.safetensors"))
    assert seen["sha256"].tolist() == ["a"] and train_cells.seen_before("none") == []


def test_a_run_ends_where_it_is_told_to(frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    asked: list[float] = []

    def after_two(row: dict[str, float]) -> bool:
        asked.append(row["epoch"])
        return row["epoch"] >= 2

    history = training.fit(frame, parameters(epochs=40, workers=2), after_two).history
    assert 2 <= len(history) < 40 and asked[0] == 1
    assert not list((tmp_path / training.RUNS).glob("*.*")), "a run that has ended leaves nothing behind"


def _made_of(workspace: Path) -> tuple:
    card = recognition.RecognitionModel(workspace / "models/recogniser").card
    made = card.parameters["model"]
    return made["backbone"], card.types, card.characteristics, made["embedding_dim"], card.size_px


@pytest.mark.mission("a recogniser is adapted to a new site by a few cells that the platform chooses")
def test_a_recogniser_is_adapted_by_the_flow_with_cells_that_it_chose(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site, cells, out = sites.load("sim_east", CHECKOUT / "sites"), tmp_path / "new", tmp_path / "adapted"
    simulator.simulate(tmp_path / "raw", sites=[site], seed=8, num_patients=12, cells_per_smear=12)
    importing.import_source(sources.load("folder"), tmp_path / "raw" / "sim_east", site, cells)
    before = sorted(p.name for p in (workspace / "models").iterdir())
    shell(workspace, sys.executable, "-m", "flows", "adapt", str(cells), str(out), "--budget", "12")
    assert sorted(p.name for p in (workspace / "models").iterdir()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapted", "adapted.safetensors", "new", "raw"]
    report = json.loads((out / "adaptation.json").read_text(encoding="utf-8"))
    assert report["labelled"] == sum(report["chosen"].values()) == 12
    index = dataset.labelled_index(cells)
    model = recognition.RecognitionModel(out)
    chosen = index[index["sha256"].isin(model.seen["sha256"])]
    assert len(chosen) == 12 and set(model.card.sites) == {"sim_north", "sim_south", "sim_east"}
    first = recognition.RecognitionModel(workspace / "models/recogniser").seen
    assert set(first["sha256"]) <= set(model.seen["sha256"]), "what the first one saw, it has seen too"
    judges = report["new_site"]["after"]
    assert 0 < judges["patients"] < 8 and judges["cells"] == 12 * judges["patients"]
    others = index[~index["patient"].isin(set(chosen["patient"]))]
    assert others["patient"].nunique() >= judges["patients"]
    assert report["home_validation_cells"]["before"]["cells"] == report["home_validation_cells"]["after"]["cells"] > 0

    labels = cells / "labels"
    shutil.move(labels, tmp_path / "kept")
    labels.mkdir()
    monkeypatch.chdir(workspace)
    own = settings.load()
    drawn_otherwise = own.model_copy(update={"adapt": own.adapt.model_copy(update={"seed": 8})})
    with monkeypatch.context() as patched, pytest.raises(DataError, match="are home's test"):
        patched.setattr(new_site.settings, "load", lambda: drawn_otherwise)
        adapt.adapt(Path("models/recogniser"), Path("data"), [5], tmp_path / "home")
    with pytest.raises(DataError, match="is a recogniser: several budgets"):
        adapt.adapt(Path("models/recogniser"), cells, [5, 9], workspace / "models" / "recogniser")
    # Without any label, only the site's mix of types is learned.
    unlabelled = adapt.adapt(Path("models/recogniser"), cells, [0], tmp_path / "mixed")[0]
    mixed = recognition.RecognitionModel(tmp_path / "mixed").card.confidence
    assert mixed is not None and set(mixed.offsets) == {"sim_north", "sim_south", "sim_east"}
    assert sum(unlabelled["estimated_mix"]["sim_east"].values()) == pytest.approx(1, abs=1e-3)
    assert unlabelled["limits_learned_without"] == ["sim_east"]
    with pytest.raises(ModelError, match="adapted recogniser"):
        adapt.adapt(tmp_path / "mixed", cells, [0], tmp_path / "again")
    with pytest.raises(DataError, match="no adapted recogniser"):
        adapt.adapt(Path("models/recogniser"), cells, [0], Path("models/recogniser"))
    other = recogniser.Recogniser(*_made_of(workspace))
    save_weights(other, tmp_path / "untaught.safetensors")
    with pytest.raises(ModelError, match="not the weights of"):
        adapt.adapt(Path("models/recogniser"), cells, [0], tmp_path / "again", tmp_path / "untaught.safetensors")
    few = new_site.NewSite(Path("models/recogniser"), cells, None, [0])
    moved = pd.read_parquet("splits.parquet")
    moved["split"] = moved["split"].replace({"train": "val", "val": "train"})
    moved.to_parquet(tmp_path / "moved.parquet")
    with monkeypatch.context() as other_splits, pytest.raises(DataError, match="splits the cells otherwise"):
        other_splits.setattr(of_workspace, "SPLITS", tmp_path / "moved.parquet")
        new_site.NewSite(Path("models/recogniser"), cells, None, [0])
    put(tmp_path / "again.safetensors", "weights of something else")
    with pytest.raises(DataError, match=r"again\.safetensors is there already"):
        adapt.adapt(Path("models/recogniser"), cells, [0], tmp_path / "again")
    (tmp_path / "again.safetensors").unlink()
    few.candidates = set(sorted(few.candidates)[: confidence.LEAST_OF_SITE - 1])
    with pytest.raises(DataError, match="no mix of types can be estimated"):
        few.refuse_mix_alone()
    network = (tmp_path / "mixed" / recognition.ONNX_FILE).read_bytes()
    assert network == (workspace / "models/recogniser" / recognition.ONNX_FILE).read_bytes()
    given = [
        "adapt",
        "--model",
        "models/recogniser",
        "--cells",
        str(cells),
        "--budget",
        "12",
        "--out",
        str(tmp_path / "other"),
    ]
    command = [sys.executable, "-m", "smearline.cli", *given]
    refused = subprocess.run(command, cwd=workspace, env=environment(), capture_output=True, text=True)
    assert refused.returncode == 2 and "12 of the 12 cells" in refused.stderr
    table = tmp_path / "other.to-label-sim_east.csv"
    listed = pd.read_csv(table, dtype=str, keep_default_na=False)
    assert set(listed["sha256"]) == set(chosen["sha256"]), "the same cells are chosen, labelled or not"
    assert set(pd.read_csv(tmp_path / "other.suggested.csv")["sha256"]) == set(listed["sha256"])
    free = sorted(set(dataset.index(cells, ["sha256"])["sha256"]) - set(listed["sha256"]))[0]
    begun = listed.assign(type=["BLAST"] + [""] * 11)  # asked again after more cells came
    pd.concat([begun, pd.DataFrame({"sha256": [free], "type": ["LYMPH"]})]).to_csv(table, index=False)
    simulator.simulate(tmp_path / "more", sites=[site], seed=9, num_patients=2, cells_per_smear=12)
    importing.import_source(sources.load("folder"), tmp_path / "more" / "sim_east", site, cells)
    assert subprocess.run(command, cwd=workspace, env=environment(), capture_output=True).returncode == 2
    again = pd.read_csv(table, dtype=str, keep_default_na=False)
    assert set(again["sha256"]) == {free, *listed["sha256"]}, "cells that came since change nothing"
    filled = {listed["sha256"][0]: "BLAST", free: "LYMPH"}
    assert again.set_index("sha256")["type"].to_dict() == dict.fromkeys(listed["sha256"], "") | filled, (
        "nothing is lost"
    )
    table.write_text(table.read_text().replace(",", ";"))
    odd = subprocess.run(command, cwd=workspace, env=environment(), capture_output=True, text=True)
    assert odd.returncode == 2 and "no column sha256 nor type" in odd.stderr
    listed.assign(type=chosen.set_index("sha256")["true_type"][listed["sha256"]].to_numpy()).to_csv(table, index=False)
    given = ["label", str(table), "--site", "sim_east", "--by", "expert", "--supersede", "--data", str(cells)]
    assert "12 labels taken" in shell(workspace, sys.executable, "-m", "smearline.cli", *given)


@pytest.mark.mission("each part of a learning curve takes the steps of the whole")
@pytest.mark.parametrize(("whole", "part"), [(1080, 240), (1080, 324), (1080, 636), (90, 50), (1080, 1080)])
def test_a_part_takes_the_steps_of_the_whole(whole: int, part: int):
    steps, own = 4 * max(1, whole // 64), max(1, part // 64)
    assert abs(learning_curve.as_long(4, whole, part, 64) * own - steps) <= own / 2


def test_the_sentence_of_a_curve_is_of_all_seeds():
    points = [{"share": s, "cells": 100 * s, "val_accuracy": a} for s, a in ((0.5, 0.2), (1, 0.9), (1, 0.7))]
    told = {"points": points, "expected": {"val_accuracy": None}}
    assert "wrong 20.0% with all" in learning_curve.sentence(told, "val_accuracy", "all cells")
    told["points"] = [{**point, "share": point["share"] / 4} for point in points]
    assert "wrong 20.0% with 25.0% of the patients" in learning_curve.sentence(told, "val_accuracy", "all cells")


@pytest.mark.mission("what so many labels of a new site bring is shown as a curve")
def test_the_curve_of_an_adaptation_begins_with_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    class Site:
        model = SimpleNamespace(recipe="d", card=SimpleNamespace(sites=("home",)))
        index = pd.DataFrame({"site": ["home", "new"]})
        labelled = frozenset(str(i) for i in range(100))

        def __init__(self, *_: object) -> None: ...

        def chosen(self, budgets: list[int], _: Path) -> dict[int, pd.DataFrame]:
            cell = {"true_type": "BLAST", "conflicted": False}
            return {b: pd.DataFrame({"sha256": [str(i) for i in range(b)], **cell}) for b in sorted(budgets)}

    def made(_: object, budget: int, chosen: pd.DataFrame, out: Path) -> dict:
        """A report whose figures hang on the budget alone."""
        before, there, home = (
            {"cells": 9, "patients": 2, "accuracy": a, "balanced_accuracy": a, "named": 1.0}
            for a in (0.4, 0.5 + len(chosen) / 1000, 0.9)
        )
        out.mkdir(parents=True)
        report = {"before": before, "after": there}
        return {"labelled": len(chosen), "new_site": report, "home_validation_cells": {"before": home, "after": home}}

    monkeypatch.setattr(adapt, "NewSite", Site)
    monkeypatch.setattr(adapt, "_adapt", made)
    adapt.adapt(Path("m"), Path("c"), [100, 0, 20], tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "adaptation_curve.csv")
    there = table[table["where"] == "the new site"]
    assert there["model"].tolist() == ["as it was", "adapted", "adapted", "adapted"]
    assert there["labels"].tolist() == [0, 0, 20, 100] and there["accuracy"].tolist() == [0.4, 0.5, 0.52, 0.6]
    assert curves.read(Path("curves"))["adaptation"]["new-out"]["rows"] == table.to_dict("records")


@pytest.mark.mission("probabilities go from the mix that was drawn towards the site's own")
def test_offsets_go_from_what_was_drawn_towards_the_sites_own_mix():
    kinds = ["LYMPH"] * 400 + ["MONO"] * 100 + ["BASO"]
    cells = pd.DataFrame({"site": "lab", "true_type": kinds})
    types = ("BASO", "BLAST", "LYMPH", "MONO")
    given = parameters(balance=0.5)
    part = given.confidence.natural_mix
    own = np.array(calibrate.offsets(cells, types, given)["lab"])
    expected = part * np.log([5, 400, 100]) / 2  # drawn by the root; fewer than five count as five
    np.testing.assert_allclose(np.diff(own[[0, 2, 3]]), np.diff(expected), atol=1e-5)
    assert own[1] == own.max(), "what the site never had is beside no other type less probable"
    by_parents = cells.assign(true_type=["NEUT"] * 300 + kinds[300:])
    assert calibrate.offsets(by_parents, types, given) == {}, "which of a parent's children they are is not known"


def test_what_is_chosen_is_spread_over_what_is_seen_and_no_cell_is_chosen_twice():
    random = np.random.default_rng(0)
    spots = np.repeat(np.arange(5), [400, 100, 20, 5, 1])
    vectors = (np.eye(5, 8)[spots] * 50 + random.normal(0, 1, (len(spots), 8))).astype(np.float32)
    picked = new_site.choose(vectors, 31, seed=1)
    assert len(set(picked)) == 31 and picked == new_site.choose(vectors, 31, seed=1)
    assert set(spots[picked]) == {0, 1, 2, 3, 4}, "what is rare is not left out"
    assert picked == new_site.choose(vectors * random.uniform(0.5, 2, (len(spots), 1)).astype(np.float32), 31, seed=1)
    assert new_site.choose(vectors, 9999, seed=1) == list(range(len(vectors)))
    assert len(set(new_site.choose(np.ones((9, 3), np.float32), 4, seed=1))) == 4


@pytest.mark.mission("a learning curve says what more data would bring, and nothing where the error does not fall")
def test_a_learning_curve(workspace: Path, tmp_path: Path):
    given = ["--out", str(tmp_path / "curve"), "--epochs", "1", "--share", "0.4", "--share", "1"]
    said = shell(workspace, sys.executable, "-m", "smearline.cli", "learning-curve", *given)
    told = json.loads((tmp_path / "curve" / "learning_curve.json").read_text(encoding="utf-8"))
    part, whole = told["points"]
    assert 0 < part["cells"] < whole["cells"] and 0 < part["patients"] < whole["patients"]
    split = pd.read_parquet(workspace / "splits.parquet")["split"]
    assert whole["cells"] == (split == "train").sum() and told["validation_cells"] == (split == "val").sum()
    left = workspace / "curves" / "learning_curve.json"
    assert json.loads(left.read_text(encoding="utf-8")) == told
    left.unlink()  # of a workspace that other tests use
    page = (tmp_path / "curve" / "learning_curve.html").read_text(encoding="utf-8")
    assert "<script src=" not in page and "all cells: wrong" in page and "all cells: wrong" in said


def test_what_is_expected_of_more_data_is_the_power_law():
    cells = np.array([100, 200, 400, 800])
    table = pd.DataFrame({"share": cells / 800, "cells": cells, "val_accuracy": 1 - 2 * cells**-0.5})
    found = learning_curve.expected(table, "val_accuracy")
    assert found is not None and found["exponent"] == pytest.approx(0.5)
    assert found["error_at_times_the_cells"]["4"] == pytest.approx(2 * 3200**-0.5)
    assert learning_curve.expected(table.assign(val_accuracy=0.5 - cells / 9000), "val_accuracy") is None
