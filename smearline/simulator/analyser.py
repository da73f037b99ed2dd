"""The analyser: one row of a Sysmex XN export per smear, with the export's names, units, marks and sentinels.

Values come from the diagnosis (population.yaml). The healthy marginals are sanity ranges for synthetic data and no
reference intervals. Values agree with each other: HCT = MCV x RBC, MCH = HGB / RBC, MCHC = HGB / HCT, the differential
sums to 100 %, and each absolute count is its share of WBC.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from smearline.errors import SiteError
from smearline.simulator.population import Patient, tables

LEUCOCYTES = ("NEUT", "LYMPH", "MONO", "EO", "BASO")
LOGARITHMIC = ("WBC", "PLT", "IPF", "NRBC%", "IG%")
"""Drawn as [median, standard deviation of the logarithm]."""
Measured = dict[str, float]
# analyte -> unit of the export -> what a count in 10^9/L, 10^12/L or g/dL is multiplied by
UNITS: dict[str, dict[str, float]] = {
    **{name: {"10^9/L": 1.0, "10^3/uL": 1.0} for name in ("WBC", "PLT")},
    "RBC": {"10^12/L": 1.0, "10^6/uL": 1.0},
    **{name: {"g/dL": 1.0, "g/L": 10.0} for name in ("HGB", "MCHC")},
}
RELATIVE_ERROR = 0.02
"""Between two channels that count the same cells."""


@cache
def layout() -> dict[str, Any]:
    """analyser.yaml, read once."""
    return dict(yaml.safe_load(files(__package__).joinpath("analyser.yaml").read_text(encoding="utf-8")))


def export(patient: Patient, units: Mapping[str, str], when: datetime, rng: np.random.Generator) -> dict[str, str]:
    """One row of the export: header, values each with its /M mark, Q-Flags and IP flags.

    Args:
        units: the site's units of WBC, RBC, HGB, PLT and MCHC, which stand in the column names too.

    Raises:
        SiteError: a unit that the analyser does not print.
    """
    values = _measure(patient, rng)
    raised = _flags(values)
    abnormal = {group for group, names in raised.items() if names}
    row = dict.fromkeys(layout()["header"], "")
    row |= {
        "Nickname": "XN-SIM", "Analyzer ID": "XN-20^00000", "Date": f"{when:%Y/%m/%d}", "Time": f"{when:%H:%M:%S}",
        "Sample No.": patient.smear, "Order Type": "Initial", "Measurement Mode": "WB", "Patient ID": patient.patient,
        "Discrete": "CBC+DIFF+RET+PLT-F", "Output": "0", "Sequence No.": str(int(rng.integers(1, 9999))),
        "Judgment": "Positive" if abnormal else "Negative",
        "Positive(Diff.)": "Diff." if "IP ABN(WBC)" in abnormal else "",
        "Positive(Morph.)": "Morph." if any("SUS" in group for group in abnormal) else "",
        "Positive(Count)": "Count" if {"IP ABN(RBC)", "IP ABN(PLT)"} & abnormal else "",
        "Action Message (Review)": "Review" if abnormal else "",
    }  # fmt: skip
    sentinel, failures = _sentinels(rng), layout()["failures"]
    for name, (unit, decimals) in layout()["printed"].items():
        analyte = unit if unit in UNITS else name
        factor = 1.0
        if analyte in UNITS:
            unit, factor = _unit(analyte, units)
        if unit == "g/L":
            decimals = 0
        text = f"{values[name] * factor:.{decimals}f}"
        mark = ""
        if name in sentinel:
            text = sentinel[name]
        elif rng.random() < failures["over_range"]:
            text = "++++"
        elif rng.random() < failures["unreliable"]:
            mark = "*" if rng.random() < 0.5 else "@"
            text += mark
        elif (limits := layout()["limits"].get(name)) and not limits[0] <= values[name] <= limits[1]:
            mark = "+" if values[name] > limits[1] else "-"
        column = f"{name[:-1]}({unit})]" if unit and name.endswith("]") else f"{name}({unit})" if unit else name
        row[column], row[f"{column}/M"] = text, mark
    for name in layout()["q_flags"]:
        row[f"Q-Flag({name})"] = str(_q_flag(name, values, rng))
    for group, names in layout()["flags"].items():
        row |= {f"{group}{name}": "1" if name in raised[group] else "" for name in names}
    return row


def _unit(analyte: str, units: Mapping[str, str]) -> tuple[str, float]:
    known = UNITS[analyte]
    unit = units.get(analyte, next(iter(known)))
    if unit not in known:
        raise SiteError(f"cbc_units: the analyser prints {analyte} in {' or '.join(known)}, not in '{unit}'")
    return unit, known[unit]


def _sentinels(rng: np.random.Generator) -> dict[str, str]:
    """Values that are missing, and how: a failed channel takes its whole group with it."""
    found: dict[str, str] = {}
    failures, printed = layout()["failures"], layout()["printed"]
    reticulocytes = [n for n in printed if n.startswith(("RET", "IRF", "LFR", "MFR", "HFR", "[RET", "[IRF", "[RPI"))]
    differential = [n for n in printed if n.rstrip("#%") in (*LEUCOCYTES, "IG")]
    if rng.random() < failures["reticulocytes"]:
        found |= dict.fromkeys(reticulocytes, "ERROR")
    elif rng.random() < failures["not_ordered"]:
        found |= dict.fromkeys(reticulocytes, "")
    if rng.random() < failures["differential"]:
        found |= dict.fromkeys(differential, "----")
    if rng.random() < failures["red_cell_width"]:
        found |= dict.fromkeys(("RDW-SD", "PDW", "P-LCR", "MPV", "PCT"), "----")
    return found


def _shares(patient: Patient, rng: np.random.Generator) -> dict[str, float]:
    """The five-part differential in per cent, rounded to 0.1 so that it sums to 100.0."""
    mean = np.array(tables()["analyser_differential"][patient.diagnosis])
    tenths = rng.dirichlet(mean / mean.sum() * tables()["analyser_concentration"]) * 1000
    whole = np.floor(tenths)
    whole[np.argsort(whole - tenths)[: round(1000 - whole.sum())]] += 1
    return {f"{name}%": float(w) / 10 for name, w in zip(LEUCOCYTES, whole, strict=True)}


def _measure(patient: Patient, rng: np.random.Generator) -> Measured:
    """Every printed value by its printed name; counts in 10^9/L (red cells 10^12/L), HGB and MCHC in g/dL."""
    drawn = {
        name: rng.normal(*by) for name, by in tables()["cbc"][patient.diagnosis].items() if name not in LOGARITHMIC
    }
    for name in LOGARITHMIC:
        median, spread = tables()["cbc"][patient.diagnosis][name]
        drawn[name] = median * math.exp(rng.normal(0, spread))
    v: Measured = {"WBC": round(drawn["WBC"], 2), "PLT": round(drawn["PLT"]), "MPV": drawn["MPV"]}
    v["HGB"] = round(max(drawn["HGB"] - (1.2 if patient.sex == "F" else 0.0), 4.0), 1)
    hct = v["HGB"] / drawn["MCHC"] * 100
    v["RBC"], v["HCT"] = round(hct * 10 / drawn["MCV"], 2), round(hct, 1)
    v["MCV"], v["MCH"], v["MCHC"] = v["HCT"] * 10 / v["RBC"], v["HGB"] * 10 / v["RBC"], v["HGB"] * 100 / v["HCT"]
    v["RDW-CV"] = max(drawn["RDW-CV"], 11.0)
    v["RDW-SD"] = v["RDW-CV"] * v["MCV"] / 27.5
    v["PDW"], v["P-LCR"] = v["MPV"] * 1.6 - 4.5, min(max(v["MPV"] * 7.2 - 47, 5.0), 65.0)
    v["PCT"] = v["PLT"] * v["MPV"] / 10_000
    v |= _shares(patient, rng)
    v["IG%"] = round(min(drawn["IG%"], 0.6 * v["NEUT%"]), 1)
    v["NRBC%"] = round(min(drawn["NRBC%"], 60.0), 1)
    for name in (*LEUCOCYTES, "IG", "NRBC"):
        v[f"{name}#"] = v[f"{name}%"] * v["WBC"] / 100
    v["RET%"] = max(drawn["RET%"], 0.1)
    v["RET#"] = v["RET%"] * v["RBC"] / 100
    v["IRF"] = round(min(max(7 + 9 * (v["RET%"] - 1) + rng.normal(0, 2.5), 1.0), 45.0), 1)
    v["HFR"] = round(v["IRF"] * rng.uniform(0.1, 0.3), 1)
    v["MFR"], v["LFR"] = v["IRF"] - v["HFR"], 100 - v["IRF"]
    v["RET-He"], v["[RBC-He]"] = v["MCH"] * rng.normal(1.05, 0.02), v["MCH"] * rng.normal(1.0, 0.015)
    v["[Delta-He]"] = v["RET-He"] - v["[RBC-He]"]
    v["[HYPO-He]"], v["[HYPER-He]"] = max(30 - v["MCH"], 0.2) ** 1.5 / 4, max(v["MCH"] - 29, 0.2) ** 1.2 / 5
    v["[RPI]"] = v["RET%"] * v["HCT"] / 45 / (1.0 if v["HCT"] > 40 else 1.5 if v["HCT"] > 30 else 2.0)
    v["IPF"] = min(drawn["IPF"], 60.0)
    v["[IPF#]"], v["[H-IPF]"] = v["IPF"] * v["PLT"] / 100, v["IPF"] * 0.3
    v["[FRC%]"] = abs(rng.normal(0, 0.1)) * (v["RDW-CV"] / 13) ** 2
    v["[FRC#]"] = v["[FRC%]"] * v["RBC"] / 100
    v["[MicroR]"], v["[MacroR]"] = max(92 - v["MCV"], 1.0) ** 1.2 / 2, 3.5 + max(v["MCV"] - 88, 0.0) ** 1.3 / 4
    v["[TNC]"] = v["WBC"] + v["NRBC#"]
    for name, base in layout()["again"].items():
        v[name] = v[base] * rng.normal(1.0, RELATIVE_ERROR)
    v["[NEUT#&]"], v["[LYMP#&]"] = v["NEUT#"] - v["IG#"], v["LYMPH#"] * 0.99
    v["[HFLC%]"] = min(
        abs(rng.normal(0, 0.3)) * (6 if patient.diagnosis in ("ALL", "AML", "LYMPHOMA") else 1), v["LYMPH%"]
    )
    v["[HFLC#]"] = v["[HFLC%]"] * v["WBC"] / 100
    v["[NE-SSC]"], v["[NE-WX]"] = drawn["NE-SSC"], drawn["NE-WX"]
    for name, (mean, spread) in layout()["channels"].items():
        v[name] = rng.normal(mean, spread)
    return v


def _flags(values: Measured) -> dict[str, set[str]]:
    """The messages raised, by group."""
    raised = {
        name
        for name, (value, side, threshold) in layout()["rules"].items()
        if (values[value] > threshold if side == ">" else values[value] < threshold)
    }
    return {group: raised.intersection(names) for group, names in layout()["flags"].items()}


def _q_flag(name: str, values: Measured, rng: np.random.Generator) -> int:
    """A suspicion from 0 to 300 in steps of 10; the analyser suspects from 100 on."""
    if name not in layout()["rules"]:
        return 10 * int(rng.integers(0, 6))
    value, side, threshold = layout()["rules"][name]
    ratio = values[value] / threshold if side == ">" else threshold / max(values[value], 1e-6)
    return 10 * round(min(max(100 * ratio + rng.normal(0, 5), 100 if ratio > 1 else 0), 300 if ratio > 1 else 90) / 10)
