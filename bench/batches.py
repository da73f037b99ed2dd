"""JHU's second batch as a place that training never saw: the recipe with and without its pictures, judged on it.

    python -m bench.batches .work/real-full [--seeds 3]

JHU's pictures come in two batches, known apart by their height: warm ones of 363 px, pale ones of 365 px. The recipe of the
workspace is trained at a quarter of its length (as bench/ablation.py does), once on all training cells and once on those of the
patients who have no pale one; both name the test cells of either batch, and no setting is chosen by them. PBC's own second batch
(252 cells that others found by the mean of their colours) cannot be told apart among the 4,150 cells of PBC at hand.
Result: bench/results/batches.json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench import results
from bench.ablation import QUARTER, logits, side_by_side, with_scale
from bench.adaptation import figures
from pipelines import training
from smearline import reader, settings

PALE = 365
WITH, WITHOUT = "both batches", "the warm batch alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    workspace = given.workspace.resolve()
    frame = with_scale(workspace)
    pale = (frame["site"] == "jhu") & (frame["height"] == PALE)
    tested = frame[(frame["split"] == "test") & (frame["site"] == "jhu")].reset_index(drop=True)
    batches = dict(list(tested.groupby(np.where(tested["height"] == PALE, "pale", "warm"))))
    of_both = frame[frame["split"].isin(["train", "val"])]
    of_warm = of_both[~of_both["patient"].isin(frame.loc[pale, "patient"].dropna())]
    raw = settings.overlaid(settings.load(workspace / "params.yaml").model_dump(mode="json"), QUARTER)
    rows = list[dict[str, Any]]()

    def row(seed: int, name: str) -> None:
        shown = of_both if name == WITH else of_warm
        params = settings.check(settings.overlaid(raw, {"train": {"seed": seed}}), name)
        trained = training.fit(shown, params, label=f"{name}, seed {seed}: ")
        types = reader.trainable(shown[shown["split"] == "train"])[0]
        said = np.array(types)[logits(trained.state, types, tested, params).argmax(axis=1)]
        answers = pd.DataFrame({"sha256": tested["sha256"], "predicted_type": said})
        told = {batch: figures(part, answers) for batch, part in batches.items()}
        cells = int((shown["split"] == "train").sum())
        rows.append({"trained on": name, "seed": seed, "training cells": cells, **told})

    side_by_side(row, [(seed, name) for seed in range(given.seeds) for name in (WITH, WITHOUT)])
    rows.sort(key=lambda r: (r["trained on"], r["seed"]))
    flat = pd.DataFrame(
        {"trained on": r["trained on"], **{b: r[b]["site's types"]["value"] for b in batches}} for r in rows
    )
    mean = flat.groupby("trained on").mean().round(4).to_dict("index")
    content = {"mean_over_seeds": mean, "rows": rows}
    results.write("batches", content, workspace / "data")


if __name__ == "__main__":
    main()
