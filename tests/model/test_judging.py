"""`evaluate` and `differential` with a packaged recogniser: what they write is a contract."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import picture, put

from smearline import (
    dataset,
    deletion,
    differential,
    evaluation,
    importing,
    pseudonyms,
    recogniser,
    recognition,
    sites,
    sources,
    vocabulary,
)
from smearline.confidence import Confidence
from smearline.errors import DataError, ModelError
from smearline.metrics.intervals import exact_bounds
from smearline.recognition import CARD_FILE, CONTRACT, ONNX_FILE, SEEN_FILE, ModelCard, RecognitionModel

TYPES = ("NEUT_SEG", "NEUT_BAND", "BLAST", "LYMPH")
VALUES = {"auer_rod": ("absent", "present"), "granule_type": ("nil", "small", "coarse")}


def model_folder(path: Path, values: dict[str, tuple[str, ...]]) -> Path:
    """A model folder with an untrained network: what it says is arbitrary, its form is not."""
    torch.manual_seed(0)
    path.mkdir()
    network = recogniser.Recogniser("tf_efficientnet_lite0", TYPES, values, 16, 64)
    recogniser.export_onnx(network, 1.0, 32, path / ONNX_FILE)
    card = ModelCard(
        contract=CONTRACT, vocabulary="v", types=TYPES, characteristics=values, field_um=12.0, size_px=32, embedding="e",
        temperature=1.0, origin="real", sites=("lab",), num_cells=1, data_digest="d", parameters={},
    )  # fmt: skip
    put(path / CARD_FILE, json.dumps(card.model_dump(mode="json")))
    seen = {
        "sha256": ["0"],
        "site": ["lab"],
        "patient": [None],
        "true_type": ["BLAST"],
        **{name: [said[0]] for name, said in values.items()},
    }
    pd.DataFrame(seen).astype("string").to_parquet(path / SEEN_FILE)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model", VALUES)


@pytest.fixture
def cells(tmp_path: Path, sites_folder: Path) -> Path:
    """Twelve cells of two smears, parents and an unlabelled one among them, and two without a smear at a site without a scale."""
    rows = ["file,type,patient,smear,auer_rod"]
    for number in range(12):
        kind = ("BLAST", "NEUT", "LYMPH", "")[number % 4]
        put(tmp_path / "raw" / f"{number}.png", picture(number, kind="PNG"))
        rows.append(f"{number}.png,{kind},p{number % 2},s{number % 2},{'present' if kind == 'BLAST' else ''}")
    put(tmp_path / "raw" / "labels.csv", "\n".join(rows))
    importing.import_source(sources.load("folder"), tmp_path / "raw", sites.load("lab"), tmp_path / "d")
    for number in (20, 21):
        put(tmp_path / "other" / "LYMPH" / f"{number}.png", picture(number, kind="PNG"))
    importing.import_source(sources.load("folder"), tmp_path / "other", sites.load("unscaled"), tmp_path / "d")
    return tmp_path / "d"


def test_the_columns_of_predictions(folder: Path, cells: Path, tmp_path: Path):
    figures = evaluation.evaluate(RecognitionModel(folder), cells, tmp_path / "out")
    found = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    types = [f"p_{t}" for t in vocabulary.load().types]
    expected = ["sha256", "site", "patient", "smear", "true_type", "predicted_type", *types]
    expected += ["c_auer_rod", "p_auer_rod_absent", "p_auer_rod_present"]
    expected += ["c_granule_type", *(f"p_granule_type_{v}" for v in VALUES["granule_type"]), "scale_assumed"]
    assert list(found.columns)[: len(expected)] == expected
    assert len(found) == 14
    np.testing.assert_allclose(found[types].sum(axis=1), 1.0, atol=1e-4)
    assert set(found["true_type"].dropna()) == {"BLAST", "NEUT", "LYMPH"}
    assert found["true_type"].isna().sum() == 3
    assert found.set_index("site")["scale_assumed"].groupby("site").all().to_dict() == {"lab": False, "unscaled": True}
    assert (found["predicted_type"] == [TYPES[i] for i in found[[f"p_{t}" for t in TYPES]].to_numpy().argmax(1)]).all()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == figures
    assert "<html" in (tmp_path / "out" / "evaluation.html").read_text(encoding="utf-8")


def test_the_folder_of_the_images_may_be_named_itself(folder: Path, cells: Path, tmp_path: Path):
    for name, data in (("whole", cells), ("images", cells / "cells")):
        evaluation.evaluate(RecognitionModel(folder), data, tmp_path / name)
    pages = [(tmp_path / name / "evaluation.html").read_text(encoding="utf-8") for name in ("whole", "images")]
    assert "Cell labelled" in pages[0] and pages[0] == pages[1]


@pytest.mark.mission(
    "a model says of each cell whether it is sure, which types it does not rule out, and whether it is unlike"
)
def test_a_model_with_limits_says_how_sure_it_is_and_the_page_measures_it(folder: Path, cells: Path, tmp_path: Path):
    plain = evaluation.evaluate(RecognitionModel(folder), cells, tmp_path / "plain")
    before = pd.read_parquet(tmp_path / "plain" / "predictions.parquet").set_index("sha256")
    card = json.loads((folder / CARD_FILE).read_text())
    limits = Confidence(
        coverage=0.9, temperatures={"lab": 2.0}, limits={"*": (0.0, 1.1, 0.0, 0.0)}, num_cells={"*": (9, 9, 9, 9)}, named_from=0.0,
        error=0.1, named=0.9, centres=((0.0,) * 16, None, None, None), whitening=tuple(np.eye(16).tolist()),
    )  # fmt: skip
    put(folder / CARD_FILE, json.dumps({**card, "confidence": limits.model_dump(mode="json")}))
    figures = evaluation.evaluate(RecognitionModel(folder), cells, tmp_path / "out")
    found = pd.read_parquet(tmp_path / "out" / "predictions.parquet").set_index("sha256")
    flatter = found[found["site"] == "lab"][[f"p_{t}" for t in TYPES]] ** 2
    np.testing.assert_allclose(
        flatter.div(flatter.sum(axis=1), axis=0), before.loc[flatter.index, flatter.columns], atol=1e-4
    )
    assert "NEUT_BAND" in set(found["predicted_type"]), "what it is called is not ruled out, whatever the limit"
    for said, called in zip(found["type_set"], found["predicted_type"], strict=True):
        assert said.split() == [t for t in TYPES if t != "NEUT_BAND" or t == called]
    assert (found["named"] == (found["unlike"] <= 1)).all()
    sure = figures["sureness"]["overall"]
    assert 3 < sure["set_size"] <= 4 and sure["coverage"]["value"] == 1
    assert sure["named"]["value"] == pytest.approx(found.dropna(subset=["true_type"])["named"].mean())
    assert "coverage" not in plain["sureness"]["overall"] and plain["sureness"]["overall"]["curve"][-1]["answered"] == 1
    page = (tmp_path / "out" / "evaluation.html").read_text(encoding="utf-8")
    assert "Sets that hold the label" in page and "made to hold the right type for 90.0" in page


def test_predictions_have_the_same_types_of_columns_whatever_is_known(folder: Path, cells: Path, tmp_path: Path):
    model = RecognitionModel(folder)
    evaluation.evaluate(model, cells, tmp_path / "all")
    lone = dataset.index(cells).query("site == 'unscaled'")["sha256"]
    evaluation.evaluate(model, cells, tmp_path / "some", keep=set(lone))
    schemas = [pq.read_schema(tmp_path / n / "predictions.parquet").remove_metadata() for n in ("all", "some")]
    assert schemas[0] == schemas[1]


def test_trained_cells_and_cells_of_trained_patients_are_not_judged(folder: Path, cells: Path, tmp_path: Path):
    index = dataset.index(cells)
    lone = index.query("site == 'unscaled'").iloc[[0]]
    patient = index.query("site == 'lab'").iloc[[0]]
    seen = pd.concat([lone.assign(patient=None), patient.assign(sha256="another cell of this patient")])
    seen = seen[["sha256", "site", "patient"]].assign(true_type="BLAST", auer_rod="absent", granule_type="nil")
    seen.astype("string").to_parquet(folder / SEEN_FILE)
    figures = evaluation.evaluate(RecognitionModel(folder), cells, tmp_path / "out")
    assert figures["context"]["num_cells_seen_in_training"] == 7
    assert figures["counts"]["cells"] == 7


def test_a_characteristic_that_was_not_trained_is_named_as_such(cells: Path, tmp_path: Path):
    model = RecognitionModel(model_folder(tmp_path / "plain", {}))
    figures = evaluation.evaluate(model, cells, tmp_path / "out")
    assert figures["characteristics"]["auer_rod"]["trained"] is False
    assert not [c for c in pd.read_parquet(tmp_path / "out" / "predictions.parquet") if c.startswith("c_")]


def test_without_labels_there_are_predictions_and_no_figures(folder: Path, tmp_path: Path, sites_folder: Path):
    put(tmp_path / "raw" / "x.png", picture(1, kind="PNG"))
    importing.import_source(sources.load("folder"), tmp_path / "raw", sites.load("lab"), tmp_path / "d")
    put(tmp_path / "out" / "evaluation.html", "of an earlier run")
    figures = evaluation.evaluate(RecognitionModel(folder), tmp_path / "d", tmp_path / "out")
    assert "no undisputed label" in figures["not_judged"]
    assert len(pd.read_parquet(tmp_path / "out" / "predictions.parquet")) == 1
    assert "not_judged" in json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert not (tmp_path / "out" / "evaluation.html").exists()


def test_a_smear_is_a_row_with_shares_and_their_intervals(folder: Path, cells: Path, tmp_path: Path):
    summary = differential.differential(RecognitionModel(folder), cells, tmp_path / "d.parquet")
    found = pd.read_parquet(tmp_path / "d.parquet")
    assert len(found) == len(summary) == 2
    assert found["num_cells"].sum() == 12, "the two without a smear are in no differential"
    shares = found[[f"share_{t}" for t in vocabulary.load().differential_types]]
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    for code in TYPES:
        assert (found[f"low_{code}"] <= found[f"share_{code}"]).all()
        assert (found[f"share_{code}"] <= found[f"high_{code}"]).all()
    with pytest.raises(DataError, match=r"\.parquet or \.csv"):
        differential.differential(RecognitionModel(folder), cells, tmp_path / "d.xlsx")


def test_the_exact_interval_is_clopper_and_pearsons():
    low, high = exact_bounds(np.array([5, 0]), np.array([100, 100]))
    assert (low[0], high[0]) == (pytest.approx(0.0164, abs=2e-4), pytest.approx(0.1128, abs=2e-4))
    assert (low[1], high[1]) == (0.0, pytest.approx(0.0362, abs=2e-4))


def test_a_damaged_model_folder_says_what_is_wrong(folder: Path):
    package = folder.parent / "package"
    package.mkdir()
    folder.rename(package / "recogniser")
    with pytest.raises(ModelError, match="did you mean"):
        RecognitionModel(package)
    put(package / "recogniser" / ONNX_FILE, b"no onnx")
    with pytest.raises(ModelError, match="cannot be loaded"):
        RecognitionModel(package / "recogniser")
    for text in ("{}", "[]"):
        put(package / "recogniser" / CARD_FILE, text)
        with pytest.raises(ModelError, match="no model card"):
            RecognitionModel(package / "recogniser")


def test_a_whole_data_set_is_recognised_shard_by_shard_and_goes_on_where_it_stood(
    folder: Path, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from pipelines import recognise as job
    from pipelines import training

    with monkeypatch.context() as before:
        before.delenv(sites.SITES_VARIABLE)
        training.start_ray(2, 1)  # as another job of this process, or a cluster, has it: without these site files

    def run(model: Path = folder) -> dict:
        return job.recognise(model, cells, tmp_path / "out", workers=2)

    assert run() | {"seconds": 0} == {"shards": 2, "there_before": 0, "images": 14, "seconds": 0}
    found = pd.concat(pd.read_parquet(path) for path in sorted((tmp_path / "out").glob("*.parquet")))
    expected, vectors = recognition.recognise(RecognitionModel(folder), cells)
    named = [dict(zip(part["sha256"], part["predicted_type"], strict=True)) for part in (found, expected)]
    assert named[0] == named[1] and len(named[0]) == 14
    assert np.stack(found["embedding"]).shape == vectors.shape

    gone = sorted((tmp_path / "out").glob("*.parquet"))[0]
    content = gone.read_bytes()
    gone.rename(gone.with_name(f".{gone.name}.1.unfinished"))  # killed while it was written
    assert run()["shards"] == 1 and gone.read_bytes() == content
    assert sorted(p.name for p in (tmp_path / "out").glob("*")) == sorted(
        [".lock", *(p.name for p in dataset.shards(cells))]
    )
    site = sites.directory() / "unscaled.yaml"
    put(site, site.read_text(encoding="utf-8").replace("assumed_microns_per_px: 0.2", "assumed_microns_per_px: 0.1"))
    assert run()["shards"] == 1, "it was read at another scale"
    patient = pseudonyms.pseudonym(pseudonyms.key(sites.load("lab")), "lab", "patient", "p0")
    deletion.forget(cells, "lab", patient, "asked for it", datetime.now(UTC))
    for shards, act in (
        (1, None),
        (1, deletion.compact),
    ):  # deleted, then taken out of the bytes: the shard has another name
        if act:
            act(cells)
        assert run()["shards"] == shards
        found = pd.concat(pd.read_parquet(path) for path in (tmp_path / "out").glob("*.parquet"))
        assert sorted(found["sha256"]) == sorted(dataset.index(cells, ["sha256"])["sha256"]) and len(found) == 8
    whole = next((tmp_path / "out").glob("*.parquet"))
    older = pq.read_table(whole)  # as a version wrote it that knew one column less
    pq.write_table(older.drop_columns("type_untempered").replace_schema_metadata(older.schema.metadata), whole)
    with pytest.raises(DataError, match=r"another version of this software .*type_untempered"):
        run()
    other = model_folder(tmp_path / "other_model", {})
    with pytest.raises(DataError, match="made by another model"):
        run(other)


def test_a_smear_of_two_patients_has_no_differential():
    about = {"site": "lab", "smear": "1", "predicted_type": "BLAST", "scale_assumed": False}
    cells = pd.DataFrame([about | {"patient": who} for who in ("a", "b", None)])
    with pytest.raises(DataError, match="smear 1 of site 'lab' has cells of 2 patients"):
        differential.summarise(cells, np.zeros((3, 4), np.float16))
    for rest in (cells[1:], cells[:0:-1]):
        found = differential.summarise(rest, np.zeros((2, 4), np.float16))
        assert found[["num_cells", "patient"]].to_numpy().tolist() == [[2, "b"]], "whichever cell names him"


def test_a_recipe_is_its_parameters_its_cells_and_their_labels():
    seen = pd.DataFrame({"sha256": ["a", "b"], "true_type": ["BLAST", None]})
    made = recognition.recipe_of({"train": {"lr": 1}, "gate": {}}, seen)
    assert made == recognition.recipe_of({"gate": {"margin": 1}, "train": {"lr": 1}}, seen[::-1].astype("string"))
    others = [
        ({"train": {"lr": 2}}, seen),
        ({"train": {"lr": 1}}, seen[:1]),
        ({"train": {"lr": 1}}, seen.fillna("MONO")),
    ]
    assert made not in [recognition.recipe_of(*other) for other in others]
