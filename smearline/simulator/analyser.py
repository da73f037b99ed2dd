"""The analyser: one row of a Sysmex XN export per smear, with the export's names, units, marks and sentinels.

Values come from the diagnosis (population.yaml). The healthy marginals are sanity ranges for synthetic data and no
reference intervals. Values agree with each other: HCT = MCV x RBC, MCH = HGB / RBC, MCHC = HGB / HCT, the differential
sums to 100 %, and each absolute count is its share of WBC.
"""

from collections.abc import Mapping
from datetime import datetime

import numpy as np

from smearline.cbc import sample_columns
from smearline.errors import SiteError
from smearline.simulator.population import Patient, tables

LEUCOCYTES = ("NEUT", "LYMPH", "MONO", "EO", "BASO")
LOGARITHMIC = ("WBC", "PLT", "IPF", "NRBC%", "IG%")  # drawn as [median, standard deviation of the logarithm]
RELATIVE_ERROR = 0.02  # between two channels that count the same cells


def export(patient: Patient, units: Mapping[str, str], when: datetime, rng: np.random.Generator) -> dict[str, str]:
    """One row of the export: header, values each with its /M mark, Q-Flags and IP flags.

    Args:
        units: the site's units of WBC, RBC, HGB, PLT and MCHC, which stand in the column names too.

    Raises:
        SiteError: a unit that the analyser does not print.
    """
    layout = tables("analyser")
    values = _measure(patient, rng)
    excess = {
        name: values[value] / threshold if side == ">" else threshold / max(values[value], 1e-6)
        for name, (value, side, threshold) in layout["rules"].items()
    }
    raised = {name for name, ratio in excess.items() if ratio > 1}
    abnormal = {group for group, names in layout["flags"].items() if raised & set(names)}
    row = dict.fromkeys(sample_columns(), "") | layout["header"] | {
        "Date": f"{when:%Y/%m/%d}", "Time": f"{when:%H:%M:%S}", "Sample No.": patient.smear,
        "Patient ID": patient.patient, "Sequence No.": str(int(rng.integers(1, 9999))),
        "Judgment": "Positive" if abnormal else "Negative",
        "Positive(Diff.)": "Diff." if "IP ABN(WBC)" in abnormal else "",
        "Positive(Morph.)": "Morph." if any("SUS" in group for group in abnormal) else "",
        "Positive(Count)": "Count" if {"IP ABN(RBC)", "IP ABN(PLT)"} & abnormal else "",
        "Action Message (Review)": "Review" if abnormal else "",
    }  # fmt: skip
    sentinel, failures = _sentinels(rng), layout["failures"]
    for name, (unit, decimals) in layout["printed"].items():
        factor, analyte = 1.0, unit if unit in layout["units"] else name
        if known := layout["units"].get(analyte):
            unit = units.get(analyte, next(iter(known)))
            if unit not in known:
                raise SiteError(f"cbc_units: the analyser prints {analyte} in {' or '.join(known)}, not in '{unit}'")
            factor, decimals = known[unit], 0 if unit == "g/L" else decimals
        text, mark = f"{values[name] * factor:.{decimals}f}", ""
        if name in sentinel:
            text = sentinel[name]
        elif rng.random() < failures["over_range"]:
            text = "++++"
        elif rng.random() < failures["unreliable"]:
            mark = "*" if rng.random() < 0.5 else "@"
            text += mark
        elif (limits := layout["limits"].get(name)) and not limits[0] <= values[name] <= limits[1]:
            mark = "+" if values[name] > limits[1] else "-"
        column = f"{name[:-1]}({unit})]" if unit and name.endswith("]") else f"{name}({unit})" if unit else name
        row |= {column: text, f"{column}/M": mark}
    for name in layout["q_flags"]:
        row[f"Q-Flag({name})"] = str(_suspicion(excess.get(name), rng))
    for group, names in layout["flags"].items():
        row |= {f"{group}{name}": "1" if name in raised else "" for name in names}
    return row


def _sentinels(rng: np.random.Generator) -> dict[str, str]:
    """Values that are missing, and how: a failed channel takes its whole group with it."""
    found: dict[str, str] = {}
    failures, of = tables("analyser")["failures"], tables("analyser")["channels_of"]
    if rng.random() < failures["reticulocytes"]:
        found |= dict.fromkeys(of["reticulocytes"], "ERROR")
    elif rng.random() < failures["not_ordered"]:
        found |= dict.fromkeys(of["reticulocytes"], "")
    for channel in ("differential", "red_cell_width"):
        if rng.random() < failures[channel]:
            found |= dict.fromkeys(of[channel], "----")
    return found


def _suspicion(excess: float | None, rng: np.random.Generator) -> int:
    """A Q-Flag from 0 to 300 in steps of 10; the analyser suspects from 100 on."""
    if excess is None:
        return 10 * int(rng.integers(0, 6))
    low, high = (100, 300) if excess > 1 else (0, 90)
    return 10 * round(min(max(100 * excess + rng.normal(0, 5), low), high) / 10)


def _differential(patient: Patient, rng: np.random.Generator) -> dict[str, float]:
    """The five-part differential in per cent, rounded to 0.1 so that it sums to 100.0."""
    mean = np.array(tables()["analyser_differential"][patient.diagnosis])
    tenths = rng.dirichlet(mean / mean.sum() * tables()["analyser_concentration"]) * 1000
    whole = np.floor(tenths)
    whole[np.argsort(whole - tenths)[: round(1000 - whole.sum())]] += 1
    return {f"{name}%": float(w) / 10 for name, w in zip(LEUCOCYTES, whole, strict=True)}


def _measure(patient: Patient, rng: np.random.Generator) -> dict[str, float]:
    """Every printed value by its printed name; counts in 10^9/L (red cells 10^12/L), HGB and MCHC in g/dL."""
    layout, by = tables("analyser"), tables()["cbc"][patient.diagnosis]
    v = {name: rng.normal(*mean_and_sd) for name, mean_and_sd in by.items() if name not in LOGARITHMIC}
    v |= {name: by[name][0] * rng.lognormal(0, by[name][1]) for name in LOGARITHMIC}
    v["WBC"], v["PLT"] = round(v["WBC"], 2), round(v["PLT"])
    v["HGB"] = round(max(v["HGB"] - (1.2 if patient.sex == "F" else 0.0), 4.0), 1)
    hct = v["HGB"] / v["MCHC"] * 100
    v["RBC"], v["HCT"] = round(hct * 10 / v["MCV"], 2), round(hct, 1)
    v["MCV"], v["MCH"], v["MCHC"] = v["HCT"] * 10 / v["RBC"], v["HGB"] * 10 / v["RBC"], v["HGB"] * 100 / v["HCT"]
    v["RDW-CV"] = max(v["RDW-CV"], 11.0)
    v["RDW-SD"] = v["RDW-CV"] * v["MCV"] / 27.5
    v["PDW"], v["P-LCR"] = v["MPV"] * 1.6 - 4.5, min(max(v["MPV"] * 7.2 - 47, 5.0), 65.0)
    v["PCT"] = v["PLT"] * v["MPV"] / 10_000
    v |= _differential(patient, rng)
    v["IG%"], v["NRBC%"] = round(min(v["IG%"], 0.6 * v["NEUT%"]), 1), round(min(v["NRBC%"], 60.0), 1)
    v["RET%"], v["IPF"] = max(v["RET%"], 0.1), min(v["IPF"], 60.0)
    v["IRF"] = round(min(max(7 + 9 * (v["RET%"] - 1) + rng.normal(0, 2.5), 1.0), 45.0), 1)
    v["HFR"] = round(v["IRF"] * rng.uniform(0.1, 0.3), 1)
    v["MFR"], v["LFR"] = v["IRF"] - v["HFR"], 100 - v["IRF"]
    v["RET-He"], v["[RBC-He]"] = v["MCH"] * rng.normal(1.05, 0.02), v["MCH"] * rng.normal(1.0, 0.015)
    v["[Delta-He]"] = v["RET-He"] - v["[RBC-He]"]
    v["[HYPO-He]"], v["[HYPER-He]"] = max(30 - v["MCH"], 0.2) ** 1.5 / 4, max(v["MCH"] - 29, 0.2) ** 1.2 / 5
    v["[RPI]"] = v["RET%"] * v["HCT"] / 45 / (1.0 if v["HCT"] > 40 else 1.5 if v["HCT"] > 30 else 2.0)
    v["[H-IPF]"] = v["IPF"] * 0.3
    v["[FRC%]"] = abs(rng.normal(0, 0.1)) * (v["RDW-CV"] / 13) ** 2
    v["[MicroR]"], v["[MacroR]"] = max(92 - v["MCV"], 1.0) ** 1.2 / 2, 3.5 + max(v["MCV"] - 88, 0.0) ** 1.3 / 4
    v |= {name: v[base] * rng.normal(1.0, RELATIVE_ERROR) for name, base in layout["again"].items()}
    malignant = patient.diagnosis in ("ALL", "AML", "LYMPHOMA")
    v["[HFLC%]"] = min(abs(rng.normal(0, 0.3)) * (6 if malignant else 1), v["LYMPH%"])
    v |= {name: v[share] * v[whole] / 100 for name, (share, whole) in layout["shares"].items()}
    v["[TNC]"], v["[NEUT#&]"], v["[LYMP#&]"] = v["WBC"] + v["NRBC#"], v["NEUT#"] - v["IG#"], v["LYMPH#"] * 0.99
    v["[NE-SSC]"], v["[NE-WX]"] = v["NE-SSC"], v["NE-WX"]
    return v | {name: rng.normal(*mean_and_sd) for name, mean_and_sd in layout["channels"].items()}
