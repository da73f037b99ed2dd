"""Stage evaluate_cells: judge the model folder, as it is served, on the test cells."""

import pandas as pd

from pipelines.cells import EVALUATION, MODEL, in_force, split_cells
from smearline import commands, curves, evaluation, metrics
from smearline.errors import DataError
from smearline.recognition import RecognitionModel


def main() -> None:
    params = in_force()
    frame = split_cells(params)
    test = set(frame.loc[frame["split"] == "test", "sha256"])
    if not test:
        raise DataError("no cell is for the test; give split.test more than 0")
    with commands.progress_line("recognise") as progress:
        figures = evaluation.evaluate(
            RecognitionModel(MODEL),
            params.data.folder,
            EVALUATION,
            keep=test,
            seed=params.evaluate.seed,
            num_errors_shown=params.evaluate.num_errors_shown,
            curves=curves.FOLDER,
            progress=progress,
        )
    if "not_judged" in figures:
        raise DataError(f"{figures['not_judged']}; give split.test more than 0, or label some of its cells")
    predictions = pd.read_parquet(EVALUATION / "predictions.parquet").dropna(subset=["true_type"])
    # For `dvc plots`: actual against predicted.
    predictions[["true_type", "predicted_type"]].to_csv(EVALUATION / "confusion.csv", index=False)
    for name, value in metrics.headline(figures).items():
        print(f"{name:44} {value:.4f}")


if __name__ == "__main__":
    main()
