"""Stage calibrate: what the trained recogniser may be sure of, learned on the validation cells with the model as it is served."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from pipelines.cells import MODEL, TRAINED, in_force, split_cells
from smearline import confidence, plain_json, reader, settings
from smearline.metrics.blasts import false_alarm_share, probability_for_ppv
from smearline.recognition import CARD_FILE, RecognitionModel, recognise

_CENTRE = 200
"""Training cells of a site and type from which its centre is learned."""
_FEW = 5
"""Cells: a type of which a site has fewer is taken to have so many."""
PARENTS = 0.05


def main() -> None:
    params = in_force()
    calibrate(TRAINED, MODEL, split_cells(params), params)


def calibrate(
    trained: Path,
    out: Path,
    frame: pd.DataFrame,
    params: settings.Settings,
    new: tuple[pd.DataFrame, Path] | None = None,
) -> None:
    """A copy of the model folder with the limits that the validation cells of `frame`, all in the workspace's data, teach.

    Args:
        new: training cells of another data set, and that data set: they are like what the model has seen, too.
    """
    model = RecognitionModel(trained)
    types = model.card.types
    frame = frame[~frame["conflicted"].astype(bool) & frame["true_type"].notna()]
    whole = frame[frame["split"] == "train"]
    train = whole[whole["true_type"].isin(types)]
    shuffled = train.sample(frac=1, random_state=params.train.seed)
    taught = shuffled.groupby(["site", "true_type"]).head(_CENTRE)
    watched = frame[frame["split"] == "val"]
    found = None
    if len(watched):
        predictions, embeddings = recognise(model, params.data.folder, keep={*taught["sha256"], *watched["sha256"]})
        row_of = pd.Series(range(len(predictions)), predictions["sha256"])
        rows, vectors = row_of[watched["sha256"]].to_numpy(), [embeddings[row_of[taught["sha256"]].to_numpy()]]
        if new:
            answers, found_there = recognise(model, new[1], keep=set(new[0]["sha256"]))
            vectors.append(found_there)
            taught = pd.concat([taught, new[0].set_index("sha256").loc[answers["sha256"]].reset_index()])
        index = pd.Index(types)
        probabilities = predictions[[f"p_{t}" for t in types]].to_numpy("float32")[rows]
        found = confidence.fit(
            probabilities,
            reader.targets(watched, types, {})[0],
            index.get_indexer(pd.Index(watched["true_type"])),
            list(watched["site"]),
            embeddings[rows],
            np.concatenate(vectors),
            index.get_indexer(pd.Index(taught["true_type"])),
            coverage=params.confidence.coverage,
            max_error=params.confidence.max_error,
            typical=params.confidence.typical,
            offsets=offsets(whole, types, params),
        )
    if found and "BLAST" in types:
        served, blast = found.judge(probabilities, embeddings[rows], list(watched["site"]))[0], types.index("BLAST")
        blasts = false_alarm_share(watched, np.array(types)[served.argmax(axis=1)].tolist())
        rests_on = (blasts["smears"], blasts["pseudo_smears"])
        true = (watched["true_type"] == "BLAST").to_numpy(bool)
        limit = probability_for_ppv(served[:, blast], true, params.confidence.blast_ppv)
        found = found.model_copy(update={"blast_from": limit, "blasts_above": blasts["above"], "blast_free": rests_on})
        if limit is not None:  # what may be a blast is not ruled out
            found = found.never_ruled_out(blast, limit)
    shutil.copytree(trained, out, dirs_exist_ok=True)
    used = {**model.card.parameters, "confidence": params.confidence.model_dump(mode="json")}
    card = model.card.model_copy(update={"confidence": found, "parameters": used})
    plain_json.write(out / CARD_FILE, card.model_dump(mode="json"))
    if found is None:
        print("no validation cell is of a trained type: every cell is named, and nothing is said of how sure that is")
    else:
        print(f"of {len(watched)} validation cells {found.named:.1%} are named, {found.error:.1%} of them wrongly")
        print(f"temperatures {found.temperatures}")
        for site in found.limits.keys() - {confidence.ELSEWHERE}:
            print(
                f"{site}: too few cells for a limit of their own: {', '.join(found.in_common(types, site)) or 'none'}"
            )


def offsets(train: pd.DataFrame, types: tuple[str, ...], params: settings.Settings) -> dict[str, tuple[float, ...]]:
    """Of each type's logarithm at each site (confidence.offsets_for), `confidence.natural_mix` of the way to the site's own mix.

    Training draws a site's type in proportion to its number of cells ** (1 - train.balance). A site has none where more than
    `PARENTS` of its cells are labelled by a parent: which of its children they are is not known.
    """
    found = {}
    for site, own in train.groupby("site"):
        if (~own["true_type"].isin(types)).mean() > PARENTS:
            continue
        count = own["true_type"].value_counts().reindex(list(types), fill_value=0).to_numpy(float)
        natural = np.where(count > 0, np.maximum(count, _FEW), np.nan)
        taught = np.maximum(count, _FEW) ** (1 - params.train.balance)
        found[str(site)] = confidence.offsets_for(types, natural, taught, params.confidence.natural_mix)
    return found


if __name__ == "__main__":
    main()
