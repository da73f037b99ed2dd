"""Readings by a real model: what it was not taught it does not say."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, put
from serving_fixtures import make_package

from serving import bento, send
from serving.cases import Case
from serving.reading import Reader
from smearline import plain_json
from smearline import sites as site_files
from smearline.confidence import Confidence
from smearline.errors import ModelError
from smearline.recognition import CARD_FILE, RecognitionModel

pytest_plugins = ["serving_fixtures"]


def reader(package: Path) -> Reader:
    model = RecognitionModel(package / "recogniser", threads=1)

    async def recognise(crops):
        return np.concatenate(
            model.run(crops, "type_probabilities", "characteristic_probabilities", "embedding"), axis=1
        )

    return Reader(package, recognise)


def said(package: Path, site: str) -> list[dict]:
    one, where = reader(package), site_files.load(site)
    reading = asyncio.run(one.read([picture(i) for i in range(70)], where, Case("c", site, "s", None), None))
    assert reading.numbers == tuple(range(70))  # more than one chunk, in order
    return one.cells(reading, where)


def test_a_characteristic_without_real_labels_is_not_served_on_real_cells(
    tmp_path: Path, sites: Path, monkeypatch: pytest.MonkeyPatch
):
    """The real model's training cells have labels for nucleus_shape and none for auer_rod."""
    monkeypatch.setenv("SMEARLINE_SITES", str(sites))
    monkeypatch.setenv("SMEARLINE_KEY_FILE", str(tmp_path / "key"))
    package = make_package(tmp_path / "real", origin="real", diagnoses=None)
    for site, auer_rods_are_said in (("lab", False), ("sim_north", True)):
        found = {n: v for cell in said(package, site) for n, v in cell["characteristics"].items()}
        assert found["nucleus_shape"]["value"] in ("segmented-bilobed", "unsegmented-round")
        assert found["cell_size"] == "not trained"  # the model has no such output
        if "auer_rod" in found:
            assert (found["auer_rod"] != "not trained") == auer_rods_are_said


def test_a_possible_blast_is_said_from_the_models_own_limit_on(
    tmp_path: Path, sites: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SMEARLINE_SITES", str(sites))
    monkeypatch.setenv("SMEARLINE_KEY_FILE", str(tmp_path / "key"))
    package = make_package(tmp_path / "package", diagnoses=None)
    assert not any("possible_blast" in cell for cell in said(package, "sim_north")), "a model without limits says none"
    chances = sorted(cell["probabilities"]["BLAST"] for cell in said(package, "sim_north"))
    types = len(plain_json.read(package / "recogniser" / CARD_FILE)["types"])
    limits = Confidence(
        coverage=0.9, temperatures={}, limits={"*": (0.0,) * types}, num_cells={"*": (9,) * types}, named_from=0.0, error=0.0,
        named=1.0, centres=(None,) * types, whitening=(), blast_from=chances[40],
    )  # fmt: skip
    card = plain_json.read(package / "recogniser" / CARD_FILE) | {"confidence": limits.model_dump(mode="json")}
    plain_json.write(package / "recogniser" / CARD_FILE, card)
    cells = said(package, "sim_north")
    assert {c["possible_blast"] for c in cells} == {False, True}
    assert all(c["possible_blast"] == (c["probabilities"]["BLAST"] >= chances[40]) for c in cells)


def test_models_that_must_not_be_served_together_do_not_start(
    tmp_path: Path, sites: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SMEARLINE_SITES", str(sites))
    with pytest.raises(ModelError, match="learned from real patients"):
        reader(make_package(tmp_path / "mixed", origin="real", diagnoses="simulated"))


def test_the_bento_needs_pinned_versions_and_no_torch():
    found = bento.requirements()
    names = {line.split("==")[0].casefold() for line in found}
    assert all("==" in line for line in found)
    assert {"bentoml", "fastapi", "onnxruntime", "scikit-learn", "starlette"} <= names
    assert not names & {"torch", "ray", "dvc", "prefect", "evidently", "optuna"}


def test_what_is_sent_has_its_blood_count_and_what_has_no_smear_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    put(tmp_path / "labels.csv", "file,smear,patient\na.jpg,S2 , p\nb.jpg,S3,p\n")
    put(tmp_path / "xn.csv", "Sample No.,WBC(10^9/L)\nS2,4.2\nS9,5\n\n")
    first, second = send.smears(tmp_path)
    assert first[0] == {"smear": "S2", "patient": "p"} and first[2] and b"S2,4.2" in first[2]
    assert second[2] is None
    assert "1 samples of xn.csv are of no smear here, first S9" in capsys.readouterr().err
