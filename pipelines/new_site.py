"""A new site as a recogniser sees it, and which of its cells are worth labelling.

Those nearest to the k-means centres of what the recogniser sees there (its pooled features, at length 1), so that they are spread
over all that comes. Patients that are held out are never chosen: their labelled cells judge.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pipelines import calibrate, refit
from pipelines.cells import SPLITS, split_cells
from smearline import commands, confidence, dataset, reader, recogniser, settings, splits
from smearline.errors import DataError, ModelError
from smearline.initial_weights import load_initial_weights
from smearline.recognition import RecognitionModel, recognise, scale_of

REPORT = "adaptation.json"
"""In a model folder that `smearline adapt` made."""
_STRATUM = ["site", "true_type"]
_POOL = 20_000
"""Cells, drawn by chance where there are more, among which those to label are chosen, and whose mix is estimated."""
_ALIKE = 1e-3
_NONE_LISTED = pd.DataFrame({"sha256": pd.Series(dtype=str), "budget": pd.Series(dtype=int)})


class NewSite:
    """Cells of a new site as the recogniser sees them, and those that may be chosen: of patients that are not held out, and not of
    those that it was trained on, nor of its own sites' test.

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
        self.labelled = set(self.index["sha256"][labelled])
        split = split_cells(self.recipe)
        tests = split[(split["split"] == "test") & split["site"].isin(self.model.card.sites)]
        seen = dataset.trained_on(self.index, pd.concat([self.model.seen, tests], ignore_index=True))
        judging = (splits.places(self.groups(), self.adapting.seed) < self.adapting.held_out).to_numpy()
        self.judged = self.index[judging & labelled & ~seen]
        self.candidates = set(self.index["sha256"][~judging & ~seen])
        if not self.candidates:
            raise DataError(
                "there is no cell to choose: all were trained on, are home's test, or of patients that are held out"
            )
        if min(budgets) <= 0:
            self.refuse_mix_alone()
        keep = {*self.judged["sha256"], *self.pool["sha256"]}
        print(f"recognising {len(keep)} cells of {', '.join(sorted(self.index['site'].unique()))}", flush=True)
        self.predictions = recognise(self.model, cells, keep=keep)[0]

    def groups(self) -> pd.Series:
        """What of the new site is held out together: the cells of a patient, and near duplicates."""
        folder = dataset.cells_folder(self.cells).parent
        thumbnails = dataset.index(self.cells, ["sha256", "thumbnail"]).set_index("sha256")["thumbnail"]
        frame = self.index.assign(thumbnail=thumbnails.loc[self.index["sha256"]].to_numpy())
        kept = folder / "local" / "near-duplicates.npz" if os.access(folder, os.W_OK) else None
        with commands.progress_line("images searched for near duplicates") as shown:
            return splits.grouped(frame, self.recipe.split.near_duplicate_correlation, kept, shown)[0]

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
        if limits is None or not enough or mix_taught(self.again, self.model.card.types) is None:
            raise DataError(
                "no mix of types can be estimated: that needs a recogniser with limits (stage calibrate), and "
                f"{confidence.LEAST_OF_SITE} cells or more, of patients that are not held out, of a site that it was not trained "
                "on; and home's labels must tell a parent's children apart"
            )

    @cached_property
    def home(self) -> pd.DataFrame:
        """The labelled cells that the model was trained and calibrated on, with their split."""
        home = split_cells(self.recipe)
        home = home[home["sha256"].isin(self.model.seen["sha256"])]
        train = home[home["split"] == "train"]
        if train.empty:
            raise DataError("this workspace holds no cell that the model was trained on: adapt in the one that made it")
        if dataset.digest(train) != self.model.card.data_digest:
            raise DataError(
                f"{SPLITS} splits the cells otherwise than when {self.folder} was trained, or some of these are gone: its limits "
                "would be learned on cells that it was trained on; dvc repro first"
            )
        return home[home["true_type"].notna() & ~home["conflicted"].astype(bool)]

    @property
    def watched(self) -> pd.DataFrame:
        """Home's validation cells."""
        return self.home[self.home["split"] == "val"]

    @cached_property
    def before_at_home(self) -> pd.DataFrame:
        """What the recogniser, as it is, says of them."""
        return recognise(self.model, self.recipe.data.folder, keep=set(self.watched["sha256"]))[0]

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
        found = recogniser.of_settings(self.recipe, types, self.model.card.characteristics)
        load_initial_weights(found, str(self.weights))
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


def _again(train: pd.DataFrame, number: int, seed: int) -> pd.DataFrame:
    """Cells of home: some of every type, and the others of each type and site in proportion to the root of its number."""
    first = train.sample(frac=1, random_state=seed).groupby(_STRATUM).head(confidence.LEAST_OF_TYPE)
    rest = train.drop(first.index)
    weights = reader.drawing_weights(rest, 0.5) if len(rest) else None
    more = min(max(0, number - len(first)), len(rest))
    picked = np.random.default_rng(seed).choice(rest.index, more, replace=False, p=weights)
    return train.loc[sorted({*first.index, *picked})]


def mix_taught(taught: pd.DataFrame, types: Sequence[str]) -> NDArray[np.float64] | None:
    """The share of each type in what a head was taught, by `weight`; None where more than calibrate.PARENTS of it is of labels that
    do not tell a parent's children apart."""
    weight = taught.groupby("true_type")["weight"].sum()
    if 1 - weight[weight.index.isin(types)].sum() / weight.sum() > calibrate.PARENTS:
        return None
    drawn = weight.reindex(list(types)).to_numpy(float)
    drawn = np.nan_to_num(drawn, nan=np.nanmin(drawn))
    found: NDArray[np.float64] = drawn / drawn.sum()
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


def ask_for_labels(site: NewSite, chosen: dict[int, pd.DataFrame], listed: Path, out: Path) -> None:
    """Raises DataError where a chosen cell has no undisputed label, after listing them in a table a site, which keeps what was
    filled in, of other cells without a label too; and what was chosen, in `listed`."""
    every = pd.concat(chosen.values()).drop_duplicates("sha256")
    missing = every[~every["sha256"].isin(site.labelled)]
    if missing.empty:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [part[["sha256"]].assign(budget=budget) for budget, part in chosen.items()]
    before = pd.read_csv(listed, dtype={"sha256": str}) if listed.is_file() else _NONE_LISTED
    pd.concat([before[~before["budget"].isin(chosen)], *rows]).to_csv(listed, index=False)
    said = site.predictions.set_index("sha256")["predicted_type"]
    about = missing[["sha256", "site", "patient", "smear"]].assign(suggested=said.reindex(missing["sha256"]).to_numpy())
    about.to_csv(out.with_name(f"{out.name}.suggested.csv"), index=False)
    steps = []
    for name, part in missing.groupby("site"):
        table, rows = out.with_name(f"{out.name}.to-label-{name}.csv"), part[["sha256"]].assign(type="")
        if table.is_file():
            begun = pd.read_csv(table, dtype=str, keep_default_na=False)
            if missing_columns := {"sha256", "type"} - set(begun):
                raise DataError(
                    f"{table} was begun and has no column {' nor '.join(sorted(missing_columns))} any more; it is a table of "
                    "sha256,type with commas: save it so, or remove it"
                )
            rows = pd.concat(
                [begun[(begun["type"] != "") & ~begun["sha256"].isin(site.labelled)][["sha256", "type"]], rows]
            )
        rows.drop_duplicates("sha256").to_csv(table, index=False)
        steps.append(f"smearline label {table} --site {name} --by ROLE --supersede --data CELLS")
    raise DataError(
        f"{len(missing)} of the {len(every)} cells that were chosen have no undisputed label. Fill in the column type, then "
        f"{'; '.join(steps)}, and run this again. {out.name}.suggested.csv says what they are taken for"
    )
