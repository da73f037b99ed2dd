"""The served recogniser in float and in int8: time an image, and what accuracy it costs.

    python -m bench.quantised .work/real

Static quantisation by ONNX Runtime (QDQ, calibrated on validation cells), judged on the test cells of the workspace; both on two
threads, in turn, three rounds. Result: bench/results/quantised.json. The service serves the float model.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from bench import results
from smearline import dataset, reader, vocabulary
from smearline.recognition import ONNX_FILE, RecognitionModel, scale_of

ROUNDS, BATCH, CALIBRATED = 3, 32, 256


class _Cells(CalibrationDataReader):
    def __init__(self, batches: Iterator[NDArray[np.uint8]]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workspace", type=Path)
    workspace = parser.parse_args().workspace.resolve()
    model = RecognitionModel(workspace / "models" / "recogniser")
    frame = dataset.labelled_index(workspace / "data")
    split = pd.read_parquet(workspace / "splits.parquet", columns=["sha256", "split"])
    frame = frame.merge(split, on="sha256")
    frame = frame[frame["true_type"].notna() & ~frame["conflicted"].astype(bool)]
    frame["scale"] = [scale_of(s, m)[0] for s, m in zip(frame["site"], frame["microns_per_px"], strict=True)]
    val, test = (frame[frame["split"] == s].reset_index(drop=True) for s in ("val", "test"))
    threads = os.cpu_count() or 1

    def crops(part: pd.DataFrame, number: int) -> Iterator[NDArray[np.uint8]]:
        picked = np.linspace(0, len(part) - 1, min(number, len(part))).astype(np.int64)
        return reader.Crops(part, model.card.field_um, model.card.size_px, threads).batches(picked, BATCH)

    images = np.concatenate(list(crops(test, len(test))))
    children = [vocabulary.load().children(t) for t in test["true_type"]]
    with tempfile.TemporaryDirectory() as folder:
        prepared, small = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(str(model.folder / ONNX_FILE), str(prepared))
        quantize_static(
            str(prepared), str(small), _Cells(crops(val, CALIBRATED)), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        files = {"float": model.folder / ONNX_FILE, "int8": small}
        sessions = {name: onnxruntime.InferenceSession(str(file), options) for name, file in files.items()}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        said: dict[str, NDArray[np.float32]] = {}
        for _ in range(ROUNDS):
            for name, session in sessions.items():
                started = time.monotonic()
                parts = [
                    session.run(["type_probabilities"], {"images": images[i : i + BATCH]})[0]
                    for i in range(0, len(images), BATCH)
                ]
                times[name].append(round(1e3 * (time.monotonic() - started) / len(images), 3))
                said[name] = np.concatenate(parts)
        sizes = {name: file.stat().st_size for name, file in files.items()}
    right = {
        name: np.array([model.card.types[i] in c for i, c in zip(p.argmax(axis=1), children, strict=True)])
        for name, p in said.items()
    }
    told = {
        "cells": len(images),
        "size_px": model.card.size_px,
        "milliseconds_an_image": {name: statistics.median(values) for name, values in times.items()},
        "rounds": times,
        "bytes": sizes,
        "accuracy": {name: round(float(values.mean()), 6) for name, values in right.items()},
        "accuracy_by_site": {
            str(site): {name: round(float(v[(test["site"] == site).to_numpy()].mean()), 6) for name, v in right.items()}
            for site in sorted(test["site"].unique())
        },
        "same_answer": round(float((said["float"].argmax(axis=1) == said["int8"].argmax(axis=1)).mean()), 6),
    }
    results.write("quantised", told, workspace / "data")


if __name__ == "__main__":
    main()
