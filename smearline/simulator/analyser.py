"""The analyser: one row of a Sysmex XN export per smear, with the export's names, units, marks and sentinels.

Values come from the diagnosis (population.yaml). The healthy marginals are sanity ranges for synthetic data and no
reference intervals. Values agree with each other: HCT = MCV x RBC, MCH = HGB / RBC, MCHC = HGB / HCT, the differential
sums to 100 %, and each absolute count is its share of WBC.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime

import numpy as np

from smearline.errors import SiteError
from smearline.simulator.flags import FLAG_GROUPS, Q_FLAGS, Measured, flags, q_flag
from smearline.simulator.population import Patient, tables

LEUCOCYTES = ("NEUT", "LYMPH", "MONO", "EO", "BASO")
HEADER = (
    "Nickname", "Analyzer ID", "Date", "Time", "Rack", "Position", "Sample No.", "Sample Inf.", "Order Type",
    "Reception Date", "Measurement Mode", "Patient ID", "Analysis Info.", "Error(Func.)", "Error(Result)", "Order Info.",
    "WBC Info.", "PLT Info.", "Rule Result", "Validate", "Validator", "Action Message (Check)", "Action Message (Review)",
    "Action Message (Retest)", "Sample Comment", "Patient Name", "Birth", "Sex", "Patient Comment", "Ward Name",
    "Doctor Name", "Output", "Sequence No.", "Discrete", "Judgment", "Positive(Diff.)", "Positive(Morph.)",
    "Positive(Count)",
)  # fmt: skip
# analyte -> unit of the export -> what a count in 10^9/L, 10^12/L or g/dL is multiplied by
UNITS: dict[str, dict[str, float]] = {
    **{name: {"10^9/L": 1.0, "10^3/uL": 1.0} for name in ("WBC", "PLT")},
    "RBC": {"10^12/L": 1.0, "10^6/uL": 1.0},
    **{name: {"g/dL": 1.0, "g/L": 10.0} for name in ("HGB", "MCHC")},
}
# printed name without unit -> (unit, decimals); a name in brackets is a research parameter
PRINTED: dict[str, tuple[str, int]] = {
    "WBC": ("", 2), "RBC": ("", 2), "HGB": ("", 1), "HCT": ("%", 1), "MCV": ("fL", 1), "MCH": ("pg", 1),
    "MCHC": ("", 1), "PLT": ("", 0), "RDW-SD": ("fL", 1), "RDW-CV": ("%", 1), "PDW": ("fL", 1), "MPV": ("fL", 1),
    "P-LCR": ("%", 1), "PCT": ("%", 2), "NRBC#": ("WBC", 2), "NRBC%": ("%", 1),
    **{f"{name}#": ("WBC", 2) for name in LEUCOCYTES}, **{f"{name}%": ("%", 1) for name in LEUCOCYTES},
    "IG#": ("WBC", 2), "IG%": ("%", 1), "RET%": ("%", 2), "RET#": ("RBC", 4), "IRF": ("%", 1), "LFR": ("%", 1),
    "MFR": ("%", 1), "HFR": ("%", 1), "RET-He": ("pg", 1), "IPF": ("%", 1), "[IPF#]": ("PLT", 1),
    "[H-IPF]": ("%", 1), "[PLT-I]": ("PLT", 0), "[PLT-O]": ("PLT", 0), "[PLT-F]": ("PLT", 0), "[RBC-He]": ("pg", 1),
    "[Delta-He]": ("pg", 1), "[HYPO-He]": ("%", 1), "[HYPER-He]": ("%", 1), "[RPI]": ("", 2), "[RET-Y]": ("ch", 1),
    "[RET-RBC-Y]": ("ch", 1), "[IRF-Y]": ("ch", 1), "[FRC#]": ("RBC", 4), "[FRC%]": ("%", 2), "[MicroR]": ("%", 1),
    "[MacroR]": ("%", 1), "[RBC-O]": ("RBC", 2), "[HGB-O]": ("HGB", 1), "[MCHC-O]": ("MCHC", 1), "[TNC]": ("WBC", 2),
    "[WBC-N]": ("WBC", 2), "[WBC-D]": ("WBC", 2), "[WBC-P]": ("WBC", 2), "[NEUT#&]": ("WBC", 2),
    "[LYMP#&]": ("WBC", 2), "[HFLC#]": ("WBC", 2), "[HFLC%]": ("%", 1),
    **{f"[{name}]": ("ch", 1) for name in ("NE-SSC", "NE-SFL", "NE-FSC", "LY-X", "LY-Y", "LY-Z", "MO-X", "MO-Y", "MO-Z")},
    **{f"[{cell}-W{axis}]": ("", 0) for cell in ("NE", "LY", "MO") for axis in "XYZ"},
}  # fmt: skip
# name -> (mean, standard deviation) of research parameters that the diagnosis does not move
CHANNELS = {
    "[NE-SFL]": (48.0, 3.0), "[NE-FSC]": (86.0, 4.0), "[LY-X]": (79.0, 2.0), "[LY-Y]": (68.0, 4.0),
    "[LY-Z]": (58.0, 2.0), "[MO-X]": (120.0, 3.0), "[MO-Y]": (113.0, 7.0), "[MO-Z]": (66.0, 3.0),
    "[NE-WY]": (620.0, 40.0), "[NE-WZ]": (640.0, 50.0), "[LY-WX]": (480.0, 50.0), "[LY-WY]": (880.0, 80.0),
    "[LY-WZ]": (560.0, 60.0), "[MO-WX]": (270.0, 30.0), "[MO-WY]": (660.0, 80.0), "[MO-WZ]": (570.0, 70.0),
    "[RET-Y]": (180.0, 8.0), "[RET-RBC-Y]": (172.0, 7.0), "[IRF-Y]": (195.0, 9.0),
}  # fmt: skip
RELATIVE_ERROR = 0.02
RETICULOCYTE_FAILURE, DIFFERENTIAL_FAILURE, LOW_RELIABILITY, OVER_RANGE, NOT_ORDERED = 0.02, 0.02, 0.03, 0.004, 0.05


def export(patient: Patient, units: Mapping[str, str], when: datetime, rng: np.random.Generator) -> dict[str, str]:
    """One row of the export: header, values each with its /M mark, Q-Flags and IP flags.

    Args:
        units: the site's units of WBC, RBC, HGB, PLT and MCHC, which stand in the column names too.

    Raises:
        SiteError: a unit that the analyser does not print.
    """
    values = _measure(patient, rng)
    raised = flags(values)
    abnormal = {group for group, names in raised.items() if names}
    row = dict.fromkeys(HEADER, "")
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
    sentinel = _sentinels(rng)
    for name, (unit, decimals) in PRINTED.items():
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
        elif rng.random() < OVER_RANGE:
            text = "++++"
        elif rng.random() < LOW_RELIABILITY / 4:
            mark, text = "*", text + ("*" if rng.random() < 0.5 else "@")
        elif (limits := LIMITS.get(name)) and not limits[0] <= values[name] <= limits[1]:
            mark = "+" if values[name] > limits[1] else "-"
        column = f"{name[:-1]}({unit})]" if unit and name.endswith("]") else f"{name}({unit})" if unit else name
        row[column], row[f"{column}/M"] = text, mark
    for name in Q_FLAGS:
        row[f"Q-Flag({name})"] = str(q_flag(name, values, rng))
    for group, names in FLAG_GROUPS.items():
        row |= {f"{group}{name}": "1" if name in raised[group] else "" for name in names}
    return row


# The analyser's +/- marks follow these made-up limits (sanity ranges, see the module's docstring).
LIMITS = {
    "WBC": (4.0, 10.0), "RBC": (3.8, 5.7), "HGB": (12.0, 17.5), "HCT": (36.0, 52.0), "MCV": (80.0, 98.0),
    "MCH": (27.0, 33.0), "MCHC": (32.0, 36.0), "PLT": (150.0, 400.0), "RDW-CV": (11.5, 14.5), "RDW-SD": (37.0, 50.0),
    "MPV": (9.0, 12.5), "NEUT#": (1.8, 7.5), "LYMPH#": (1.0, 4.0), "MONO#": (0.2, 1.0), "EO#": (0.0, 0.5),
    "BASO#": (0.0, 0.1), "IG%": (0.0, 1.0), "NRBC%": (0.0, 0.0), "RET%": (0.5, 2.0), "IRF": (2.0, 16.0),
    "RET-He": (28.0, 36.0), "IPF": (1.0, 7.0),
}  # fmt: skip


def _unit(analyte: str, units: Mapping[str, str]) -> tuple[str, float]:
    known = UNITS[analyte]
    unit = units.get(analyte, next(iter(known)))
    if unit not in known:
        raise SiteError(f"cbc_units: the analyser prints {analyte} in {' or '.join(known)}, not in '{unit}'")
    return unit, known[unit]


def _sentinels(rng: np.random.Generator) -> dict[str, str]:
    """Values that are missing, and how: a failed channel takes its whole group with it."""
    found: dict[str, str] = {}
    reticulocytes = [n for n in PRINTED if n.startswith(("RET", "IRF", "LFR", "MFR", "HFR", "[RET", "[IRF", "[RPI"))]
    differential = [n for n in PRINTED if n.rstrip("#%") in (*LEUCOCYTES, "IG")]
    if rng.random() < RETICULOCYTE_FAILURE:
        found |= dict.fromkeys(reticulocytes, "ERROR")
    elif rng.random() < NOT_ORDERED:
        found |= dict.fromkeys(reticulocytes, "")
    if rng.random() < DIFFERENTIAL_FAILURE:
        found |= dict.fromkeys(differential, "----")
    if rng.random() < 3 * LOW_RELIABILITY:
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
    """Every printed value by its name in PRINTED; counts in 10^9/L (red cells 10^12/L), HGB and MCHC in g/dL."""
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
    for name, base in AGAIN.items():
        v[name] = v[base] * rng.normal(1.0, RELATIVE_ERROR)
    v["[NEUT#&]"], v["[LYMP#&]"] = v["NEUT#"] - v["IG#"], v["LYMPH#"] * 0.99
    v["[HFLC%]"] = min(
        abs(rng.normal(0, 0.3)) * (6 if patient.diagnosis in ("ALL", "AML", "LYMPHOMA") else 1), v["LYMPH%"]
    )
    v["[HFLC#]"] = v["[HFLC%]"] * v["WBC"] / 100
    v["[NE-SSC]"], v["[NE-WX]"] = drawn["NE-SSC"], drawn["NE-WX"]
    for name, (mean, spread) in CHANNELS.items():
        v[name] = rng.normal(mean, spread)
    return v


LOGARITHMIC = ("WBC", "PLT", "IPF", "NRBC%", "IG%")
# measured again in another channel
AGAIN = {
    "[PLT-I]": "PLT", "[PLT-O]": "PLT", "[PLT-F]": "PLT", "[RBC-O]": "RBC", "[HGB-O]": "HGB", "[MCHC-O]": "MCHC",
    "[WBC-N]": "WBC", "[WBC-D]": "WBC", "[WBC-P]": "WBC",
}  # fmt: skip
