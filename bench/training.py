"""What Ray, the reader and the augmentation cost: a training by the pipeline beside a bare PyTorch loop on the same network.

    python -m bench.training .work/real [--images 2048] [--size-px 128]

The bare loop sees one batch that lies in memory: forward, backward, the optimizer's step, nothing else, on one thread; its batch is
as large as a worker's share, and it keeps freed pages as Ray's workers do. The pipeline
trains the same network on cells of the workspace; its rate is that between the ends of its epochs, so that its start, which is
given apart, does not count. One worker beside one thread, then two workers beside two bare loops; all in turn, three rounds.
Result: bench/results/training.json.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.optim import param_groups_weight_decay

from bench import results
from pipelines import training
from pipelines.training_loop import freeze_batch_norm
from smearline import frozen_norm, recogniser, settings
from smearline.initial_weights import load_initial_weights
from smearline.recognition import scale_of

ROUNDS, EPOCHS, STEPS = 3, 3, 24
TYPES = tuple(f"type {i}" for i in range(17))


def bare(params: settings.Settings, batch: int, folded: bool = True) -> float:
    """Images a second of the network alone, on one thread."""
    torch.set_num_threads(1)
    size = params.image.size_px
    network = recogniser.of_settings(params, TYPES, {"a": ("x", "y")})
    load_initial_weights(network, params.model.weights)
    if folded:
        frozen_norm.fold(network.backbone, torch.rand(1, 3, size, size))
    network = network.to(memory_format=torch.channels_last).train()
    freeze_batch_norm(network)
    images = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch) % len(TYPES)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(network, 0.05), lr=1e-4)
    for step in range(STEPS + 3):
        if step == 3:
            started = time.monotonic()
        loss = torch.nn.functional.cross_entropy(network(images)[0], target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return STEPS * batch / (time.monotonic() - started)


def _bare_in_process(given: tuple[dict[str, Any], int, bool]) -> float:
    return bare(settings.check(given[0], "bench"), *given[1:])


def side_by_side(params: settings.Settings, number: int, folded: bool = True) -> float:
    """Images a second of so many bare loops at once, each in a process of its own."""
    os.environ.update(training.kept_pages(), OMP_NUM_THREADS="1")  # read when a process starts
    given = params.model_dump(mode="json"), params.train.batch_size // number, folded
    with multiprocessing.get_context("spawn").Pool(number) as pool:
        return sum(pool.map(_bare_in_process, [given] * number))


def by_the_pipeline(frame: pd.DataFrame, params: settings.Settings, workers: int) -> tuple[float, float]:
    """(images a second between the ends of epochs, seconds to the end of the first)."""
    raw = params.model_dump(mode="json")
    tried = settings.check(settings.overlaid(raw, {"train": {"workers": workers}}), "bench")
    ends: list[float] = []

    def end(_: dict[str, float]) -> bool:
        ends.append(time.monotonic())
        return False

    started = time.monotonic()
    training.fit(frame, tried, end, "  ")
    images = len(frame) // tried.train.batch_size * tried.train.batch_size
    return images * (len(ends) - 1) / (ends[-1] - ends[0]), ends[0] - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--size-px", type=int, default=128)
    given = parser.parse_args()
    workspace = given.workspace.resolve()
    from smearline import dataset

    frame = dataset.labelled_index(workspace / "data")
    frame = (
        frame[frame["true_type"].notna() & frame["site"].isin(["pbc", "jhu"])]
        .iloc[: given.images]
        .reset_index(drop=True)
    )
    frame["scale"] = [scale_of(s, m)[0] for s, m in zip(frame["site"], frame["microns_per_px"], strict=True)]
    frame["split"] = "train"
    raw = settings.load(workspace / "params.yaml").model_dump(mode="json")
    over = {
        "image": {"size_px": given.size_px},
        "train": {"epochs": EPOCHS, "batch_size": 64, "checkpoint_steps": 0},
    }
    params = settings.check(settings.overlaid(raw, over), "bench")
    rounds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        rounds.setdefault(name, []).append(round(value, 2))
        print(f"{name}: {value:.1f}", flush=True)

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for _ in range(ROUNDS):
            for workers in (1, 2):
                note(f"{workers} bare", side_by_side(params, workers))
                rate, start = by_the_pipeline(frame, params, workers)
                note(f"{workers} workers", rate)
                note(f"{workers} workers, seconds to the end of the first epoch", start)
            note("1 bare, normalisation not folded", side_by_side(params, 1, folded=False))
    middle = {name: statistics.median(values) for name, values in rounds.items()}
    told = {
        "network": f"{params.model.backbone} at {given.size_px} px, batch 64, {given.images} images",
        "images_a_second": middle,
        "rounds": rounds,
        "pipeline_of_bare": {n: round(middle[f"{n} workers"] / middle[f"{n} bare"], 3) for n in (1, 2)},
        "two_workers_of_one": round(middle["2 workers"] / middle["1 workers"], 3),
        "folded_of_not_folded": round(middle["1 bare"] / middle["1 bare, normalisation not folded"], 3),
        "spread": {name: round(float(np.ptp(values) / np.median(values)), 3) for name, values in rounds.items()},
    }
    results.write("training", told, workspace / "data")


if __name__ == "__main__":
    main()
