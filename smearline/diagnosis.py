"""The diagnostic assistant: a smear's summary and blood count to a group, with its reasons, or an abstention with its own.

A model folder holds model.skops (scikit-learn: imputation, scaling, multinomial logistic regression, temperature),
model.json (what it reads, what it may say, where it comes from) and trained_on.parquet (its patients and their features).
The model is linear on purpose, and so its Shapley values are exact (docs/decisions/007).
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import skops.io
from numpy.typing import NDArray
from pydantic import BaseModel
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from smearline import cbc, differential, plain_json, vocabulary
from smearline.diagnosis_reasons import Told, reasons_for
from smearline.errors import DataError, ModelError
from smearline.recognition import RecognitionModel
from smearline.settings import DiagnosisSettings

CONTRACT = "diagnosis-2"
SKOPS_FILE, CARD_FILE, SEEN_FILE, ABSENT_FILE = "model.skops", "model.json", "trained_on.parquet", "absent.json"
TRUSTED = ["numpy.dtype"]
"""What a model file may hold beside the types that skops trusts; anything else is refused."""
PARTS = {"differential": "share_", "characteristics": "rate_", "embedding": "embedding_", "cbc": "cbc_"}
_PART_NAMES = {
    "differential": "mix of types",
    "characteristics": "characteristics",
    "embedding": "look of the cells",
    "cbc": "blood count",
}
_NEEDED = {"differential": "shares", "embedding": "values of the embedding", "cbc": "laboratory values"}
MISSING_LIMIT = 0.5
"""Share of a part's values that may be missing before the model abstains; of the characteristics all may be, since a smear
shows only those of the types that it has."""
WIDENING, FACTOR = 0.1, 1.5
"""A laboratory value may lie outside the range of the training smears by this part of that range; one that spans decades, by
this factor."""


class DiagnosisCard(BaseModel, frozen=True, extra="forbid"):
    """model.json of a diagnostic model."""

    contract: str
    summary_version: str
    embedding_version: str
    vocabulary: str
    groups: tuple[str, ...]
    not_available: dict[str, str]
    """Group to why this model never names it."""
    features: tuple[str, ...]
    ranges: dict[str, tuple[float, float]]
    """Laboratory value to the accepted range, on the model's scale."""
    inverse_temperature: float
    nearest_limits: dict[str, float]
    """Part to the largest distance, on the model's scale, of a training smear from the nearest one of another patient."""
    origin: str
    sites: tuple[str, ...]
    num_patients: int
    num_smears: int
    data_digest: str
    parameters: dict[str, Any]
    intended_use: str = "research use only"

    @property
    def min_cells(self) -> int:
        return int(self.parameters["min_cells"])


def features(summary: pd.DataFrame, counts: pd.DataFrame | None, parts: tuple[str, ...]) -> pd.DataFrame:
    """What a model reads, a row a smear of `summary`: shares as their square roots (which evens out the binomial
    variance; Bartlett 1936, JRSS Suppl. 3:68), rates of characteristics, the embedding's E values, and the blood count in
    laboratory.yaml's units, those of scale 'log' as log10(1 + value). The number of cells is never among them.

    Raises:
        ModelError: the summary is of another version.
    """
    if set(summary["summary_version"]) - {differential.VERSION}:
        raise ModelError(
            f"the smear summary is '{summary['summary_version'].iloc[0]}'; this version reads '{differential.VERSION}'. "
            "Make the differentials again: smearline differential"
        )
    blocks: list[pd.DataFrame] = []
    if "differential" in parts:
        shares = summary[[f"share_{t}" for t in vocabulary.load().differential_types]]
        blocks.append(np.sqrt(shares.astype(float)))
    if "characteristics" in parts:
        twins = {f"rate_{n}_{c.values[0]}" for n, c in vocabulary.load().characteristics.items() if len(c.values) == 2}
        rates = [c for c in summary if c.startswith("rate_") and c not in twins]  # of two values one says all
        blocks.append(summary[rates].astype(float))
    if "embedding" in parts:
        vectors = np.stack([np.asarray(v, np.float64) for v in summary["embedding"]])
        columns = [f"embedding_{i}" for i in range(vectors.shape[1])]
        blocks.append(pd.DataFrame(vectors, summary.index, columns))
    if "cbc" in parts:
        given = cbc.COUNTS.empty_table().to_pandas() if counts is None else counts
        known = cbc.laboratory_values(cbc.of_their_patients(given, summary))
        keys = pd.MultiIndex.from_frame(summary[["site", "smear"]].astype(object))
        values = known.reindex(keys).astype(float).set_axis(summary.index)
        logs = [n for n, a in cbc.analytes().items() if a.scale == "log"]
        values[logs] = np.log10(1 + values[logs].clip(lower=0))
        blocks.append(values.add_prefix("cbc_"))
    return pd.concat(blocks, axis=1)


@dataclass(frozen=True)
class Fitted:
    """A fitted pipeline (scale, regress) and the inverse temperature of its logits."""

    pipeline: Pipeline
    groups: tuple[str, ...]
    inverse_temperature: float

    def logits(self, table: pd.DataFrame) -> NDArray[np.float64]:
        """Calibrated logits, N smears x K groups."""
        return self.inverse_temperature * _pair(self.pipeline.decision_function(table))

    def probabilities(self, table: pd.DataFrame) -> NDArray[np.float64]:
        return softmax(self.logits(table), axis=1)

    def scaled(self, table: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
        """Part to its features on the model's scale, N x F of the part."""
        scale = self.pipeline["scale"]
        names, values = scale.get_feature_names_out(), scale.transform(table)
        of = {part: [i for i, n in enumerate(names) if n.startswith(prefix)] for part, prefix in PARTS.items()}
        return {part: values[:, places] for part, places in of.items() if places}

    def contributions(self, table: pd.DataFrame) -> NDArray[np.float64]:
        """Shapley values, N smears x K groups x F features: what each feature adds to a group's calibrated logit, less
        the mean over the groups. With the logits of the average smear they sum to the logits (less their mean)."""
        scale = self.pipeline["scale"]
        weights = _pair(self.pipeline["regress"].coef_.T).T
        weights = (weights - weights.mean(axis=0)) * self.inverse_temperature
        placed = {name: i for i, name in enumerate(scale.get_feature_names_out())}
        return (scale.transform(table)[:, None, :] * weights[None])[:, :, [placed[name] for name in table.columns]]


def _pair(decisions: NDArray[np.float64]) -> NDArray[np.float64]:
    """One column a group, where scikit-learn gives one for two groups."""
    if decisions.ndim == 2 and decisions.shape[1] > 1:
        return decisions
    half = decisions.reshape(-1, 1) / 2
    return np.hstack([-half, half])


def fit(
    table: pd.DataFrame, groups: pd.Series, patients: pd.Series, params: DiagnosisSettings, calibrate: bool = True
) -> Fitted:
    """A model of `table` (a row a smear) for `groups`, calibrated on patients left out.

    A missing value is set to the training mean and so says nothing. Each part (differential, embedding, ...) is scaled to
    the same total variance, so that 64 embedding values do not drown 14 shares. The temperature (Guo et al. 2017, arXiv
    1706.04599) is fitted against targets smoothed by the size of each group, as Platt 1999 does, since a few patients
    that are told apart without an error do not prove certainty.

    Raises:
        DataError: there is one group, or a group has fewer than two patients.
    """
    per_group = patients.groupby(groups.to_numpy()).nunique()
    if (per_group < 2).any() or len(per_group) < 2:
        raise DataError(f"a diagnostic model needs two groups with two patients each; given: {per_group.to_dict()}")
    columns = {part: [c for c in table if c.startswith(prefix)] for part, prefix in PARTS.items()}
    present = {part: names for part, names in columns.items() if names}
    scaled = ColumnTransformer(
        [
            (part, make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler()), names)
            for part, names in present.items()
        ],
        transformer_weights={part: len(names) ** -0.5 for part, names in present.items()},
        verbose_feature_names_out=False,
    )
    pipeline = Pipeline([("scale", scaled), ("regress", LogisticRegression(C=params.strength, max_iter=2000))])
    truth = groups.to_numpy(str)
    temperature = 1.0
    if calibrate:
        folds = StratifiedGroupKFold(min(5, int(per_group.min())), shuffle=True, random_state=params.seed)
        splits = list(folds.split(table, truth, patients))
        left_out = cross_val_predict(pipeline, table, truth, cv=splits, method="decision_function")
        temperature = _inverse_temperature(_pair(left_out), truth)
    pipeline.fit(table, truth)
    return Fitted(pipeline, tuple(map(str, pipeline.classes_)), temperature)


def _inverse_temperature(logits: NDArray[np.float64], truth: NDArray[np.str_]) -> float:
    names, places, sizes = np.unique(truth, return_inverse=True, return_counts=True)
    own = ((sizes + 1) / (sizes + 2))[places, None]
    targets = np.where(np.eye(len(names), dtype=bool)[places], own, (1 - own) / (len(names) - 1))

    def loss(log_beta: float) -> float:
        return -float((targets * log_softmax(np.exp(log_beta) * logits, axis=1)).sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x))


def write(
    folder: Path,
    summary: pd.DataFrame,
    counts: pd.DataFrame | None,
    groups: pd.Series,
    params: DiagnosisSettings,
    *,
    not_available: dict[str, str],
    embedding_version: str,
    origin: str,
) -> "DiagnosisModel":
    """Fit a model on smears whose group is known, write its folder and read it back.

    Args:
        summary: a row a smear with at least `params.min_cells` counted cells.
        groups: the diagnosis of each.

    Raises:
        DataError: as `fit`.
    """
    table = features(summary, counts, params.parts)
    table = table[[c for c in table if table[c].notna().mean() > 0.5]]
    patients = patient_keys(summary)
    model = fit(table, groups, patients, params)
    laboratory = table[[c for c in table if c.startswith("cbc_")]]
    low, high = laboratory.min(), laboratory.max()
    room = WIDENING * (high - low).clip(lower=1e-6)
    low, high = (low - room).clip(lower=0), high + room  # no blood count is below 0
    for name in (f"cbc_{n}" for n, a in cbc.analytes().items() if a.scale == "log" and f"cbc_{n}" in laboratory):
        least, most = 10 ** laboratory[name].agg(["min", "max"]) - 1
        low[name], high[name] = np.log10(1 + least / FACTOR), np.log10(1 + most * FACTOR)
    same = patients.to_numpy()[:, None] == patients.to_numpy()[None]
    scaled = model.scaled(table)
    nearest = {p: np.where(same, np.inf, pairwise_distances(x)).min(axis=1).max() for p, x in scaled.items()}
    folder.mkdir(parents=True, exist_ok=True)
    skops.io.dump(model.pipeline, folder / SKOPS_FILE)
    seen = summary[["site", "smear", "patient"]].assign(group=groups).join(table)
    seen.to_parquet(folder / SEEN_FILE, index=False)
    card = DiagnosisCard(
        contract=CONTRACT,
        summary_version=differential.VERSION,
        embedding_version=embedding_version,
        vocabulary=vocabulary.load().version,
        groups=model.groups,
        not_available=not_available,
        features=tuple(table.columns),
        ranges={n: (float(low[n]), float(high[n])) for n in laboratory},
        inverse_temperature=model.inverse_temperature,
        nearest_limits={part: float(limit) for part, limit in nearest.items()},
        origin=origin,
        sites=tuple(sorted(set(summary["site"]))),
        num_patients=int(patients.nunique()),
        num_smears=len(summary),
        data_digest=hashlib.sha256(seen.sort_values(["site", "smear"]).to_csv(index=False).encode()).hexdigest(),
        parameters=params.model_dump(mode="json"),
    )
    (folder / CARD_FILE).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return DiagnosisModel(folder)


def patient_keys(summary: pd.DataFrame) -> pd.Series:
    """One key a patient; a smear without a patient is a patient of its own."""
    own = summary["patient"].astype(object).where(summary["patient"].notna(), "smear " + summary["smear"].astype(str))
    return (summary["site"].astype(str) + "/" + own.astype(str)).set_axis(summary.index)


class DiagnosisModel:
    """A packaged diagnostic model.

    Raises:
        ModelError: the folder lacks a file, is of another contract, or its model holds types that are not trusted.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / CARD_FILE).is_file() and (folder / "diagnosis").is_dir():
            folder = folder / "diagnosis"
        if (folder / ABSENT_FILE).is_file():
            because = plain_json.read(folder / ABSENT_FILE)["because"]
            raise ModelError(f"{folder} holds no diagnostic model: {because}")
        for name in (SKOPS_FILE, CARD_FILE, SEEN_FILE):
            if not (folder / name).is_file():
                raise ModelError(f"{folder} is no folder of a diagnostic model: it has no {name}; make one: dvc repro")
        try:
            self.card = DiagnosisCard.model_validate_json((folder / CARD_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{folder / CARD_FILE} is no card of a diagnostic model: {error}") from error
        if self.card.contract != CONTRACT:
            raise ModelError(f"{folder} keeps the contract '{self.card.contract}'; this version reads '{CONTRACT}'")
        file = folder / SKOPS_FILE
        if foreign := sorted(set(skops.io.get_untrusted_types(file=file)) - set(TRUSTED)):
            raise ModelError(f"{file} holds types that are not trusted: {', '.join(foreign)}")
        self.folder = folder
        pipeline = skops.io.load(file, trusted=TRUSTED)
        self._model = Fitted(pipeline, self.card.groups, self.card.inverse_temperature)

    @cached_property
    def seen(self) -> pd.DataFrame:
        """The smears it was trained on: site, smear, patient, group and features."""
        return pd.read_parquet(self.folder / SEEN_FILE)

    def diagnose(self, summary: pd.DataFrame, counts: pd.DataFrame | None = None) -> pd.DataFrame:
        """A row a smear: site, smear, status ('diagnosed' | 'abstained'), group (None where abstained), p_<GROUP>,
        reasons (list of feature, value, usual, contribution, says; for the likeliest group), abstained_because (list of
        text), cautions (list of text: what the answer rests on that training had not), not_available (list of group,
        because), origin, num_cells, num_counted.

        Args:
            summary: rows of `differential.summarise`.
            counts: rows of `cbc.COUNTS`; None where there is no blood count.

        Raises:
            ModelError: the summary, or its embedding, is of another version.
            DataError: there is no smear.
        """
        if summary.empty:
            raise DataError("there is no smear to diagnose")
        if "embedding_version" in summary and set(summary["embedding_version"]) - {self.card.embedding_version}:
            raise ModelError(
                f"the embedding is '{summary['embedding_version'].iloc[0]}', and this model reads "
                f"'{self.card.embedding_version}': recogniser and diagnostic model do not belong together"
            )
        parts = tuple(self.card.parameters["parts"])
        table = features(summary, counts, parts).reindex(columns=list(self.card.features))
        probabilities = self._model.probabilities(table)
        shapley = self._model.contributions(table)
        why = self._abstentions(summary, table, probabilities)
        origins = summary.get("origin", pd.Series(self.card.origin, summary.index)).to_numpy()
        best, usual = probabilities.argmax(axis=1), self.seen[list(self.card.features)].median()
        rows = []
        for i, group in enumerate(self.card.groups[k] for k in best):
            smear = summary.iloc[i]
            row = {
                "site": smear["site"],
                "smear": smear["smear"],
                "status": "abstained" if why[i] else "diagnosed",
                "group": None if why[i] else group,
                **{f"p_{g}": float(p) for g, p in zip(self.card.groups, probabilities[i], strict=True)},
                "reasons": reasons_for(table.iloc[i], usual, shapley[i, best[i]], group),
                "abstained_because": why[i],
                "cautions": self._cautions(smear),
                "not_available": [{"group": g, "because": b} for g, b in self.card.not_available.items()],
                "origin": "simulated" if "simulated" in (self.card.origin, origins[i]) else "real",
                "num_cells": int(smear["num_cells"]),
                "num_counted": int(smear["num_counted"]),
            }
            rows.append(row)
        return pd.DataFrame(rows)

    def _abstentions(
        self, summary: pd.DataFrame, table: pd.DataFrame, probabilities: NDArray[np.float64]
    ) -> list[list[str]]:
        card = self.card
        least = float(card.parameters["min_probability"])
        there = self._model.scaled(self.seen[list(card.features)])
        apart = {p: pairwise_distances(x, there[p]).min(axis=1) for p, x in self._model.scaled(table).items()}
        needed = {p: [c for c in card.features if c.startswith(PARTS[p])] for p in apart if p in _NEEDED}
        found = []
        for i in range(len(table)):
            because = []
            row, counted = table.iloc[i], int(summary["num_counted"].iloc[i])
            if counted < card.min_cells:
                because.append(f"{counted} cells were counted, and {card.min_cells} are needed")
            for name, (low, high) in card.ranges.items():
                if not np.isnan(row[name]) and not low <= row[name] <= high:
                    say = Told(name)
                    because.append(
                        f"{say.name} is {say.value(row[name])}; taken from {say.value(low)} to {say.value(high)}"
                    )
            for part, columns in needed.items():
                if (count := int(row[columns].isna().sum())) > MISSING_LIMIT * len(columns):
                    because.append(f"{count} of the {len(columns)} {_NEEDED[part]} that it reads are missing")
            for part, distances in apart.items():
                if distances[i] > card.nearest_limits[part]:
                    because.append(
                        f"in its {_PART_NAMES[part]} the smear is unlike all {len(self.seen)} that it learned from (distance "
                        f"{distances[i]:.2f}, at most {card.nearest_limits[part]:.2f})"
                    )
            if not because and probabilities[i].max() < least:
                because.append(f"no group reaches the probability {least:g} (highest {probabilities[i].max():.2f})")
            found.append(because)
        return found

    def _cautions(self, smear: pd.Series) -> list[str]:
        found = []
        if smear["site"] not in self.card.sites:
            found.append(f"it has learned from no smear of {smear['site']}")
        if smear.get("scale_assumed", False):
            found.append("the scale of the images is assumed, not known")
        return found


def check_pair(recogniser: RecognitionModel, diagnosis: DiagnosisCard) -> None:
    """Whether a recogniser and a diagnostic model belong together.

    Raises:
        ModelError: their contracts differ, or a recogniser of real cells would serve what was learned from simulated
            patients.
    """
    if diagnosis.embedding_version != recogniser.embedding_version:
        raise ModelError(
            f"the recogniser's embedding is '{recogniser.embedding_version}', the diagnostic model reads "
            f"'{diagnosis.embedding_version}': train the diagnostic model again on this recogniser's differentials"
        )
    if diagnosis.summary_version != differential.VERSION:
        raise ModelError(f"the diagnostic model reads '{diagnosis.summary_version}', not '{differential.VERSION}'")
    if recogniser.card.origin == "real" and diagnosis.origin != "real":
        raise ModelError("a recogniser trained on real cells serves only diagnoses learned from real patients")
