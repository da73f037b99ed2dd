"""Stage calibrate: what the trained recogniser may be sure of, learned on the validation cells with the model as it is served."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd

from pipelines.cells import MODEL, TRAINED, in_force, split_cells
from smearline import confidence, plain_json, reader, settings
from smearline.metrics.blasts import false_alarm_share
from smearline.recognition import CARD_FILE, RecognitionModel, recognise

_CENTRE = 200
"""Training cells of a type from which its centre is learned."""


def main() -> None:
    params = in_force()
    calibrate(TRAINED, MODEL, split_cells(params), params)


def calibrate(trained: Path, out: Path, frame: pd.DataFrame, params: settings.Settings) -> None:
    """A copy of the model folder with the limits that the validation cells of `frame`, all in the workspace's data, teach."""
    model = RecognitionModel(trained)
    types = model.card.types
    frame = frame[~frame["conflicted"]]
    taught = frame[(frame["split"] == "train") & frame["true_type"].isin(types)].groupby("true_type").head(_CENTRE)
    watched = frame[(frame["split"] == "val") & frame["true_type"].notna()]
    found = None
    if len(watched):
        predictions, embeddings = recognise(model, params.data.folder, keep={*taught["sha256"], *watched["sha256"]})
        row_of = pd.Series(range(len(predictions)), predictions["sha256"])
        rows = row_of[watched["sha256"]].to_numpy()
        found = confidence.fit(
            predictions[[f"p_{t}" for t in types]].to_numpy("float32")[rows],
            reader.targets(watched, types, {})[0],
            list(watched["site"]),
            embeddings[rows],
            embeddings[row_of[taught["sha256"]].to_numpy()],
            pd.Index(types).get_indexer(pd.Index(taught["true_type"])),
            **params.confidence.model_dump(),
        )
    if found and "BLAST" in types:
        said = predictions["predicted_type"].iloc[rows].eq("BLAST").set_axis(watched.index)
        above = false_alarm_share(watched["site"], watched["smear"], watched["true_type"].eq("BLAST"), said)
        found = found.model_copy(update={"blasts_above": above})
    shutil.copytree(trained, out, dirs_exist_ok=True)
    plain_json.write(out / CARD_FILE, model.card.model_copy(update={"confidence": found}).model_dump(mode="json"))
    if found is None:
        print("no validation cell is labelled: every cell is named, and nothing is said of how sure that is")
    else:
        few = [t for t, n in zip(types, found.num_cells, strict=True) if n < 1 / (1 - found.coverage) - 1]
        print(f"of {len(watched)} validation cells {found.named:.1%} are named, {found.error:.1%} of them wrongly")
        print(f"temperatures {found.temperatures}; too few cells for a limit of their own: {', '.join(few) or 'none'}")


if __name__ == "__main__":
    main()
