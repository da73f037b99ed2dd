"""Training with Ray Train: every run, on one worker or on many, on CPU or GPU, goes through `fit`.

A run's name is the digest of its data, parameters and code, so a run that was killed goes on where it stood and no
other run is ever continued by mistake. Checkpoints lie outside DVC's outs, which DVC removes before a stage, and are
removed when the run has ended.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pandas as pd
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch import Tensor

from pipelines import training_loop
from smearline import augmentation, frozen_norm, images, initial_weights, reader, recogniser, settings
from smearline.errors import SettingsError

RUNS = Path(".smearline/runs")
_CHECKING = threading.Lock()


@dataclass(frozen=True)
class Trained:
    """The end of a run: the weights, and a row an epoch (`temperature`: of the softmax, fitted on the validation cells)."""

    state: dict[str, Tensor]
    history: list[dict[str, float]]


def fit(
    frame: pd.DataFrame,
    params: settings.Settings,
    stop: Callable[[dict[str, float]], bool] | None = None,
    label: str = "",
) -> Trained:
    """Train a recogniser on the cells whose `split` is 'train', watching those of 'val'.

    Args:
        frame: `dataset.labelled_index` with `scale` (um/px) and `split`.
        stop: asked with each epoch's row; once it says yes, the run ends after the epoch that is under way then.
        label: stands before the lines of progress.

    Raises:
        SettingsError: there are fewer GPUs than asked for.
        ModelError: there is no such backbone for such pictures, it cannot be served, or the initial weights are missing or do
            not fit.
    """
    types, characteristics = reader.trainable(frame[frame["split"] == "train"])
    # Here, since a worker that fails is started again and again; by one thread at a time, since torch exports no two at once.
    with _CHECKING, tempfile.TemporaryDirectory() as folder:
        network = recogniser.of_settings(params, types, characteristics)
        initial_weights.load_initial_weights(network, params.model.weights)
        recogniser.export_onnx(
            network, 1.0, params.image.size_px, Path(folder) / "model.onnx"
        )  # else it cannot be served
    name = run_name(frame, params)
    storage = RUNS.resolve()
    cells = storage / f"{name}.cells.parquet"
    storage.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(cells)
    (storage / f"{name}.stop").unlink(missing_ok=True)
    start_ray(params.train.workers, params.train.threads_per_worker)
    asked, there = params.train.workers * params.train.gpus_per_worker, ray.cluster_resources().get("GPU", 0)
    if asked > there:
        raise SettingsError(f"train.gpus_per_worker: {asked:g} GPUs are asked for in all, and Ray sees {there:g}")
    trainer = TorchTrainer(
        training_loop.train_loop,
        train_loop_config={
            "settings": params.model_dump(mode="json"),
            "cells": str(cells),
            "types": types,
            "characteristics": characteristics,
            "files": str(storage / name),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=params.train.workers,
            use_gpu=params.train.gpus_per_worker > 0,
            resources_per_worker={"CPU": params.train.threads_per_worker, "GPU": params.train.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=params.train.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )

    def epoch_done(line: str) -> None:
        if stop and stop(json.loads(line)):
            (storage / f"{name}.stop").touch()

    def say(line: str) -> None:
        print(f"{label}{line}", end="", flush=True)

    with _followed(storage / f"{name}.progress", say), _followed(storage / f"{name}.rows", epoch_done):
        result = trainer.fit()
    assert result.checkpoint is not None, "every epoch reports a checkpoint"
    with result.checkpoint.as_directory() as folder:
        saved = torch.load(Path(folder) / training_loop.STATE_FILE, map_location="cpu", weights_only=True)
    shutil.rmtree(storage / name, ignore_errors=True)
    for left in storage.glob(f"{name}.*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return Trained(saved["network"], saved["history"])


@contextmanager
def _followed(path: Path, each: Callable[[str], object]) -> Iterator[None]:
    """Call `each` with every line that the first worker writes there; Ray's own log would say everything thrice."""
    ended = threading.Event()
    path.touch()

    def follow() -> None:
        with path.open(encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            while True:
                last = ended.wait(1.0)
                for line in file:
                    each(line)
                if last:
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def start_ray(workers: int, threads: int) -> None:
    """Join the cluster at $RAY_ADDRESS, or start Ray on this machine with room for the workers asked for."""
    if ray.is_initialized():
        return
    here = {
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "OMP_NUM_THREADS": str(threads),
        **kept_pages(),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if os.environ.get("RAY_ADDRESS"):
        ray.init(
            runtime_env={"working_dir": ".", "excludes": ["data", ".git", ".dvc", ".smearline"]}, log_to_driver=False
        )
        return
    # A checkpoint is registered when Ray looks: twice a second, not every two seconds.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5")
    needed = workers * threads
    ray.init(
        num_cpus=max(os.cpu_count() or 1, needed),
        include_dashboard=False,
        runtime_env={"env_vars": here},
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=256 * 2**20,
    )


def kept_pages() -> dict[str, str]:
    """Variables by which glibc keeps what large tensors leave, and asks the kernel for no fresh pages at every layer
    (docs/decisions/004); none where it is not known to take them.

    One arena: another thread's ends at 64 MiB, beyond which the thresholds mean nothing, and training is not the main thread.
    """
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, ValueError):  # not glibc
        return {}
    if library != "glibc" or [int(part) for part in version.split(".")] < [2, 36]:
        return {}
    return {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def digest_of(params: settings.Settings) -> str:
    """SHA-256 of the parameters that shape a training or a search; how long that is, and how many trials side by side, do not."""
    shaping = params.model_dump(
        mode="json",
        exclude={
            "tune": {"trials", "parallel"},
            **dict.fromkeys(("adapt", "confidence", "evaluate", "diagnosis", "gate"), True),
        },
    )
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def run_name(frame: pd.DataFrame, params: settings.Settings) -> str:
    modules = (augmentation, frozen_norm, images, initial_weights, reader, recogniser, training_loop)
    code = [Path(module.__file__ or "").read_bytes() for module in modules]
    words = files("smearline.vocabulary")
    parts = [
        digest_of(params).encode(),
        *(words.joinpath(f"{name}.yaml").read_bytes() for name in ("types", "characteristics")),
        pd.util.hash_pandas_object(frame.drop(columns=["shard", "row"]).astype(str), index=False).to_numpy().tobytes(),
        *code,
    ]
    if (given := Path(params.model.weights)).is_file():
        parts.append(given.read_bytes())
    return hashlib.sha256(b"\0".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()[:16]
