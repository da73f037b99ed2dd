"""Stage tune: an Optuna study whose trials are short Ray Train runs, judged on the validation cells.

`tune.trials: 0` writes an empty overlay. The study's journal lies outside DVC's outs and carries its parameters and
data in its name, so a killed search goes on where it stood.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
import pandas as pd
import yaml
from optuna.distributions import FloatDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from pipelines import training
from pipelines.cells import OVERLAY, split_cells
from smearline import reader, settings
from smearline.errors import DataError

TRIALS, PAGE = OVERLAY.with_name("trials.csv"), OVERLAY.with_name("search.html")
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_METRIC = "val_balanced_accuracy"


_SPACE = {
    "lr": FloatDistribution(2e-4, 4e-3, log=True),
    "weight_decay": FloatDistribution(1e-3, 0.1, log=True),
    "stain_jitter": FloatDistribution(0.0, 2.0),
    "balance": FloatDistribution(0.0, 1.0),
}
"""Of the section `train`."""


def search(params: settings.Settings) -> tuple[dict[str, Any], optuna.Study]:
    """The best overlay, and the study.

    The first trial is of params.yaml itself, as far as its values lie in the space. Trials run side by side, `tune.parallel` of
    them with `tune.workers` each, and are pruned at the median of those before them. A search that was killed, or failed, goes on:
    what it was trying is tried again, from its last checkpoint.

    Raises:
        DataError: there are no validation cells to judge a trial by.
    """
    frame, tune = split_cells(params), params.tune
    types = reader.trainable(frame[frame["split"] == "train"])[0]
    if not reader.targets(frame[frame["split"] == "val"], types, {})[0].any():
        raise DataError(
            "a search is judged on validation cells, and none is labelled with a type that is trained: give split.val more than 0"
        )
    name = training.run_name(frame, params)
    training.RUNS.mkdir(parents=True, exist_ok=True)
    parallel = side_by_side(params)
    # Ray is shared by all trials: it starts with room for them.
    training.start_ray(tune.workers * parallel, params.train.threads_per_worker)
    study = optuna.create_study(
        study_name=name,
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(training.RUNS / f"search-{name}.study"))),
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=tune.unpruned, n_warmup_steps=1),
    )
    if not study.trials:
        now = {name: (getattr(params.train, name), space) for name, space in _SPACE.items()}
        study.enqueue_trial({name: value for name, (value, space) in now.items() if space.low <= value <= space.high})

    def again(ended: optuna.trial.FrozenTrial) -> None:
        asked = ended.system_attrs.get("fixed_params", {}) | ended.params
        study.enqueue_trial(asked, user_attrs={"again": ended.number})

    for cut_off in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(cut_off.number, state=TrialState.FAIL)
        again(cut_off)
    lock = threading.Lock()

    def next_trial() -> optuna.Trial | None:
        with lock:
            under_way = study.get_trials(deepcopy=False, states=(*ENDED, TrialState.RUNNING))
            if len(under_way) >= tune.trials:
                return None
            # A search that goes on draws what comes next, not its first draws again.
            study.sampler = optuna.samplers.TPESampler(seed=tune.seed + len(study.trials), constant_liar=parallel > 1)
            trial = study.ask({**_SPACE})
            trial.set_user_attr("overlay", {"train": trial.params})
            return trial

    def work() -> None:
        while (trial := next_trial()) is not None:
            try:
                _run(study, trial, frame, params)
            except Exception:
                study.tell(trial, state=TrialState.FAIL)
                again(study.trials[trial.number])
                raise

    with ThreadPoolExecutor(parallel) as pool:
        for slot in [pool.submit(work) for _ in range(parallel)]:
            slot.result()
    return study.best_trial.user_attrs["overlay"], study


def side_by_side(params: settings.Settings) -> int:
    """`tune.parallel`, or as many trials as this machine has cores for; a cluster's own queue decides there."""
    asked, each = params.tune.parallel, params.tune.workers * params.train.threads_per_worker
    room = max(1, (os.cpu_count() or 1) // each)
    if os.environ.get("RAY_ADDRESS") or asked <= room:
        return asked
    print(
        f"tune.parallel: {room} of {asked} trials at a time, since each takes {each} of {os.cpu_count()} cores",
        flush=True,
    )
    return room


def _run(study: optuna.Study, trial: optuna.Trial, frame: pd.DataFrame, params: settings.Settings) -> None:
    """Train with what the trial suggests, and tell the study."""
    tune = params.tune
    shorter = {"train": {"epochs": tune.epochs, "workers": tune.workers}}
    overlay = settings.overlaid(shorter, trial.user_attrs["overlay"])
    tried = settings.check(settings.overlaid(params.model_dump(mode="json"), overlay), f"trial {trial.number}")

    def hopeless(row: dict[str, float]) -> bool:
        trial.report(row[_METRIC], int(row["epoch"]))
        return row["epoch"] < tune.epochs and trial.should_prune()

    history = training.fit(frame, tried, hopeless, f"trial {trial.number}: ").history
    pruned = len(history) < tune.epochs
    trial.set_user_attr("epochs", len(history))
    trial.set_user_attr("val_accuracy", history[-1].get("val_accuracy"))
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)  # its value is the last that was reported
    else:
        study.tell(trial, history[-1][_METRIC])
    said = f"pruned after {len(history)} epochs, {_METRIC}" if pruned else _METRIC
    print(f"trial {trial.number}: {said} {history[-1][_METRIC]:.4f} with {trial.params}", flush=True)


def table(study: optuna.Study) -> pd.DataFrame:
    """A row a trial that ended or was pruned; what is known of another is left out, since it was tried again."""
    rows = [
        {
            "number": t.number,
            "state": t.state.name.lower(),
            "epochs": t.user_attrs.get("epochs"),
            _METRIC: t.value,
            "val_accuracy": t.user_attrs.get("val_accuracy"),
            **t.params,
        }
        for t in study.get_trials(states=ENDED)
    ]
    return pd.DataFrame(rows, columns=None if rows else ["number", "state", "epochs", _METRIC])


def page(study: optuna.Study) -> str:
    """Optuna's plots on one page that loads nothing from outside."""
    plots = [optuna.visualization.plot_optimization_history, optuna.visualization.plot_intermediate_values]
    done = study.get_trials(states=(TrialState.COMPLETE,))
    if len(done) > 1 and len({t.value for t in done}) > 1:
        plots += [optuna.visualization.plot_param_importances, optuna.visualization.plot_slice]
    figures = [plot(study).to_html(full_html=False, include_plotlyjs=number == 0) for number, plot in enumerate(plots)]
    return f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Search</title><body>{"".join(figures)}</body></html>'


def main() -> None:
    params = settings.load()
    OVERLAY.parent.mkdir(exist_ok=True)
    if params.tune.trials:
        overlay, study = search(params)
        trials, shown = table(study), page(study)
    else:
        overlay, trials, shown = {}, pd.DataFrame(columns=["number", "state", "epochs", _METRIC]), "<p>no trials</p>"
    OVERLAY.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    trials.to_csv(TRIALS, index=False)
    PAGE.write_text(shown, encoding="utf-8")
    print(f"{len(trials)} trials; overlay: {overlay or 'empty'}")


if __name__ == "__main__":
    main()
