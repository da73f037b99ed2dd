"""Stage train_cells: train the recogniser and write its model folder."""

from __future__ import annotations

import json

import pandas as pd
from safetensors.torch import save_file

from pipelines import training
from pipelines.cells import MODEL, WEIGHTS, in_force, split_cells
from smearline import dataset, reader, recogniser, vocabulary
from smearline.recognition import CARD_FILE, CONTRACT, ONNX_FILE, SEEN_FILE, ModelCard


def main() -> None:
    params = in_force()
    frame = split_cells(params)
    usable = frame[frame["split"] == "train"]
    types, characteristics = reader.trainable(usable)
    print(
        f"training on {len(usable)} cells, validating on {(frame['split'] == 'val').sum()}: "
        f"{len(types)} types, {len(characteristics)} characteristics",
        flush=True,
    )
    trained = training.fit(frame, params)
    temperature = trained.history[-1]["temperature"]

    network = recogniser.Recogniser(params.model.backbone, types, characteristics, params.model.embedding_dim)
    network.load_state_dict(trained.state)
    MODEL.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, WEIGHTS)
    recogniser.export_onnx(network, temperature, params.image.size_px, MODEL / ONNX_FILE)
    card = ModelCard(
        contract=CONTRACT,
        vocabulary=vocabulary.load().version,
        types=types,
        characteristics=characteristics,
        field_um=params.image.field_um,
        size_px=params.image.size_px,
        embedding=f"{recogniser.PROJECTION_VERSION}-{params.model.embedding_dim}",
        temperature=temperature,
        origin="simulated" if (usable["origin"] == "simulated").any() else "real",
        sites=tuple(sorted(usable["site"].unique())),
        num_cells=len(usable),
        data_digest=dataset.digest(usable),
        parameters=params.model_dump(mode="json"),
    )
    (MODEL / CARD_FILE).write_text(json.dumps(card.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    # The validation cells chose the temperature, so they are no fair test either.
    seen = frame[frame["split"] != "test"]
    seen[["sha256", "site", "patient", "true_type", *characteristics]].to_parquet(MODEL / SEEN_FILE, index=False)
    pd.DataFrame(trained.history).to_csv(MODEL.parent / "history.csv", index=False)


if __name__ == "__main__":
    main()
