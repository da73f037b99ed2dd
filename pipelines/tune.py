"""Stage tune: an Optuna study whose trials are short Ray Train runs, judged on the validation cells.

`tune.trials: 0` writes an empty overlay. The study's journal lies outside DVC's outs and carries its parameters and
data in its name, so a killed search goes on where it stood.
"""

from __future__ import annotations

from typing import Any

import optuna
import pandas as pd
import yaml
from optuna.storages.journal import JournalFileBackend

from pipelines import training
from pipelines.cells import OVERLAY, split_cells
from smearline import settings
from smearline.errors import DataError

TRIALS = OVERLAY.with_name("trials.csv")
_METRIC = "val_balanced_accuracy"


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    """One overlay of params.yaml."""
    return {
        "train": {
            "lr": trial.suggest_float("lr", 2e-4, 4e-3, log=True),
            "weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.1, log=True),
            "stain_jitter": trial.suggest_float("stain_jitter", 0.3, 2.0),
            "balance": trial.suggest_float("balance", 0.2, 0.8),
        }
    }


def search(params: settings.Settings) -> tuple[dict[str, Any], pd.DataFrame]:
    """The best overlay and a row a trial."""
    frame = split_cells(params)
    if not (frame["split"] == "val").any():
        raise DataError("a search is judged on validation cells, and there are none: give split.val more than 0")
    name = training.run_name(frame, params)
    training.RUNS.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=name,
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(training.RUNS / f"{name}.study"))),
        direction="maximize",
        load_if_exists=True,
    )
    ended = (optuna.trial.TrialState.COMPLETE,)
    while len(study.get_trials(states=ended)) < params.tune.trials:
        # A search that goes on draws what comes next, not its first draws again.
        study.sampler = optuna.samplers.TPESampler(seed=params.tune.seed + len(study.trials))
        trial = study.ask()
        overlay = suggest(trial)
        tried = settings.overlaid(
            params.model_dump(mode="json"), settings.overlaid({"train": {"epochs": params.tune.epochs}}, overlay)
        )
        result = training.fit(frame, settings.check(tried, f"trial {trial.number}"))
        study.tell(trial, result.history[-1][_METRIC])
        print(f"trial {trial.number}: {_METRIC} {result.history[-1][_METRIC]:.4f} with {trial.params}", flush=True)
    best = study.best_trial
    rows = [{"number": t.number, _METRIC: t.value, **t.params} for t in study.get_trials(states=ended)]
    return suggest(optuna.trial.FixedTrial(best.params)), pd.DataFrame(rows)  # type: ignore[arg-type]


def main() -> None:
    params = settings.load()
    OVERLAY.parent.mkdir(exist_ok=True)
    overlay, trials = search(params) if params.tune.trials else ({}, pd.DataFrame(columns=["number", _METRIC]))
    OVERLAY.write_text(yaml.safe_dump(overlay) if overlay else "{}\n", encoding="utf-8")
    trials.to_csv(TRIALS, index=False)
    print(f"{len(trials)} trials; overlay: {overlay or 'empty'}")


if __name__ == "__main__":
    main()
