"""Stage package: both models as they are handed over, checked against each other and against the network that was
exported, and a bento of them.

package/recogniser/   the model folder
package/diagnosis/    the diagnostic model's folder, where there is one
package/lineage.json  data, code, parameters and metrics that stand behind them, and the version: a digest of all of it
"""

import hashlib
import json
import shutil
import subprocess
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from serving import bento
from smearline import __version__, dataset, differential, plain_json
from smearline.diagnosis import ABSENT_FILE, DiagnosisModel, check_pair
from smearline.errors import ModelError
from smearline.recogniser import Recogniser, Served
from smearline.recognition import RecognitionModel

PACKAGE = Path("package")
TOLERANCE = 1e-3
"""Largest difference of a probability between ONNX Runtime and torch that is accepted."""
_COMPARED = 64
"""Cells on which both are run."""


def onnx_difference(model: RecognitionModel, weights: Path, directory: Path) -> float:
    """The largest absolute difference of any probability between the ONNX model and the torch network on real cells."""
    card, params = model.card, model.card.parameters["model"]
    network = Recogniser(params["backbone"], card.types, card.characteristics, params["embedding_dim"], card.size_px)
    network.load_state_dict(load_file(weights))
    blocks = dataset.iter_rows(directory, ["image", "width"])
    rows = chain.from_iterable(zip(block["image"], block["width"], strict=True) for block in blocks)
    batch = np.stack([model.prepare(data, card.field_um / width) for data, width in islice(rows, _COMPARED)])
    with torch.inference_mode():
        expected = Served(network, card.temperature, card.views).eval()(torch.from_numpy(batch))
    found = model.run(batch, "type_probabilities", "characteristic_probabilities")
    return max(float(np.abs(f - e.numpy()).max()) if f.size else 0.0 for f, e in zip(found, expected[:2], strict=True))


def version(package: Path, lineage: dict[str, Any]) -> str:
    """The first 12 hex digits of SHA-256 over the lineage and the name and bytes of every other file."""
    total = hashlib.sha256(json.dumps(lineage, sort_keys=True).encode())
    for path in sorted(p for p in package.rglob("*") if p.is_file() and p != package / "lineage.json"):
        total.update(path.relative_to(package).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def main() -> None:
    recogniser, weights, data = Path("models/recogniser"), Path("models/recogniser.safetensors"), Path("data")
    diagnosis, absent = Path("models/diagnosis"), Path("models/diagnosis") / ABSENT_FILE
    model = RecognitionModel(recogniser)
    difference = onnx_difference(model, weights, data)
    if difference > TOLERANCE:
        said = f"ONNX differs from torch by {difference:.2e} (at most {TOLERANCE})"
        raise ModelError(f"{said}; the model is not packaged")
    card = None if absent.exists() else DiagnosisModel(diagnosis).card
    if card:
        check_pair(model, card)
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(recogniser, PACKAGE / "recogniser")
    if card:
        shutil.copytree(diagnosis, PACKAGE / "diagnosis")
    headlines = [Path("evaluation") / name for name in ("headline.json", "diagnosis_headline.json")]
    metrics = [plain_json.read(path) for path in headlines]
    judged = plain_json.read(Path("evaluation/diagnosis.json"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    lineage = {
        "smearline": __version__,
        "commit": commit.strip(),
        "data": {
            "digest": model.card.data_digest,
            "dvc": {p.stem: yaml.safe_load(p.read_text())["outs"][0]["md5"] for p in sorted(data.glob("*.dvc"))},
        },
        "parameters": {**model.card.parameters, "diagnosis": card and card.parameters},
        "metrics": {name: value for part in metrics for name, value in part.items()},
        "origin": "simulated" if "simulated" in (model.card.origin, card and card.origin) else "real",
        "contracts": {
            "recogniser": model.card.contract,
            "diagnosis": card and card.contract,
            "summary": differential.VERSION,
            "embedding": model.embedding_version,
            "vocabulary": model.card.vocabulary,
        },
        "diagnosis": card
        and {
            "groups": card.groups,
            "origin": card.origin,
            "data_digest": card.data_digest,
            "evidence": judged["evidence"],
        },
        "diagnosis_absent_because": None if card else plain_json.read(absent)["because"],
        "onnx_max_difference": difference,
        "intended_use": model.card.intended_use,
    }
    lineage = {"version": version(PACKAGE, lineage), **lineage}
    plain_json.write(PACKAGE / "lineage.json", lineage)
    tag = bento.build(PACKAGE)
    print(f"packaged {', '.join(('recogniser', 'diagnosis') if card else ('recogniser',))} as {tag}: ", end="")
    print(f"ONNX equals torch to {difference:.1e}")


if __name__ == "__main__":
    main()
