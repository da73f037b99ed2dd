"""What each step of the recipe brings: the recipe with one thing changed, at a quarter of its length, on inner patients alone.

    python -m bench.ablation .work/real-full [--task home|away] [--only NAME ...] [--seeds 3]

home: trained on the training cells of both sites, judged on the validation cells. away: trained on PBC's, judged on JHU's training
and validation patients over the ten types that both have. No test cell is looked at. Two trainings go side by side, of one worker
each. A row is written as soon as it is known, and is not made again while recipe and data are the same; rows of others go. Result:
bench/results/ablation.json.
"""

import argparse
import contextlib
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bench import results
from pipelines import training
from smearline import dataset, reader, recogniser, settings, vocabulary
from smearline.recognition import scale_of

QUARTER = {"train": {"epochs": 6, "workers": 1}}
SIDE_BY_SIDE = 2
BASE = "the recipe"
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    BASE: {},
    "padding as TensorFlow's": {"model": {"backbone": "tf_efficientnet_lite0"}},
    "no ImageNet weights": {"model": {"weights": "none"}},
    "batch normalisation by the batch": {"model": {"frozen_batch_norm": False}},
    "no stain jitter": {"train": {"stain_jitter": 0.0}},
    "twice the stain jitter": {"train": {"stain_jitter": 2.0}},
    "no balancing": {"train": {"balance": 0.0}},
    "all strata alike": {"train": {"balance": 1.0}},
    "no characteristics": {"train": {"characteristics_weight": 0.0}},
    "small pictures alone": {"image": {"size_px": 96}, "train": {"epochs": 10}},
    "a field of 25 um": {"image": {"field_um": 25.0}},
    "what a search found": {  # the best trial of bench/results/search.json, less its mixup and label smoothing
        "train": {
            "lr": 3.17e-4,
            "weight_decay": 0.0302,
            "stain_jitter": 0.527,
            "balance": 0.534,
        }
    },
}
COMMON = ("NEUT_SEG", "NEUT_BAND", "METAMYELO", "MYELO", "PROMYELO", "LYMPH", "MONO", "EOS", "BASO", "NRBC")


def with_scale(workspace: Path) -> pd.DataFrame:
    """The cells of an undisputed type, with their part of the split, and microns per pixel as `scale`."""
    frame = dataset.labelled_index(workspace / "data")
    frame = frame.merge(pd.read_parquet(workspace / "splits.parquet", columns=["sha256", "split"]), on="sha256")
    frame["scale"] = [scale_of(s, m)[0] for s, m in zip(frame["site"], frame["microns_per_px"], strict=True)]
    return frame[frame["true_type"].notna() & ~frame["conflicted"].astype(bool)]


def logits(
    state: dict[str, torch.Tensor], types: tuple[str, ...], part: pd.DataFrame, params: settings.Settings
) -> Any:
    """N x T of the network."""
    values = state["characteristics_head.bias"].shape[0]
    characteristics = {"all": tuple(str(v) for v in range(values))} if values else {}
    network = recogniser.of_settings(params, types, characteristics)
    network.load_state_dict(state)
    network.eval()
    crops = reader.Crops(part, params.image.field_um, params.image.size_px)
    with torch.inference_mode():
        found = [
            network(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255)[0]
            for batch in crops.batches(np.arange(len(part)), 64)
        ]
    return torch.cat(found).numpy()


def figures(
    task: str, state: Any, types: tuple[str, ...], judged: pd.DataFrame, params: settings.Settings
) -> dict[str, float]:
    found, told = logits(state, types, judged, params), {}
    words = vocabulary.load()

    def score(name: str, rows: Any, of: list[int]) -> None:
        said = [types[of[i]] for i in found[rows][:, of].argmax(axis=1)]
        labels = judged["true_type"].to_numpy()[rows]
        right = pd.Series([s in words.children(t) for s, t in zip(said, labels, strict=True)])
        parents = {c: p for p, children in words.parents.items() for c in children}
        near = [parents.get(s, s) == parents.get(t, t) for s, t in zip(said, labels, strict=True)]
        count = pd.Series(labels).value_counts()
        means = right.groupby(labels).mean()[count[count >= 20].index]
        told.update(
            {
                name: float(right.mean()),
                f"{name}, balanced": float(means.mean()),
                f"{name}, parents": float(np.mean(near)),
            }
        )

    everything = list(range(len(types)))
    if task == "home":
        for site in sorted(judged["site"].unique()):
            score(site, np.flatnonzero(judged["site"] == site), everything)
        jhu = np.flatnonzero((judged["site"] == "jhu") & judged["true_type"].notna())
        blast, column = judged["true_type"].to_numpy()[jhu] == "BLAST", types.index("BLAST")
        chance = torch.softmax(torch.from_numpy(found[jhu]), 1)[:, column].numpy()
        ranks = pd.Series(chance).rank().to_numpy()
        told["blast AUC"] = float((ranks[blast].mean() - (blast.sum() + 1) / 2) / (~blast).sum())
    else:
        rows = np.flatnonzero(judged["true_type"].isin(COMMON))
        score("jhu", rows, [types.index(t) for t in COMMON if t in types])
    return {name: round(value, 4) for name, value in told.items()}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By task: of each change the mean of every figure over its seeds; and its difference from the recipe over the seeds that both
    have, with the standard error of that mean of paired differences."""
    table = (
        pd.DataFrame(rows)
        .set_index(["task", "change", "seed"])
        .drop(columns=["minutes", "commit", "over"])
        .sort_index()
    )
    means: dict[str, Any] = {}
    gains: dict[str, Any] = {}
    for (task, change), part in table.groupby(["task", "change"]):
        part = part.dropna(axis=1)
        means.setdefault(task, {})[change] = part.mean().round(4).to_dict() | {"seeds": len(part)}
        if change == BASE or (task, BASE) not in table.index.droplevel("seed"):
            continue
        apart = (part.droplevel([0, 1]) - table.loc[(task, BASE)]).dropna(how="all").dropna(axis=1)
        if len(apart) > 1:
            error = apart.std() / np.sqrt(len(apart))
            of = {name: [round(float(apart[name].mean()), 4), round(float(error[name]), 4)] for name in apart}
            gains.setdefault(task, {})[change] = of | {"seeds": len(apart)}
    return {"mean_over_seeds": means, "difference_and_standard_error": gains}


def side_by_side(train: Callable[..., None], wanted: list[tuple[Any, ...]]) -> None:
    """Call `train` with each of `wanted`, two at a time, with a core each. The first error ends all."""
    torch.set_num_threads(1)
    # One folder for all: Ray starts its workers in the folder in which it was started.
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        ThreadPoolExecutor(SIDE_BY_SIDE) as pool,
    ):
        training.start_ray(SIDE_BY_SIDE, 1)
        left = [pool.submit(train, *one) for one in wanted]
        try:
            for one in left:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--task", choices=["home", "away"], default="home")
    parser.add_argument("--only", nargs="*", default=list(CHANGES), choices=list(CHANGES), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    workspace = given.workspace.resolve()
    frame = with_scale(workspace)
    frame = frame[frame["split"] != "test"]
    told = frame[["sha256", "true_type", "split"]].sort_values("sha256").to_csv(index=False)
    data = hashlib.sha256(told.encode()).hexdigest()
    if given.task == "away":
        frame = frame[frame["site"].isin(["pbc", "jhu"])]
        frame["split"] = np.where(frame["site"] == "pbc", frame["split"], "judged")
    judged = frame[frame["split"] == ("val" if given.task == "home" else "judged")].reset_index(drop=True)
    shown = frame[frame["split"].isin(["train", "val"])].reset_index(drop=True)
    raw = settings.overlaid(settings.load(workspace / "params.yaml").model_dump(mode="json"), QUARTER)
    file = results.RESULTS / "ablation.json"
    base = {"recipe": {part: raw[part] for part in ("image", "model", "train")}, "data_digest": data}
    before = json.loads(file.read_text()) if file.exists() else {}
    rows = before["rows"] if before.get("base") == base else []
    # A change that says another thing now is another one.
    rows = [r for r in rows if r["over"] == CHANGES.get(r["change"])]
    commit, lock = results.provenance(None)["commit"], threading.Lock()

    def row(seed: int, name: str) -> None:
        over = settings.overlaid(CHANGES[name], {"train": {"seed": seed}})
        params = settings.check(settings.overlaid(raw, over), name)
        started = time.monotonic()
        trained = training.fit(shown, params, label=f"{name}, seed {seed}: ")
        minutes = round((time.monotonic() - started) / 60, 1)
        types = reader.trainable(shown[shown["split"] == "train"])[0]
        found = figures(given.task, trained.state, types, judged, params)
        with lock:
            rows.append(
                {
                    "task": given.task,
                    "change": name,
                    "over": CHANGES[name],
                    "seed": seed,
                    "commit": commit,
                    "minutes": minutes,
                }
                | found
            )
            told = {"quarter": QUARTER, "base": base} | summary(rows) | {"rows": rows}
            results.write("ablation", told, workspace / "data")

    known = {(r["task"], r["change"], r["seed"]) for r in rows}
    wanted = [(seed, name) for seed in range(given.seeds) for name in given.only]
    side_by_side(row, [one for one in wanted if (given.task, one[1], one[0]) not in known])


if __name__ == "__main__":
    main()
