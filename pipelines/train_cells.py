"""Stage train_cells: train the recogniser and write its model folder, to which `calibrate` adds what it may be sure of."""

from pathlib import Path

import pandas as pd
import yaml

from pipelines import training
from pipelines.cells import OVERLAY, TRAINED, WEIGHTS, in_force, split_cells
from smearline import dataset, plain_json, reader, recogniser, settings, vocabulary
from smearline.initial_weights import save_weights
from smearline.recognition import CARD_FILE, CONTRACT, ONNX_FILE, SEEN_FILE, ModelCard


def main() -> None:
    params = in_force()
    if tuned := yaml.safe_load(OVERLAY.read_text(encoding="utf-8")):
        print(f"{OVERLAY} is put over params.yaml: {tuned}")
    frame = split_cells(params)
    usable = frame[frame["split"] == "train"]
    types, characteristics = reader.trainable(usable)
    print(
        f"training on {len(usable)} cells, validating on {(frame['split'] == 'val').sum()}: "
        f"{len(types)} types, {len(characteristics)} characteristics",
        flush=True,
    )
    trained = training.fit(frame, params)
    network = recogniser.of_settings(params, types, characteristics)
    network.load_state_dict(trained.state)
    write(network, trained.history[-1]["temperature"], frame, params, TRAINED, WEIGHTS)
    pd.DataFrame(trained.history).to_csv(TRAINED.parent / "history.csv", index=False)


def write(
    network: recogniser.Recogniser,
    temperature: float,
    frame: pd.DataFrame,
    params: settings.Settings,
    folder: Path,
    weights: Path,
) -> None:
    """A model folder of what was trained on `frame`, and its weights."""
    usable = frame[frame["split"] == "train"]
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(network, weights)
    recogniser.export_onnx(network, temperature, params.image.size_px, folder / ONNX_FILE, params.model.views)
    card = ModelCard(
        contract=CONTRACT,
        vocabulary=vocabulary.load().version,
        types=network.types,
        characteristics=network.characteristics,
        field_um=params.image.field_um,
        size_px=params.image.size_px,
        embedding=f"{recogniser.PROJECTION_VERSION}-{params.model.embedding_dim}",
        temperature=temperature,
        views=params.model.views,
        origin="simulated" if (usable["origin"] == "simulated").any() else "real",
        sites=tuple(sorted(usable["site"].unique())),
        num_cells=len(usable),
        data_digest=dataset.digest(usable),
        parameters=params.model_dump(mode="json"),
    )
    plain_json.write(folder / CARD_FILE, card.model_dump(mode="json"))
    # The validation cells chose the temperature, so they are no fair test either.
    seen = frame[frame["split"] != "test"]
    about = ["sha256", "site", "patient", "smear", "true_type", *network.characteristics]
    before = seen_before(params.model.weights)
    pd.concat([seen[about], *before]).drop_duplicates("sha256").to_parquet(folder / SEEN_FILE, index=False)


def seen_before(weights: str) -> list[pd.DataFrame]:
    """What another recogniser, from whose weights training begins, was trained on, as its folder beside them says."""
    list_of_it = Path(weights).with_suffix("") / SEEN_FILE
    if not weights.endswith(".safetensors") or not Path(weights).is_file():
        return []
    if list_of_it.is_file():
        return [pd.read_parquet(list_of_it)]
    print(
        f"caution: there is no {list_of_it}, so cells of the test that {weights} were trained on are judged as new ones"
    )
    return []


if __name__ == "__main__":
    main()
