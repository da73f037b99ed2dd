"""`smearline adapt`: a recogniser for a new site, from a few labelled cells of it, that still knows its own.

Which cells are worth labelling is for the platform to say: those nearest to the k-means centres of what the recogniser sees at the
new site (its pooled features, at length 1), so that they are spread over all that comes there. The head for the types is fitted
anew on them and on cells of home (refit.fit_head).

The new site's mix of types is estimated from its cells without labels, and probabilities are moved towards it (confidence.mix_of).

Patients of the new site that are held out are never chosen: their labelled cells judge. It runs in the workspace that made the
recogniser, whose data are home.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as express
import torch
from numpy.typing import NDArray

from pipelines import calibrate, refit, train_cells
from pipelines.cells import CURVES, split_cells
from smearline import confidence, dataset, plain_json, reader, recogniser, settings, splits, vocabulary
from smearline.errors import DataError, ModelError
from smearline.recognition import CARD_FILE, SEEN_FILE, RecognitionModel, recognise, scale_of

REPORT = "adaptation.json"
_STRATUM = ["site", "true_type"]
_MOST = 4.0
"""Times; chosen on PBC's network at patients of JHU that are not in the test, where 4 to 50 changed little but the rare types."""
_POOL = 20_000
"""Cells, drawn by chance where there are more, among which those to label are chosen, and whose mix is estimated."""
_ALIKE = 1e-3
_NONE_LISTED = pd.DataFrame({"sha256": pd.Series(dtype=str), "budget": pd.Series(dtype=int)})


class _NewSite:
    """Cells of a new site as the recogniser sees them, and those that may be chosen: of patients that are not held out, and not of
    those that it was trained on.

    Raises:
        ModelError: the weights are missing or another model's, or the model is an adapted one.
        DataError: one of the budgets is 0, and no mix of types can be estimated; or there is no cell to choose.
    """

    def __init__(self, model: Path, cells: Path, weights: Path | None, budgets: Sequence[int]) -> None:
        if (model / REPORT).is_file():
            raise ModelError(
                f"{model} is an adapted recogniser: another adaptation would lose the first one's mixes of types, and assume a "
                "wrong one for what was drawn in training; adapt from the recogniser that it was made of"
            )
        self.folder, self.cells = model, cells
        self.weights = weights or model.with_name(f"{model.name}.safetensors")
        if not self.weights.is_file():
            raise ModelError(
                f"there is no {self.weights}: adapting goes on from a recogniser's weights; name them with --weights"
            )
        self.model, params = RecognitionModel(model), settings.load()
        self.adapting = params.adapt
        self.recipe = _recipe(self.model, params)
        self.index = dataset.labelled_index(cells)
        scales = zip(self.index["site"], self.index["microns_per_px"], strict=True)
        self.index["scale"] = [scale_of(s, m)[0] for s, m in scales]
        self.check_weights()
        labelled = (self.index["true_type"].notna() & ~self.index["conflicted"].astype(bool)).to_numpy()
        seen = dataset.trained_on(self.index, self.model.seen)
        judging = (splits.places(self.index, self.adapting.seed) < self.adapting.held_out).to_numpy()
        self.judged = self.index[judging & labelled & ~seen]
        self.candidates = set(self.index["sha256"][~judging & ~seen])
        if not self.candidates:
            raise DataError("there is no cell to choose: all were trained on, or belong to patients that are held out")
        if min(budgets) <= 0:
            self.refuse_mix_alone()
        keep = {*self.judged["sha256"], *self.pool["sha256"]}
        print(f"recognising {len(keep)} cells of {', '.join(sorted(self.index['site'].unique()))}", flush=True)
        self.predictions = recognise(self.model, cells, keep=keep)[0]

    def check_weights(self) -> None:
        """Raises ModelError where the weights are not those that the model folder was made of."""
        card, some = self.model.card, self.index.head(16)
        crops = next(reader.Crops(some, card.field_um, card.size_px).batches(np.arange(len(some)), len(some)))
        with torch.inference_mode():
            own = recogniser.Served(self.network(card.types), card.temperature, card.views).eval()(
                torch.from_numpy(crops)
            )
        said = self.model.run(crops, "type_probabilities", "characteristic_probabilities")
        if max(np.abs(a.numpy() - b).max(initial=0.0) for a, b in zip(own, said, strict=False)) > _ALIKE:
            raise ModelError(f"{self.weights} are not the weights of {self.folder}: they answer otherwise")

    def refuse_mix_alone(self) -> None:
        """Raises DataError where no mix of types can be estimated, with which a budget of 0 would be no adaptation."""
        limits, home = self.model.card.confidence, set(self.model.card.sites)
        free = self.index.loc[self.index["sha256"].isin(self.candidates), "site"].value_counts()
        enough = (free.drop(home, errors="ignore") >= confidence.LEAST_OF_SITE).any()
        if limits is None or not enough or _mix_taught(self.again, self.model.card.types) is None:
            raise DataError(
                "no mix of types can be estimated: that needs a recogniser with limits (stage calibrate), and "
                f"{confidence.LEAST_OF_SITE} cells or more, of patients that are not held out, of a site that it was not trained "
                "on; and home's labels must tell a parent's children apart"
            )

    @cached_property
    def home(self) -> pd.DataFrame:
        """The labelled cells that the model was trained and calibrated on, with their split."""
        home = split_cells(self.recipe)
        home = home[home["true_type"].notna() & ~home["conflicted"].astype(bool)]
        home = home[home["sha256"].isin(self.model.seen["sha256"])]
        if not (home["split"] == "train").any():
            raise DataError("this workspace holds no cell that the model was trained on: adapt in the one that made it")
        return home

    @cached_property
    def again(self) -> pd.DataFrame:
        """The cells of home that the head is fitted on, with `weight`: together a site's type weighs as it did in training."""
        train = self.home[self.home["split"] == "train"]
        found, whole = _again(train, self.adapting.home_cells, self.adapting.seed), train.groupby(_STRATUM).size()
        number = found.groupby(_STRATUM)["sha256"].transform("size").to_numpy(float)
        count = whole.loc[pd.MultiIndex.from_frame(found[_STRATUM])].to_numpy(float)
        return found.assign(weight=count ** (1 - self.recipe.train.balance) / number)

    @cached_property
    def pool(self) -> pd.DataFrame:
        """Cells that may be chosen."""
        free = self.index[self.index["sha256"].isin(self.candidates)]
        return free.sample(min(_POOL, len(free)), random_state=self.adapting.seed).sort_index()

    def network(self, types: Sequence[str]) -> recogniser.Recogniser:
        model, card = self.recipe.model, self.model.card
        found = recogniser.Recogniser(model.backbone, types, card.characteristics, model.embedding_dim)
        recogniser.load_initial_weights(found, str(self.weights))
        return found

    @cached_property
    def home_features(self) -> refit.Floats:
        print(f"looking at {len(self.again)} cells of home again", flush=True)
        return self.features(self.again)

    def features(self, cells: pd.DataFrame) -> refit.Floats:
        return refit.features(self.network(self.model.card.types), cells, self.recipe)

    def chosen(self, budgets: Sequence[int], listed: Path) -> dict[int, pd.DataFrame]:
        """The cells to label for each budget: those that `listed` names, as far as it does and they may still be chosen, so that
        cells which came since its labels were asked for change nothing."""
        told = pd.read_csv(listed, dtype={"sha256": str}) if listed.is_file() else _NONE_LISTED
        named = {int(budget): set(part["sha256"]) for budget, part in told.groupby("budget")}
        found = {b: self.index[self.index["sha256"].isin(named[b])] for b in budgets if b in named}
        found = {b: part for b, part in found.items() if named[b] <= self.candidates}
        found |= {0: self.index.iloc[:0]} if 0 in budgets else {}
        if missing := sorted(set(budgets) - set(found)):
            print(f"choosing among {len(self.pool)} cells", flush=True)
            seen = self.features(self.pool)
            found |= {b: self.pool.iloc[choose(seen, b, self.adapting.seed)] for b in missing}
        return {budget: found[budget] for budget in sorted(set(budgets))}


def _recipe(model: RecognitionModel, params: settings.Settings) -> settings.Settings:
    """The parameters that a model was made with; what its card does not say, since it is of an older version, is as the workspace
    has it."""
    raw, card = params.model_dump(mode="json"), model.card
    for section, values in card.parameters.items():
        if section in raw and section != "adapt":
            raw[section] |= {name: value for name, value in values.items() if name in raw[section]}
    raw["model"]["views"] = card.views
    raw["image"] |= {"field_um": card.field_um, "size_px": card.size_px}
    return settings.check(raw, str(model.folder))


def adapt(model: Path, cells: Path, budget: int, out: Path, weights: Path | None = None) -> dict[str, Any]:
    """Write the adapted model folder `out`, `out`.safetensors beside it, and `out`/adaptation.json, which is returned.

    Args:
        budget: cells to label; with 0 the network stays as it is, and only the site's mix of types is estimated.
        weights: of `model`; default: MODEL.safetensors beside it, as the pipeline leaves them.

    Raises:
        ModelError: the weights are missing, or `model` is an adapted one.
        DataError: cells that were chosen have no label; the message says where they are listed. Or there is nothing to choose, or
            with a budget of 0 no mix to estimate.
    """
    _refuse_other(out)
    site, listed = _NewSite(model, cells, weights, [budget]), out.with_name(f"{out.name}.chosen.csv")
    chosen = site.chosen([budget], listed)
    _labelled(chosen, site.predictions, listed, out)
    return _adapt(site, budget, chosen[budget], out)


def curve(model: Path, cells: Path, budgets: Sequence[int], out: Path, weights: Path | None = None) -> pd.DataFrame:
    """`adapt` for each budget into `out`/BUDGET, and `out`/adaptation_curve.{csv,html}: what so many labels bring. The table goes
    to the evaluation page too.

    Cells that one budget chose are not those of a smaller one and some more: labels of all of them are asked for before anything is
    fitted. Raises as `adapt`.
    """
    for budget in budgets:
        _refuse_other(out / str(budget))
    site, listed = _NewSite(model, cells, weights, budgets), out.with_name(f"{out.name}.chosen.csv")
    chosen = site.chosen(budgets, listed)
    _labelled(chosen, site.predictions, listed, out)
    rows = list[dict[str, Any]]()
    for budget, part in chosen.items():
        report = _adapt(site, budget, part, out / str(budget))
        for where, words in (("new_site", "the new site"), ("home_validation_cells", "home")):
            for when, figures in report[where].items():
                if figures and (when == "after" or not any(row["where"] == words for row in rows)):
                    adapted = "as it was" if when == "before" else "adapted"
                    rows.append({"where": words, "model": adapted, "labels": report["labelled"], **figures})
                    rows[-1]["labels"] *= when == "after"
    table = pd.DataFrame(
        rows, columns=["where", "model", "labels", "cells", "patients", "accuracy", "balanced_accuracy"]
    )
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "adaptation_curve.csv", index=False)
    if CURVES.is_dir():
        table.to_csv(CURVES / f"adaptation-{out.name}.csv", index=False)
    long = table.melt(["where", "model", "labels"], ["accuracy", "balanced_accuracy"], "figure", "share")
    by = {"color": "figure", "line_dash": "where", "symbol": "model"}
    figure = express.line(long, "labels", "share", markers=True, **by)
    figure.update_layout(
        title="Research use only. Adaptation: share of right names among cells of held-out patients, by labels of the new site",
        xaxis_title="labelled cells of the new site (0: its mix of types alone is estimated)",
        yaxis_tickformat=".0%",
        template="plotly_white",
    )
    figure.write_html(out / "adaptation_curve.html", include_plotlyjs=True)
    return table


def _refuse_other(out: Path) -> None:
    """Raises DataError where `out` is something else than an adapted model, which would be lost."""
    if out.exists() and not (out / REPORT).is_file():
        raise DataError(f"{out} is there already, and is no adapted recogniser: give another --out, or remove it")


def _adapt(site: _NewSite, budget: int, chosen: pd.DataFrame, out: Path) -> dict[str, Any]:
    watched = site.home[site.home["split"] == "val"]
    unfinished = out.with_name(f"{out.name}.unfinished")
    weights, unfinished_weights = (p.with_name(f"{p.name}.safetensors") for p in (out, unfinished))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    if len(chosen):
        taught = _refit(site, chosen, unfinished, unfinished_weights)
    else:
        taught = site.again
        shutil.copytree(site.folder, unfinished)
        shutil.copy2(site.weights, unfinished_weights)
    mixes = _note_mixes(site, taught, unfinished)
    after = RecognitionModel(unfinished)
    limits = after.card.confidence
    there = {"before": site.predictions}
    if len(site.judged):
        there["after"] = recognise(after, site.cells, keep=set(site.judged["sha256"]))[0]
    here = {}
    if len(watched):
        keep, data = set(watched["sha256"]), site.recipe.data.folder
        here = {n: recognise(m, data, keep=keep)[0] for n, m in (("before", site.model), ("after", after))}
    report = {
        "budget": budget,
        "labelled": len(chosen),
        "chosen": {str(k): int(v) for k, v in chosen["true_type"].value_counts().items()},
        "taught_nothing": int((taught["weight"] == 0).sum()),
        "estimated_mix": mixes,
        "limits_learned_without": sorted(set(limits.offsets if limits else ()) - set(site.model.card.sites)),
        "new_site": {name: _scores(site.judged, found) for name, found in there.items()},
        "home_validation_cells": {name: _scores(watched, found) for name, found in here.items()},
    }
    plain_json.write(unfinished / REPORT, plain_json.plain(report))
    shutil.rmtree(out, ignore_errors=True)
    unfinished_weights.replace(weights)
    unfinished.rename(out)
    return report


def _refit(site: _NewSite, chosen: pd.DataFrame, out: Path, weights: Path) -> pd.DataFrame:
    """The head fitted anew, calibrated on home's validation cells. Returns what it was fitted on, with each cell's `weight`.

    Raises:
        DataError: none of the labels says anything of a type, or home has no cell of one of the model's types any more.
    """
    home = site.home[site.home["split"] != "test"]
    frame = pd.concat([home, chosen.assign(split="train")], ignore_index=True)
    types, again = reader.trainable(frame[frame["split"] == "train"])[0], site.again
    if lost := set(site.model.card.types) - set(types):
        raise DataError(
            f"the workspace has no labelled training cell of {', '.join(sorted(lost))} any more: train again"
        )
    allowed = reader.targets(chosen, types, {})[0]
    teaches = allowed.any(axis=1)  # not a parent's label none of whose children was ever labelled
    if not teaches.any():
        raise DataError(
            "no label of the cells that were chosen is of a type, or of a parent of one, that is known here"
        )
    chosen = chosen.assign(weight=teaches * again["weight"].sum() / teaches.sum())
    network = site.network(types)
    print(f"fitting the head on {len(chosen)} cells of the new site and {len(again)} of home", flush=True)
    here = refit.Cells(site.home_features, reader.targets(again, types, {})[0], again["weight"].to_numpy(float))
    there = refit.Cells(site.features(chosen), allowed, chosen["weight"].to_numpy(float))
    refit.fit_head(network, here, there, site.adapting.strength)
    with tempfile.TemporaryDirectory() as folder:
        train_cells.write(network, 1.0, frame, site.recipe, Path(folder), weights)
        # The adapted model has also seen what the first one saw.
        both = pd.concat([pd.read_parquet(Path(folder) / SEEN_FILE), site.model.seen], ignore_index=True)
        both.drop_duplicates("sha256").to_parquet(Path(folder) / SEEN_FILE, index=False)
        calibrate.calibrate(Path(folder), out, home, site.recipe, new=(chosen, site.cells))
    return pd.concat([again, chosen], ignore_index=True)


def _mix_taught(taught: pd.DataFrame, types: Sequence[str]) -> NDArray[np.float64] | None:
    """The share of each type in what a head was taught, by `weight`; None where more than calibrate.PARENTS of it is of labels that
    do not tell a parent's children apart."""
    weight = taught.groupby("true_type")["weight"].sum()
    if 1 - weight[weight.index.isin(types)].sum() / weight.sum() > calibrate.PARENTS:
        return None
    drawn = weight.reindex(list(types)).to_numpy(float)
    drawn = np.nan_to_num(drawn, nan=np.nanmin(drawn))
    found: NDArray[np.float64] = drawn / drawn.sum()
    return found


def _note_mixes(site: _NewSite, taught: pd.DataFrame, out: Path) -> dict[str, dict[str, float]]:
    """Put offsets into the card for sites of the new cells that are none of home, `confidence.natural_mix` of the way to the mix of
    types of the cells that may be chosen, whose labels are not looked at; returns the mixes.

    No type is moved more than `_MOST` times, and blasts are made no less probable beside any other (confidence.offsets_for). The
    card's limits were learned at home, without these offsets; the report names the sites (`limits_learned_without`).
    """
    model, home = RecognitionModel(out), set(site.model.card.sites)
    limits, types = model.card.confidence, model.card.types
    if limits is None:
        return {}
    if (drawn := _mix_taught(taught, types)) is None:
        print(
            "no mix of types is estimated: too many labels are of a parent, and which of its children they are is not known"
        )
        return {}
    card = model.card
    model.card = card.model_copy(update={"confidence": None})  # what the network says, moved by nothing
    predictions = recognise(model, site.cells, keep=set(site.pool["sha256"]))[0]
    offsets, found = dict(limits.offsets), {}
    elsewhere, natural_mix = limits.temperatures.get(confidence.ELSEWHERE, 1.0), site.recipe.confidence.natural_mix
    for name, part in predictions.groupby("site"):
        if name in home or len(part) < confidence.LEAST_OF_SITE:
            continue
        warmth = limits.temperatures.get(str(name), elsewhere)  # its own, where all of its patients are for validation
        own = part[[f"p_{t}" for t in types]].to_numpy(np.float32)
        offsets[str(name)], mix = confidence.unlabelled_offsets(types, own, drawn, warmth, natural_mix, _MOST)
        found[str(name)] = {t: round(float(v), 4) for t, v in zip(types, mix, strict=True)}
    card = card.model_copy(update={"confidence": limits.model_copy(update={"offsets": offsets})})
    plain_json.write(out / CARD_FILE, card.model_dump(mode="json"))
    return found


def choose(features_NC: refit.Floats, budget: int, seed: int) -> list[int]:
    """The places of the cells to label: of each k-means centre the cell nearest to it, and no cell twice."""
    from sklearn.cluster import KMeans

    vectors = features_NC / np.maximum(np.linalg.norm(features_NC, axis=1, keepdims=True), 1e-9)
    if budget >= len(vectors):
        return list(range(len(vectors)))
    free = np.ones(len(vectors), bool)
    for centre in KMeans(budget, n_init=1, random_state=seed).fit(vectors).cluster_centers_:
        away = np.where(free, ((vectors - centre) ** 2).sum(axis=1), np.inf)
        free[int(away.argmin())] = False
    return [int(i) for i in np.flatnonzero(~free)]


def _labelled(chosen: dict[int, pd.DataFrame], predictions: pd.DataFrame, listed: Path, out: Path) -> None:
    """Raises DataError where a chosen cell has no undisputed label, after listing them in a table a site, which keeps what was
    filled in; and what was chosen, in `listed`."""
    every = pd.concat(chosen.values()).drop_duplicates("sha256")
    missing = every[every["true_type"].isna() | every["conflicted"].astype(bool)]
    if missing.empty:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [part[["sha256"]].assign(budget=budget) for budget, part in chosen.items()]
    before = pd.read_csv(listed, dtype={"sha256": str}) if listed.is_file() else _NONE_LISTED
    pd.concat([before[~before["budget"].isin(chosen)], *rows]).to_csv(listed, index=False)
    said = predictions.set_index("sha256")["predicted_type"]
    about = missing[["sha256", "site", "patient", "smear"]].assign(suggested=said.reindex(missing["sha256"]).to_numpy())
    about.to_csv(out.with_name(f"{out.name}.suggested.csv"), index=False)
    steps = []
    for name, part in missing.groupby("site"):
        table, filled = out.with_name(f"{out.name}.to-label-{name}.csv"), pd.Series(dtype=str)
        if table.is_file():
            filled = pd.read_csv(table, dtype=str, keep_default_na=False).set_index("sha256")["type"]
        part[["sha256"]].assign(type=part["sha256"].map(filled).fillna("")).to_csv(table, index=False)
        steps.append(f"smearline label {table} --site {name} --by ROLE --supersede --data CELLS")
    raise DataError(
        f"{len(missing)} of the {len(every)} cells that were chosen have no undisputed label. Fill in the column type, then "
        f"{'; '.join(steps)}, and run this again. {out.name}.suggested.csv says what they are taken for"
    )


def _again(train: pd.DataFrame, number: int, seed: int) -> pd.DataFrame:
    """Cells of home: some of every type, and the others of each type and site in proportion to the root of its number."""
    first = train.sample(frac=1, random_state=seed).groupby(_STRATUM).head(confidence.LEAST_OF_TYPE)
    rest = train.drop(first.index)
    weights = reader.drawing_weights(rest, 0.5) if len(rest) else None
    more = min(max(0, number - len(first)), len(rest))
    picked = np.random.default_rng(seed).choice(rest.index, more, replace=False, p=weights)
    return train.loc[sorted({*first.index, *picked})]


def _scores(labelled: pd.DataFrame, found: pd.DataFrame) -> dict[str, Any] | None:
    """Share of right names, a parent's label allowing its children, in all and the mean over the labels; and the share named."""
    if labelled.empty:
        return None
    words, rows = vocabulary.load(), found.set_index("sha256").loc[labelled["sha256"]]
    pairs = zip(rows["predicted_type"], labelled["true_type"], strict=True)
    right = pd.Series([said in words.children(label) for said, label in pairs])
    told = {"cells": len(right), "patients": int(labelled["patient"].nunique()), "accuracy": float(right.mean())}
    told |= {"balanced_accuracy": float(right.groupby(labelled["true_type"].to_numpy()).mean().mean())}
    return told | ({"named": float(rows["named"].mean())} if "named" in rows else {})
