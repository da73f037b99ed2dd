"""A tiny package of real models, and the service started on it as users start it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from conftest import CHECKOUT, picture, put

from serving import package
from smearline import dataset, diagnosis, differential, images, recogniser, recognition, settings, tokens, vocabulary

TYPES = tuple(vocabulary.load().types)
VALUES = {"auer_rod": ("absent", "present"), "nucleus_shape": ("segmented-bilobed", "unsegmented-round")}
SIZE_PX = 32


def site_files(folder: Path) -> Path:
    """'lab' (real, research), 'hospital' (real, clinical, 30 days' retention), and the checkout's simulated 'sim_north'."""
    common = {
        "laboratory": "t",
        "scanner": "s",
        "stain": "s",
        "microns_per_px": 0.4,
        "scale_source": "t",
        "origin": "real",
    }
    lab = {"name": "lab", "use": "research", "identifiers": "private"}
    hospital = {"name": "hospital", "use": "clinical", "identifiers": "public", "retention_days": 30}
    for fields in (lab, hospital):
        put(folder / f"{fields['name']}.yaml", yaml.safe_dump(common | fields))
    put(folder / "sim_north.yaml", (CHECKOUT / "sites" / "sim_north.yaml").read_bytes())
    return folder


def make_package(folder: Path, origin: str = "simulated", seed: int = 0, diagnoses: str | None = "simulated") -> Path:
    """recogniser/, diagnosis/ and lineage.json: untrained weights, but the real formats; `origin` real learned from 'lab',
    where only nucleus_shape has labels."""
    torch.manual_seed(seed)
    network = recogniser.Recogniser("tf_efficientnet_lite0", TYPES, VALUES, 8, 64).eval()
    (folder / "recogniser").mkdir(parents=True)
    recogniser.export_onnx(network, 1.0, SIZE_PX, folder / "recogniser" / recognition.ONNX_FILE)
    site = "lab" if origin == "real" else "sim_north"
    shapes = ["segmented-bilobed", "unsegmented-round"]
    seen = {
        "sha256": ["0", "1"],
        "site": site,
        "patient": None,
        "true_type": "BLAST",
        "nucleus_shape": shapes,
        "auer_rod": None,
    }
    pd.DataFrame(seen).to_parquet(folder / "recogniser" / recognition.SEEN_FILE)
    card = recognition.ModelCard(
        contract=recognition.CONTRACT, vocabulary=vocabulary.load().version, types=TYPES, characteristics=VALUES,
        field_um=25.0, size_px=SIZE_PX, embedding="projection-1", temperature=1.0, origin=origin, sites=(site,),
        num_cells=2, data_digest="d", parameters={},
    )  # fmt: skip
    put(folder / "recogniser" / recognition.CARD_FILE, card.model_dump_json())
    model = recognition.RecognitionModel(folder / "recogniser", threads=1)
    if diagnoses:
        summary, groups = smears(model)
        params = settings.load(CHECKOUT / "params.yaml").diagnosis.model_copy(
            update={"min_cells": 4, "min_probability": 0.0}
        )
        diagnosis.write(
            folder / "diagnosis", summary, None, groups, params, origin=diagnoses,
            not_available={"MDS": "not trained on real patients"}, embedding_version=model.embedding_version,
        )  # fmt: skip
    lineage = {"origin": origin, "commit": "c", "diagnosis": diagnoses and {"origin": diagnoses}}
    lineage |= {"diagnosis_absent_because": None if diagnoses else "too few patients", "metrics": {}}
    put(folder / "lineage.json", json.dumps({"version": package.version(folder, lineage), **lineage}))
    return folder


def smears(model: recognition.RecognitionModel) -> tuple[pd.DataFrame, pd.Series]:
    """What the recogniser sees on 12 smears of drawn cells."""
    parts = []
    for number in range(12):
        crops = np.stack([model.prepare(picture(100 * number + i), 0.4) for i in range(8)])
        outputs = model.run(crops, "type_probabilities", "characteristic_probabilities", "embedding")
        whose = {"site": "sim_north", "patient": f"p{number}", "smear": f"s{number}", "scale_assumed": False}
        metadata = [{"sha256": f"{number}-{i}", **whose} for i in range(8)]
        parts.append(
            differential.summarise(*recognition.split(recognition.table_of(model.card, metadata, crops, *outputs)))
        )
    summary = pd.concat(parts, ignore_index=True).assign(embedding_version=model.embedding_version)
    return summary, pd.Series(["AML", "HEALTHY"] * 6)


def write_cells(data: Path, count: int = 6) -> None:
    """A data set of one smear, from which `make serve` takes its examples."""
    with dataset.CellWriter(data / "cells", "sim_north") as writer:
        for i in range(count):
            jpeg = picture(500 + i)
            pixels = images.check(jpeg)
            writer.add(dict.fromkeys(dataset.CELLS.names) | {
                "sha256": f"{i}", "image": jpeg, "width": 64, "height": 64, "site": "sim_north", "smear": "a", "patient": "b",
                "origin": "simulated", "thumbnail": images.thumbnail(pixels).tobytes(),
            })  # fmt: skip


@dataclass
class Running:
    """A service that `serving.run` keeps up."""

    workspace: Path
    process: subprocess.Popen[str]
    port: int
    said: str

    @property
    def home(self) -> Path:
        return self.workspace / ".smearline" / "service"

    def client(self, token: str | None = None) -> httpx.Client:
        token = token or (self.home / "token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60)

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def start(workspace: Path, sites: Path) -> Running:
    """`make serve` with this interpreter, in which torch cannot be imported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocked = put(workspace / "blocked" / "torch.py", "raise ImportError('the service needs no torch')").parent
    keys = {"SMEARLINE_SITES": str(sites), "SMEARLINE_KEY_FILE": str(workspace / "pseudonym.key")}
    left_out = ("SMEARLINE_HOME", "SMEARLINE_STORE", "BENTOML_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | keys | {"PYTHONPATH": str(blocked)}
    command = [sys.executable, "-m", "serving.run", "--workspace", str(workspace), "--port", str(port)]
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "/v1/smears/" in line:
            return Running(workspace, process, port, said)
    raise AssertionError(f"the service did not start:\n{said}")


def stop(running: Running) -> None:
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(40)


@pytest.fixture(scope="session")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_files(tmp_path_factory.mktemp("sites"))


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory, sites: Path) -> tuple[Path, Path]:
    """Two packages of simulated origin."""
    folder = tmp_path_factory.mktemp("packages")
    return make_package(folder / "one"), make_package(folder / "two", seed=1, diagnoses=None)


@pytest.fixture(scope="session")
def bentos(tmp_path_factory: pytest.TempPathFactory, packages: tuple[Path, Path]) -> Path:
    """A BentoML home with both, built as users build them."""
    store = tmp_path_factory.mktemp("bentoml")
    for one in packages:
        command = [sys.executable, "-m", "serving.bento", "--package", str(one), "--store", str(store)]
        subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)
    return store


def version_of(one: Path) -> str:
    return str(json.loads((one / "lineage.json").read_text())["version"])


def make_workspace(folder: Path, bentos: Path, one: Path) -> Path:
    (folder / ".smearline").mkdir(parents=True)
    (folder / ".smearline" / "bentoml").symlink_to(bentos)
    put(folder / ".smearline" / "production", version_of(one))
    write_cells(folder / "data")
    return folder


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory, bentos: Path, packages: tuple[Path, Path], sites: Path
) -> Iterator[Running]:
    running = start(make_workspace(tmp_path_factory.mktemp("work") / "space", bentos, packages[0]), sites)
    yield running
    stop(running)


@pytest.fixture
def client(service: Running) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


def token(service: Running, name: str, roles: list[str], at: list[str] | None = None) -> str:
    return tokens.create(service.home / "tokens.yaml", name, roles, at)


def parts(*data: bytes) -> list[tuple[str, Any]]:
    return [("images", ("x", one)) for one in data]


def diagnose(client: httpx.Client, smear: str, *data: bytes, key: str | None = None, **more: Any) -> httpx.Response:
    request = {"site": "sim_north", "smear": smear, **more}
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/v1/diagnose", data={"request": json.dumps(request)}, files=parts(*data), headers=headers)


def wait_for(condition: Any, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
