"""What is to be drawn: patients, the mix of cells on their smears and each cell's characteristics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from smearline import vocabulary


@dataclass(frozen=True)
class Patient:
    patient: str
    smear: str
    diagnosis: str
    age: int
    sex: str  # 'F' or 'M'
    mix: Mapping[str, float]  # share of each type on the smear
    rates: Mapping[str, float]  # rate of each present/absent characteristic


@dataclass(frozen=True)
class Cell:
    """`traits` holds the characteristics that apply to the type, by name."""

    type: str
    diameter_um: float
    traits: Mapping[str, str]

    def has(self, trait: str, value: str = "present") -> bool:
        return self.traits.get(trait) == value


@dataclass(frozen=True)
class Style:
    """How a type looks: a row of styles.yaml, which says what each key means."""

    diameter_um: tuple[float, float]
    cytoplasm: Sequence[float] = (0.0, 0.0, 0.0)
    nucleus: tuple[float, float] = (0.0, 0.0)
    chromatin: Sequence[float] = (0.0, 0.0, 0.0)
    granules: tuple[str, Sequence[float]] | None = None
    shapes: Sequence[str] = ("unsegmented-round",)
    eccentric: float = 0.25
    rim: float = 0.0
    warp_um: float = 0.3


@cache
def style(kind: str) -> Style:
    return Style(**tables("styles")["types"][kind])


@cache
def tables(name: str = "population") -> dict[str, Any]:
    """The numbers: population.yaml, analyser.yaml or styles.yaml."""
    return dict(yaml.safe_load(files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")))


def diagnosis_of(index: int, site_key: int, seed: int) -> str:
    """Diagnoses come in shuffled blocks, so that any six patients in a row of a site hold each once."""
    diagnoses = list(tables()["mix"])
    block, place = divmod(index, len(diagnoses))
    order = np.random.default_rng([seed, site_key, 0, block]).permutation(len(diagnoses))
    return diagnoses[int(order[place])]


def draw_patient(prefix: str, index: int, diagnosis: str, rng: np.random.Generator) -> Patient:
    t, name = tables(), f"{prefix}{index + 1:04d}"
    weights = t["mix"][diagnosis]
    shares = np.array(list(weights.values())) / sum(weights.values())
    mix = dict(zip(weights, rng.dirichlet(shares * t["mix_concentration"]).tolist(), strict=True))
    rates = {
        name: min(by.get(diagnosis, by["else"]) * rng.lognormal(0, t["rate_spread"]), 0.95)
        for name, by in t["rates"].items()
    }
    age = round(float(np.clip(rng.normal(*t["age"][diagnosis]), 18, 95)))
    return Patient(name, f"{name}-1", diagnosis, age, "F" if rng.random() < 0.5 else "M", mix, rates)


def draw_cell(patient: Patient, rng: np.random.Generator) -> Cell:
    """A cell of the smear: its type, its size and every characteristic that applies to the type."""
    return cell_of_type(_one_of(patient.mix, rng), patient.rates, rng)


def _one_of(weights: Mapping[str, float], rng: np.random.Generator) -> str:
    share = np.fromiter(weights.values(), float)
    return list(weights)[int(rng.choice(len(share), p=share / share.sum()))]


def cell_of_type(kind: str, rates: Mapping[str, float], rng: np.random.Generator, **fixed: str) -> Cell:
    """A cell of a type, with `fixed` characteristics where given and the others drawn to agree with them."""
    known = vocabulary.load().characteristics
    traits = {
        name: fixed.get(name) or ("present" if rng.random() < rate else "absent")
        for name, rate in rates.items()
        if kind in known[name].applies_to
    }
    if kind in known["cell_size"].applies_to:
        traits |= {name: _one_of(by_type[kind], rng) for name, by_type in tables()["values"].items()}
        traits["granule_type"], _, traits["granule_colour"] = traits["granule_type"].partition(" ")
    traits |= fixed
    present = {name for name, value in traits.items() if value == "present"}
    for winner, loser in tables()["excludes"]:
        if {winner, loser} <= present:
            gone = winner if fixed.get(loser) == "present" else loser
            traits[gone] = "absent"
            present.remove(gone)
    if "granule_type" in traits:
        _agree(traits, present, rng)
    mean, spread = style(kind).diameter_um
    diameter = float(np.clip(rng.normal(mean, spread), mean - 2.5 * spread, mean + 2.5 * spread))
    if "reactive_cytoplasm" in present:
        diameter += rng.uniform(0.4, 2.4)
    if kind == "LYMPH":
        diameter += 1.5 * ("large_granular" in present) + 1.2 * (rng.random() < 0.12)
    if "dysplastic_erythroblast" in present:
        diameter += 0.8
    if "cell_shape" in traits:
        big = tables()["big_above_um"]
        if "cell_size" in fixed:
            diameter = big + (0.9 if fixed["cell_size"] == "big" else -0.9)
        traits["cell_size"] = "big" if diameter + rng.normal(0, 0.4) > big else "small"
        traits |= fixed
    return Cell(kind, diameter, {name: traits[name] for name in known if name in traits})


def _agree(traits: dict[str, str], present: set[str], rng: np.random.Generator) -> None:
    """Granules, nucleus and chromatin as the findings have them."""
    granules = (traits["granule_type"], traits["granule_colour"] or "nil")
    if "hypogranulation" in present:
        granules = ("nil", "nil")
    elif "toxic_granulation" in present:
        granules = ("coarse", "purple")
    elif "large_granular" in present:
        granules, traits["nuclear_cytoplasmic_ratio"] = ("small", "purple"), "low"
    traits["granule_type"], traits["granule_colour"] = granules
    traits["granularity"] = "no" if granules[0] == "nil" else "yes"
    if "hypersegmentation" in present:
        traits["nucleus_shape"] = "segmented-multilobed"
    if "pseudo_pelger_huet" in present:
        traits["nucleus_shape"] = "segmented-bilobed" if rng.random() < 0.7 else "unsegmented-round"
        traits["chromatin_density"] = "densely"
