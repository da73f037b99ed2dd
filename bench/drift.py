"""What the drift verdicts are worth: false alarms, what is found, and the accuracy that went with each real shift.

    python -m bench.drift WORKSPACE [WORKSPACE ...]      bench/results/drift.json and monitoring/limits.yaml

Of a workspace on simulated data (`make demo`): new smears of its first site without drift, with another stain, with a blurred
lens, and of a leukaemia ward, drawn 5, 10 and 20 at a time. Of a workspace on real data (`make real`, `make real-cross`):
JHU's pale batch against its warm one, the other sets against PBC, PBC against itself, each with the accuracy on cells that
the recogniser was not trained on.
"""

import argparse
import hashlib
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.results import write
from bench.site_pairs import Pair, limits_of, overrides_of, pair, told, write_limits
from monitoring import drift
from monitoring.reference import refer
from monitoring.smears import by_smear, families, named
from smearline import dataset, sites
from smearline.recognition import RecognitionModel, split, table_of
from smearline.simulator import simulate
from smearline.sites import Site

SIZES = (5, 10, 20)
REPEATS = 60
CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "stain: azure and purple -25 %, eosin +25 %": {"azure": 0.75, "complex": 0.75, "eosin": 1.25},
    "stain: azure and purple -10 %, eosin +10 %": {"azure": 0.9, "complex": 0.9, "eosin": 1.1},
    "blur: point spread 0.3 instead of 0.1 um": {"blur_um": 0.3},
    "leukaemia ward: AML and ALL alone": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspaces", nargs="+", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    found: dict[str, Any] = {"false_alarm_rate_stated": drift.FALSE_ALARM_RATE}
    pairs: list[Pair] = []
    for space in args.workspaces:
        predictions = pd.read_parquet(space / "predictions.parquet")
        if (predictions["origin"] == "simulated").any():
            found[space.name] = simulated(space, predictions)
        else:
            found[space.name], more, overrides = real(space, predictions)
            pairs += more
            found.setdefault("limits", {"overrides": overrides})
    if pairs:
        found["pairs"] = [
            told(p, limits_of([q for q in pairs if q is not p]))
            | {"with_the_limits_of_all_pairs": told(p, limits_of(pairs))["verdict"]}
            for p in pairs
        ]
        found["limits"] |= limits_of(pairs)
        write_limits(found["limits"])
    write("drift", found)


def simulated(space: Path, predictions: pd.DataFrame) -> dict[str, Any]:
    """Rates of a call, by size of the window and by family, on smears that were drawn for this."""
    model, site = RecognitionModel(space / "package" / "recogniser", threads=1), sites.load(predictions["site"].iloc[0])
    plain = refer(drawn(model, site, 120, 101))
    own = refer(predictions[predictions["site"] == site.name])
    windows: dict[str, pd.DataFrame] = {}
    for name, change in CHANGES.items():
        ward = "ward" in name
        cells = drawn(model, changed(site, change), 90 if ward else 60, 202, ("AML", "ALL") if ward else ())
        windows[name] = cells
    found: dict[str, Any] = {"accuracy": {name: _accuracy_simulated(cells) for name, cells in windows.items()}}
    for label, base in (("reference of 100 new smears", plain), ("the workspace's own reference", own)):
        smears = {n: by_smear(named(c), base.centres[site.name]).assign(day=None) for n, c in windows.items()}
        rows = base.smears.assign(day=None).iloc[:100]
        found[label] = {
            "num_smears": len(rows),
            "num_not_trained_on": int((~rows["seen"].astype(bool)).sum()),
            **{name: {n: calls(rows, table, n) for n in SIZES} for name, table in smears.items()},
        }
    return found


def _accuracy_simulated(cells: pd.DataFrame) -> float:
    return round(float((cells["true_type"] == cells["predicted_type"]).mean()), 3)


def changed(site: Site, change: dict[str, Any]) -> Site:
    simulation = dict(site.simulation or {})
    for name, value in change.items():
        old = simulation[name]
        simulation[name] = {**old, "strength": old["strength"] * value} if isinstance(old, dict) else value
    return site.model_copy(update={"simulation": simulation})


def drawn(model: RecognitionModel, site: Site, num: int, seed: int, diagnoses: tuple[str, ...] = ()) -> pd.DataFrame:
    """Predictions of `num` new patients of a simulated site, 50 cells each; of these diagnoses alone where given."""
    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder), sites=[site], seed=seed, num_patients=num, cells_per_smear=50)
        place, frames = Path(folder) / site.name, []
        cells = pd.read_csv(place / "labels.csv", keep_default_na=False)
        patients = pd.read_csv(place / "patients.csv").set_index("patient")["diagnosis"]
        cells = cells[cells["patient"].map(patients).isin(diagnoses or set(patients))]
        for _, block in cells.groupby(np.arange(len(cells)) // 32):
            data = [(place / f).read_bytes() for f in block["file"]]
            crops = np.stack([model.prepare(d, float(site.microns_per_px or 0)) for d in data])
            outputs = model.run(crops, "type_probabilities", "characteristic_probabilities", "embedding")
            rows = [
                {
                    "sha256": hashlib.sha256(d).hexdigest(),
                    "site": site.name,
                    "patient": p,
                    "smear": s,
                    "scale_assumed": False,
                }
                for d, p, s in zip(data, block["patient"], block["smear"], strict=True)
            ]
            frame, vectors = split(table_of(model.card, rows, crops, *outputs))
            frames.append(frame.assign(embedding=list(vectors), true_type=block["type"].to_numpy()))
    return pd.concat(frames, ignore_index=True).assign(split="test", acquired_at=pd.NaT)


def calls(reference: pd.DataFrame, smears: pd.DataFrame, size: int, repeats: int = REPEATS) -> dict[str, float]:
    """The share of windows of `size` smears that are called, in all and by family. Each leaves 20 random smears of the
    reference out, so that windows are not all judged against the same."""
    random, found = np.random.default_rng(size), []
    for _ in range(repeats):
        rows = reference.iloc[
            np.sort(random.permutation(len(reference))[: max(len(reference) - 20, len(reference) * 4 // 5)])
        ]
        window = smears.iloc[random.permutation(len(smears))[:size]]
        comparison = drift.compare(window, rows, {})
        found.append({f: any(x.moved for x in v) for f, v in comparison.features.items()})
    table = pd.DataFrame(found, columns=list(families())).fillna(False).astype(bool)
    rates = {"any": table.any(axis=1).mean(), **table.mean()}
    return {name: round(float(rate), 3) for name, rate in rates.items()}


def real(space: Path, predictions: pd.DataFrame) -> tuple[dict[str, Any], list[Pair], dict[str, Any]]:
    """(PBC against itself; the pairs; the limit of overrides)."""
    known = dataset.labelled_index(space / "data")[["sha256", "true_type", "height"]]
    cells = predictions.merge(known, on="sha256", validate="one_to_one")
    part = dict(list(cells.groupby("site")))
    part |= {
        "jhu, warm": part["jhu"][part["jhu"]["height"] == 363],
        "jhu, pale": part["jhu"][part["jhu"]["height"] == 365],
    }
    pairs = []
    for here, there in (
        ("jhu, pale", "jhu, warm"),
        ("jhu, warm", "pbc"),
        ("pbc", "jhu, warm"),
        ("bccd", "pbc"),
        ("zheng2", "pbc"),
    ):
        window, base = (part.get(name, cells.iloc[:0]) for name in (here, there))
        trained = {name: bool((part[name]["split"] == "train").any()) for name in (here, there) if name in part}
        # Between two sites that it was trained on, the difference is how hard their cells are, and no fall.
        if trained.get(there) and len(window) and (not trained[here] or ("jhu" in here and "jhu" in there)):
            pairs.append(pair(f"{here} against {there} ({space.name})", base, window))
    itself = (
        {f"windows of {n}": against_itself(part["pbc"], n) for n in (10, 20)} if space.name.startswith("real") else {}
    )
    return {"pbc against itself": itself}, pairs, overrides_of(cells)


def against_itself(cells: pd.DataFrame, size: int) -> dict[str, Any]:
    """False alarms: random windows of `size` pseudo-smears against the others of the same cells, dealt anew each time."""
    random, alarms = np.random.default_rng(size), []
    for _ in range(REPEATS):
        shuffled = cells.assign(sha256=[f"{n:08d}" for n in random.permutation(len(cells))])
        known = refer(shuffled)
        order = random.permutation(len(known.smears))
        comparison = drift.compare(known.smears.iloc[order[:size]], known.smears.iloc[order[size:]], {})
        alarms.append(comparison.farthest > 1)
    return {"false_alarms": round(float(np.mean(alarms)), 3), "of": REPEATS, "smears": [len(known.smears) - size, size]}


if __name__ == "__main__":
    started = time.process_time()
    main()
    print(f"{time.process_time() - started:.0f} s of processor time")
