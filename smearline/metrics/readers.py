"""Where a source gives a cell two labels: reader against reader, beside model against reader.

`reannotated`: cells that a source had read again, such as LMU's; reader against reader is then how often the second reading says
the same. `disputed`: cells that lie under two labels, such as JHU's pictures in two folders; they were found by disagreement, so
of them only the model's side says something.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from smearline.metrics.intervals import bootstrap_counts, proportion
from smearline.vocabulary import load


def two_labels(labels: pd.DataFrame) -> pd.DataFrame:
    """sha256, first, second, kind: of the cells with a second label of their type (dataset.read_labels)."""
    types = labels[labels["name"] == "type"]
    reference, again = (types[types["role"] == role] for role in ("reference", "reannotation"))
    said = reference[reference["conflicted"]].groupby("sha256")["value"].agg(lambda v: sorted(set(v)))
    said = said[said.str.len() > 1]
    disputed = pd.DataFrame({"sha256": said.index, "first": said.str[0], "second": said.str[1], "kind": "disputed"})
    first = reference[~reference["conflicted"]].drop_duplicates("sha256")[["sha256", "value"]]
    both = again[["sha256", "value"]].drop_duplicates("sha256").rename(columns={"value": "second"})
    both = first.rename(columns={"value": "first"}).merge(both, on="sha256").assign(kind="reannotated")
    return pd.concat([disputed, both], ignore_index=True)


def score_readers(predictions: pd.DataFrame, labels: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """A row a site and kind: cells, and the shares with their intervals (patients resampled).

    Args:
        predictions: sha256, site, patient, predicted_type, seen_in_training; cells that were seen are left out, but for disputed
            ones, which no training takes: of those it is counted how many are of patients that it saw.
    """
    words, found = load(), []
    pairs = predictions.merge(two_labels(labels), on="sha256")
    pairs = pairs[(pairs["kind"] == "disputed") | ~pairs["seen_in_training"].astype(bool)]
    children = {code: set(words.children(code)) for code in {*pairs["first"], *pairs["second"]}}
    for (site, kind), part in pairs.groupby(["site", "kind"]):
        rng = np.random.default_rng(seed)
        clusters = part["patient"].fillna(part["sha256"]).to_numpy(str)
        said, first, second = (part[name].to_numpy(str) for name in ("predicted_type", "first", "second"))
        hits = {
            "model_agrees_with_first": [s in children[a] for s, a in zip(said, first, strict=True)],
            "model_agrees_with_second": [s in children[b] for s, b in zip(said, second, strict=True)],
            "model_agrees_with_either": [
                s in children[a] | children[b] for s, a, b in zip(said, first, second, strict=True)
            ],
        }
        if kind == "reannotated":
            agree = [bool(children[a] & children[b]) for a, b in zip(first, second, strict=True)]
            hits = {"readers_agree": agree, **hits}
        shares = {}
        for name, hit in hits.items():
            counts = bootstrap_counts(clusters, np.asarray(hit, int)[:, None], 2, rng)
            shares[name] = proportion(counts[:, 1], counts.sum(axis=1))
        about = {"site": site, "kind": kind, "cells": len(part), "patients": int(part["patient"].nunique())}
        found.append(about | {"of_patients_trained_on": int(part["seen_in_training"].sum()), **shares})
    return found
