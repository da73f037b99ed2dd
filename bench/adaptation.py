"""What labels of a new site bring: the recogniser of PBC alone at JHU, with its mix estimated and with 20 to 500 labelled cells.

    python -m bench.adaptation .work/cross-pbc .work/real-full [--budget 0 20 100]     (after make real-full and real-cross)
    python -m bench.adaptation .work/cross-pbc .work/real-full --inner 4 [--strength 5 20 80]

JHU's test patients of the second workspace's split judge: no setting was chosen on them, and the cells to label are chosen among
the other patients of JHU alone. `ten types`: the cells of the ten types that both sites have, as answered over all types that the
model knows; `site's types`: all labelled cells. Intervals: patients resampled.
Result: bench/results/adaptation.json.

With --inner no test patient is looked at: of JHU's other patients three in ten are held out and judge, as many times as it says,
each time others. This is what settings are chosen by. Result: bench/results/adaptation-inner.json.
"""

import argparse
import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import yaml

from bench import results
from bench.ablation import COMMON
from pipelines import adapt, new_site
from smearline import dataset, settings, vocabulary
from smearline.metrics import intervals
from smearline.recognition import RecognitionModel, recognise


def figures(judged: pd.DataFrame, predictions: pd.DataFrame) -> dict[str, Any]:
    words = vocabulary.load()
    parents = {child: parent for parent, children in words.parents.items() for child in children}
    said = predictions.set_index("sha256").loc[judged["sha256"], "predicted_type"].to_numpy()
    label = judged["true_type"].to_numpy()
    right = np.array([s in words.children(t) for s, t in zip(said, label, strict=True)])
    near = np.array([parents.get(s, s) == parents.get(t, t) for s, t in zip(said, label, strict=True)])
    common = np.isin(label.astype(str), COMMON)
    count = pd.Series(label).value_counts()
    means = pd.Series(right).groupby(label).mean()[count[count >= 20].index]

    def share(hit: Any, rows: Any) -> dict[str, float]:
        counts = intervals.bootstrap_counts(
            judged["patient"].to_numpy()[rows], hit[rows].astype(int)[:, None], 2, np.random.default_rng(7)
        )
        found = intervals.proportion(counts[:, 1], counts.sum(axis=1))
        return {name: round(value, 4) for name, value in found.items() if value is not None}

    everything = np.ones(len(judged), bool)
    return {
        "cells": len(judged),
        "patients": int(judged["patient"].nunique()),
        "ten types": share(right, common),
        "ten types, by parents": share(near, common),
        "site's types": share(right, everything),
        "site's types, balanced": round(float(means.mean()), 4),
    }


def without(data: Path, shas: set[str], into: Path) -> None:
    """The data set of JHU without these cells, nor those whose label is disputed: choosing one of them stops an adaptation."""
    index = dataset.labelled_index(data)
    clear = (index["site"] == "jhu") & ~index["conflicted"].astype(bool) & index["true_type"].notna()
    keep = pa.array(index["sha256"][clear & ~index["sha256"].isin(shas)])
    for shard in dataset.shards(data):
        table = pq.read_table(shard, schema=dataset.CELLS)
        table = table.filter(pa.compute.is_in(table["sha256"], keep))
        if len(table):
            dataset.write_shard(into / "cells", "jhu", table)
    shutil.copytree(data / "labels", into / "labels")


def with_settings(workspace: Path, adapting: dict[str, Any], into: Path) -> Path:
    """The workspace with other settings of `adapt`; everything else is a link to what it has."""
    into.mkdir()
    for path in workspace.iterdir():
        (into / path.name).symlink_to(path)
    own = into / "params.yaml"
    own.unlink()
    raw = yaml.safe_load((workspace / "params.yaml").read_text(encoding="utf-8"))
    raw["adapt"] = settings.load().adapt.model_dump(mode="json") | adapting
    own.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return into


def inner(workspace: Path, test: set[str], budgets: list[int], strengths: list[float], seeds: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        cells = Path(temporary) / "cells"
        without(workspace / "data", test, cells)
        for seed in range(seeds):
            for strength in strengths:
                place = Path(temporary) / f"{seed}-{strength:g}"
                with contextlib.chdir(with_settings(workspace, {"seed": seed, "strength": strength}, place)):
                    site = new_site.NewSite(Path("models/recogniser"), cells, None, budgets)
                    for budget, chosen in site.chosen(budgets, place / "listed.csv").items():
                        report = adapt._adapt(site, budget, chosen, place / f"adapted-{budget}")
                        row: dict[str, Any] = {"seed": seed, "strength": strength, "labels": budget}
                        for where in ("new_site", "home_validation_cells"):
                            for when, found in report[where].items():
                                row |= {
                                    f"{where}, {when}": found["accuracy"],
                                    f"{where}, {when}, named": found["named"],
                                }
                                row |= {f"{where}, {when}, balanced": found["balanced_accuracy"]}
                        adapted = RecognitionModel(place / f"adapted-{budget}")
                        there = figures(site.judged, recognise(adapted, cells, keep=set(site.judged["sha256"]))[0])
                        row |= {name: there[name]["value"] for name in ("ten types", "ten types, by parents")}
                        rows.append(row)
                        print({name: round(value, 4) for name, value in row.items()}, flush=True)
        mean = pd.DataFrame(rows).groupby(["strength", "labels"]).mean().drop(columns="seed").round(4).reset_index()
        told = {"splits": seeds, "mean": mean.to_dict("records"), "rows": rows}
        results.write("adaptation-inner", told, workspace / "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workspace", type=Path)
    parser.add_argument(
        "split", type=Path, help="the workspace whose split says which patients of JHU are for the test"
    )
    parser.add_argument("--budget", type=int, nargs="+", default=[0, 20, 50, 100, 200, 500])
    parser.add_argument("--inner", type=int, default=0, metavar="SPLITS")
    parser.add_argument("--strength", type=float, nargs="+", default=[settings.load().adapt.strength])
    given = parser.parse_args()
    workspace, split = given.workspace.resolve(), pd.read_parquet(given.split.resolve() / "splits.parquet")
    test, rows = set(split.loc[split["split"] == "test", "sha256"]), []
    if given.inner:
        inner(workspace, test, given.budget, given.strength, given.inner)
        return
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(workspace):
        data, cells, model = Path("data"), Path(temporary) / "cells", Path("models/recogniser")
        index = dataset.labelled_index(data)
        judged = index[
            index["sha256"].isin(test)
            & (index["site"] == "jhu")
            & index["true_type"].notna()
            & ~index["conflicted"].astype(bool)
        ]
        without(data, test, cells)
        keep = set(judged["sha256"])
        first = figures(judged, recognise(RecognitionModel(model), data, keep=keep)[0])
        rows.append({"labels": 0, "mix estimated": False, **first})
        site = new_site.NewSite(model, cells, None, given.budget)
        for budget, chosen in site.chosen(given.budget, Path(temporary) / "listed.csv").items():
            started, out = time.monotonic(), Path(temporary) / f"adapted-{budget}"
            report = adapt._adapt(site, budget, chosen, out)
            found = figures(judged, recognise(RecognitionModel(out), data, keep=keep)[0])
            home = {when: f["accuracy"] for when, f in report["home_validation_cells"].items()}
            minutes = round((time.monotonic() - started) / 60, 1)
            rows.append({"labels": budget, "mix estimated": True, **found, "home": home, "minutes": minutes})
            results.write("adaptation", {"rows": rows}, data)


if __name__ == "__main__":
    main()
