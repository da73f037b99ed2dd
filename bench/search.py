"""A search on the real sets, kept as data: the stage tune, at small pictures.

    python -m bench.search .work/real-full [--trials 14] [--epochs 4]

Judged on the validation cells; no test cell is looked at. The first trial is of the recipe. Killed, it goes on. A
short search favours what learns fast: what it finds is tried in the ablation before it becomes a default. Result:
bench/results/search.json, and Optuna's plots in the workspace (tune/search-bench.html).
"""

import argparse
import contextlib
from pathlib import Path

from bench import results
from pipelines import tune
from smearline import plain_json, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--trials", type=int, default=14)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    with contextlib.chdir(given.workspace):
        over = {
            "image": {"size_px": 96},
            "tune": {"trials": given.trials, "epochs": given.epochs, "parallel": 2, "workers": 1, "unpruned": 4},
        }
        raw = settings.load().model_dump(mode="json")
        params = settings.check(settings.overlaid(raw, over), "bench")
        Path("tune").mkdir(exist_ok=True)
        best, study = tune.search(params)
        told = {
            "over_the_recipe": over,
            "best": {"number": study.best_trial.number, "value": study.best_value, **best["train"]},
            "trials": plain_json.plain(tune.table(study).to_dict("records")),
        }
        Path("tune/search-bench.html").write_text(tune.page(study), encoding="utf-8")
    results.write("search", told, given.workspace / "data")


if __name__ == "__main__":
    main()
