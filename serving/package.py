"""Stage package: the recogniser as it is handed over, checked against the network it was exported from.

package/recogniser/   the model folder
package/lineage.json  data, code, parameters and metrics that stand behind it
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from smearline import __version__, dataset, differential
from smearline.errors import ModelError
from smearline.recogniser import Recogniser, Served
from smearline.recognition import RecognitionModel

PACKAGE = Path("package")
TOLERANCE = 1e-3
"""Largest difference of a probability between ONNX Runtime and torch that is accepted."""


def onnx_difference(model: RecognitionModel, weights: Path, directory: Path, count: int = 64) -> float:
    """The largest absolute difference of any probability between the ONNX model and the torch network on real cells."""
    card = model.card
    network = Recogniser(
        card.parameters["model"]["backbone"],
        card.types,
        card.characteristics,
        card.parameters["model"]["embedding_dim"],
    )
    network.load_state_dict(load_file(weights))
    crops = []
    for block in dataset.iter_rows(directory, ["image", "width"]):
        crops += [
            model.prepare(data, card.field_um / width)
            for data, width in zip(block["image"], block["width"], strict=True)
        ]
        if len(crops) >= count:
            break
    batch = np.stack(crops[:count])
    with torch.inference_mode():
        expected = Served(network, card.temperature).eval()(torch.from_numpy(batch))
    found = model.run(batch, "type_probabilities", "characteristic_probabilities")
    return max(float(np.abs(f - e.numpy()).max()) if f.size else 0.0 for f, e in zip(found, expected[:2], strict=True))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    model_folder, weights, data = Path("models/recogniser"), Path("models/recogniser.safetensors"), Path("data")
    model = RecognitionModel(model_folder)
    difference = onnx_difference(model, weights, data)
    if difference > TOLERANCE:
        raise ModelError(
            f"ONNX differs from torch by {difference:.2e} (at most {TOLERANCE}); the model is not packaged"
        )
    shutil.copytree(model_folder, PACKAGE / "recogniser", dirs_exist_ok=True)
    pointers = {p.stem: yaml.safe_load(p.read_text())["outs"][0]["md5"] for p in sorted(data.glob("*.dvc"))}
    lineage = {
        "smearline": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "data": {"digest": model.card.data_digest, "dvc": pointers},
        "parameters": model.card.parameters,
        "metrics": json.loads(Path("evaluation/headline.json").read_text(encoding="utf-8")),
        "origin": model.card.origin,
        "contracts": {
            "recogniser": model.card.contract,
            "summary": differential.VERSION,
            "vocabulary": model.card.vocabulary,
        },
        "onnx_max_difference": difference,
        "intended_use": model.card.intended_use,
    }
    (PACKAGE / "lineage.json").write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
    print(f"packaged {PACKAGE / 'recogniser'}: ONNX equals torch to {difference:.1e}")


if __name__ == "__main__":
    main()
