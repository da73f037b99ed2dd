"""Where a source gives a cell two labels: reader against reader, beside model against reader.

Cells that a source had read again, such as LMU's: reader against reader is how often that reading says the same. `disputed`: cells
that lie under two labels, such as JHU's pictures in two folders; they were found by disagreement, so of them only whether the model
gives one of the labels says something.
"""

from typing import Any

import numpy as np
import pandas as pd

from smearline.dataset import finest, whose
from smearline.metrics.intervals import share
from smearline.vocabulary import load


def two_labels(labels: pd.DataFrame) -> pd.DataFrame:
    """sha256, first, second, reading: a row for each further label of a cell's type (dataset.read_labels).

    `reading` is who read again, or 'disputed', with every label that the cell lies under in `first` (a list) and no second. Where a
    cell has a parent's label and a child's, the child's counts.
    """
    types = labels[labels["name"] == "type"]
    reference, again = (types[types["role"] == role] for role in ("reference", "reannotation"))
    reference = finest(reference)
    groups = reference[reference["conflicted"]].groupby("sha256")["value"]
    said = {sha: sorted(set(values)) for sha, values in groups if values.nunique() > 1}
    disputed = pd.DataFrame({"sha256": list(said), "first": list(said.values()), "second": None, "reading": "disputed"})
    first = reference[~reference["conflicted"]].drop_duplicates("sha256")[["sha256", "value"]]
    both = again[["sha256", "value", "labelled_by"]].rename(columns={"value": "second", "labelled_by": "reading"})
    both = first.assign(value=[[v] for v in first["value"]]).rename(columns={"value": "first"}).merge(both, on="sha256")
    return pd.concat([disputed.astype(object), both.astype(object)], ignore_index=True)


def score_readers(predictions: pd.DataFrame, labels: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """A row a site and reading: cells, and the shares with their intervals (patients resampled).

    Args:
        predictions: sha256, site, patient, predicted_type, seen_in_training; cells that were seen are left out, but for disputed
            ones, which no training takes: of those it is counted how many are of patients that it saw.
    """
    words, found = load(), []
    pairs = predictions.merge(two_labels(labels), on="sha256")
    pairs = pairs[(pairs["reading"] == "disputed") | ~pairs["seen_in_training"].astype(bool)]
    for (site, reading), part in pairs.groupby(["site", "reading"]):
        rng = np.random.default_rng(seed)
        clusters = whose(part).to_numpy(str)
        firsts = [{c for label in given for c in words.children(label)} for given in part["first"]]
        said = part["predicted_type"].tolist()
        hits = {"model_agrees_with_first": [s in first for s, first in zip(said, firsts, strict=True)]}
        if reading != "disputed":
            seconds = [set(words.children(label)) for label in part["second"]]
            hits["readers_agree"] = [bool(a & b) for a, b in zip(firsts, seconds, strict=True)]
            hits["model_agrees_with_second"] = [s in second for s, second in zip(said, seconds, strict=True)]
        shares = {name: share(hit, clusters, rng) for name, hit in hits.items()}
        about = {"site": site, "reading": reading, "cells": len(part), "patients": int(part["patient"].nunique())}
        found.append(about | {"of_patients_trained_on": int(part["seen_in_training"].sum()), **shares})
    return found
