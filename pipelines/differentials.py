"""Stage differentials: the whole data set recognised, a row a cell and a row a smear."""

import pandas as pd

from pipelines.cells import MODEL, SPLITS, in_force
from pipelines.patients import DIFFERENTIALS, PREDICTIONS
from smearline import dataset
from smearline.differential import differential
from smearline.recognition import RecognitionModel, recognise


def main() -> None:
    params, model = in_force(), RecognitionModel(MODEL)
    folder = params.data.folder
    index = dataset.index(folder, ["sha256", "smear", "acquired_at", "origin"])
    if index["smear"].isna().all():
        pd.DataFrame({"site": [], "smear": []}).to_parquet(DIFFERENTIALS, index=False)
        found, vectors = recognise(model, folder)
        predictions = found.assign(embedding=list(vectors))
        print("no cell of this data set names its smear: no differentials")
    else:
        summary, predictions = differential(model, folder, DIFFERENTIALS)
        print(f"{len(summary)} smears")
    splits = pd.read_parquet(SPLITS, columns=["sha256", "split"])
    known = index[["sha256", "acquired_at", "origin"]].merge(splits, on="sha256")
    predictions = predictions.merge(known, on="sha256", validate="one_to_one")
    predictions.assign(embedding_version=model.embedding_version).to_parquet(PREDICTIONS, index=False)


if __name__ == "__main__":
    main()
