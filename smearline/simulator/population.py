"""Patients, the mix of cells on their smears and each cell's characteristics; the numbers are in population.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from smearline import vocabulary
from smearline.simulator.cells import Cell
from smearline.simulator.styles import styles


@dataclass(frozen=True)
class Patient:
    patient: str
    smear: str
    diagnosis: str
    age: int
    sex: str
    """'F' or 'M'."""
    mix: Mapping[str, float]
    """Share of each type on the smear."""
    rates: Mapping[str, float]
    """Rate of each present/absent characteristic."""


@cache
def tables() -> dict[str, Any]:
    """population.yaml, read once."""
    return dict(yaml.safe_load(files(__package__).joinpath("population.yaml").read_text(encoding="utf-8")))


def diagnosis_of(index: int, site_key: int, seed: int) -> str:
    """Diagnoses come in shuffled blocks, so that any six patients in a row of a site hold each once."""
    diagnoses = list(tables()["mix"])
    block, place = divmod(index, len(diagnoses))
    order = np.random.default_rng([seed, site_key, 0, block]).permutation(len(diagnoses))
    return diagnoses[int(order[place])]


def draw_patient(prefix: str, index: int, diagnosis: str, rng: np.random.Generator) -> Patient:
    t = tables()
    weights = t["mix"][diagnosis]
    shares = np.array(list(weights.values())) / sum(weights.values())
    mix = rng.dirichlet(shares * t["mix_concentration"])
    spread = t["rate_spread"]
    rates = {
        name: min(by.get(diagnosis, by["else"]) * math.exp(rng.normal(0, spread)), 0.95)
        for name, by in t["rates"].items()
    }
    name = f"{prefix}{index + 1:04d}"
    return Patient(
        patient=name,
        smear=f"{name}-1",
        diagnosis=diagnosis,
        age=round(float(np.clip(rng.normal(*t["age"][diagnosis]), 18, 95))),
        sex="F" if rng.random() < 0.5 else "M",
        mix=dict(zip(weights, mix.tolist(), strict=True)),
        rates=rates,
    )


def draw_cell(patient: Patient, rng: np.random.Generator) -> Cell:
    """A cell of the smear: its type, its size and every characteristic that applies to the type."""
    kinds, shares = list(patient.mix), np.fromiter(patient.mix.values(), float)
    return cell_of_type(kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))], patient.rates, rng)


def cell_of_type(kind: str, rates: Mapping[str, float], rng: np.random.Generator, **fixed: str) -> Cell:
    """A cell of a type, with `fixed` characteristics where given and the others drawn to agree with them."""
    known = vocabulary.load().characteristics
    traits = {
        name: fixed.get(name) or ("present" if rng.random() < rate else "absent")
        for name, rate in rates.items()
        if kind in known[name].applies_to
    }
    if kind in known["cell_size"].applies_to:
        for name, by_type in tables()["values"].items():
            weights = by_type[kind]
            total = np.cumsum(np.fromiter(weights.values(), float))
            drawn = list(weights)[int(np.searchsorted(total, rng.random() * total[-1]))]
            if name == "granule_type":
                traits[name], _, traits["granule_colour"] = drawn.partition(" ")
            else:
                traits[name] = drawn
    traits.update(fixed)
    _exclude(kind, traits, fixed, rng)
    mean, spread = styles().types[kind].diameter_um
    diameter = float(np.clip(rng.normal(mean, spread), mean - 2.5 * spread, mean + 2.5 * spread))
    if traits.get("reactive_cytoplasm") == "present":
        diameter += rng.uniform(0.4, 2.4)
    if kind == "LYMPH":
        diameter += 1.5 * (traits.get("large_granular") == "present") + 1.2 * (rng.random() < 0.12)
    if traits.get("dysplastic_erythroblast") == "present":
        diameter += 0.8
    if "cell_shape" in traits:
        big = tables()["big_above_um"]
        if "cell_size" in fixed:
            diameter = big + (0.9 if fixed["cell_size"] == "big" else -0.9)
        traits["cell_size"] = "big" if diameter + rng.normal(0, 0.4) > big else "small"
        traits.update(fixed)
    order = [name for name in known if name in traits]
    return Cell(kind, diameter, {name: traits[name] for name in order})


def _exclude(kind: str, traits: dict[str, str], fixed: Mapping[str, str], rng: np.random.Generator) -> None:
    """Make the characteristics agree: what is fixed wins, then the rarer finding."""

    def present(name: str) -> bool:
        return traits.get(name) == "present"

    for winner, loser in (
        ("hypogranulation", "toxic_granulation"),
        ("pseudo_pelger_huet", "hypersegmentation"),
        ("villous_projections", "reactive_cytoplasm"),
        ("cleaved_or_convoluted_nucleus", "reactive_cytoplasm"),
        ("cup_like_nucleus", "auer_rod"),
    ):
        if present(winner) and present(loser):
            traits[winner if fixed.get(loser) == "present" else loser] = "absent"
    if "granule_type" not in traits:
        return
    granules = (traits["granule_type"], traits["granule_colour"] or "nil")
    if present("hypogranulation"):
        granules = ("nil", "nil")
    elif present("toxic_granulation"):
        granules = ("coarse", "purple")
    elif present("large_granular"):
        granules, traits["nuclear_cytoplasmic_ratio"] = ("small", "purple"), "low"
    traits["granule_type"], traits["granule_colour"] = granules
    traits["granularity"] = "no" if granules[0] == "nil" else "yes"
    if present("hypersegmentation"):
        traits["nucleus_shape"] = "segmented-multilobed"
    if present("pseudo_pelger_huet"):
        traits["nucleus_shape"] = "segmented-bilobed" if rng.random() < 0.7 else "unsegmented-round"
        traits["chromatin_density"] = "densely"
