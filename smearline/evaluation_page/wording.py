"""Numbers and names as a reader expects them, and the summary in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smearline.vocabulary import load

Json = Mapping[str, Any]
UNKNOWN = "–"


def count(value: int, noun: str = "") -> str:
    """1234, 'cell' to '1,234 cells'."""
    return f"{value:,}" + (f" {noun}{'' if value == 1 else 's'}" if noun else "")


def percent(value: float | None, unit: str = "\N{NO-BREAK SPACE}%") -> str:
    """0.9661 to '96.6 %' (its space does not break). What is not quite all or nothing is never rounded to it."""
    if value is None:
        return UNKNOWN
    text = f"{100 * value:.1f}"
    text = ">99.9" if text == "100.0" and value < 1 else "<0.1" if text == "0.0" and value > 0 else text
    return text + unit


def span(estimate: Json) -> str:
    """The interval of an estimate: '95.8 to 97.4'."""
    if estimate["low"] is None:
        return ""
    return f"{percent(estimate['low'], '')} to {percent(estimate['high'], '')}"


def stated(estimate: Json) -> str:
    """'96.6 % (95 % interval 95.8 to 97.4)'."""
    return f"{percent(estimate['value'])} (95 % interval {span(estimate)})" if span(estimate) else "not known"


def decimal(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return ">0.999" if value < 1 and f"{value:.3f}" == "1.000" else f"{value:.3f}"


def name(code: str) -> str:
    """'NEUT_SEG' to 'segmented neutrophil'; a characteristic to its words."""
    return load().names.get(code, code.replace("_", " "))


def listed(words: list[str]) -> str:
    """'a, b and c'."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]])) or "none"


def top_confusions(confusion: Json, most: int = 12) -> list[dict[str, Any]]:
    """The most frequent wrong answers: true, predicted, cells, share of the label's cells, tolerated or not."""
    vocabulary = load()
    rows = []
    for true, counts in zip(confusion["true"], confusion["counts"], strict=True):
        children = vocabulary.children(true)
        for predicted, n in zip(confusion["predicted"], counts, strict=True):
            if n and predicted not in children:
                near = all(predicted in vocabulary.types[c].neighbours for c in children)
                rows.append({"true": true, "predicted": predicted, "n": n, "share": n / sum(counts), "near": near})
    return sorted(rows, key=lambda r: (-r["n"], r["true"], r["predicted"]))[:most]


def summary(metrics: Json) -> list[str]:
    """The findings as sentences, the ones that decide first."""
    counts, overall = metrics["counts"], metrics["types"]["overall"]
    sites = metrics["types"]["by_site"]
    by = "by patient" if overall["interval_by"] == "patient" else f"by {overall['interval_by']}"
    said = [
        f"{count(counts['labelled'], 'labelled cell')} of {count(counts['patients'], 'known patient')} from "
        f"{count(len(sites), 'site')} were compared with the experts' labels. Intervals are 95 %, {by}.",
        f"The recogniser gave the expert's type to {stated(overall['accuracy'])} of them; counting a confusion with a "
        f"neighbouring maturation stage as right, to {stated(overall['tolerant_accuracy'])}.",
    ]
    if overall["averaged"]:
        said.append(
            f"Averaged over the {count(len(overall['averaged']), 'class').replace('classs', 'classes')} with at least "
            f"{metrics['not_tested']['least_cells']} cells, each class counting alike: sensitivity "
            f"{stated(overall['balanced_accuracy'])}, F1 {stated(overall['macro_f1'])}."
        )
        rows = overall["per_class"]
        weak = sorted(overall["averaged"], key=lambda c: rows[c]["sensitivity"]["value"])[:3]
        said.append(
            "Lowest sensitivities: "
            + listed([f"{name(c)} {percent(rows[c]['sensitivity']['value'])}" for c in weak])
            + "."
        )
    if len(sites) > 1:
        ordered = sorted(sites, key=lambda s: (sites[s]["accuracy"]["value"], s))
        low, high = ordered[0], ordered[-1]
        said.append(
            f"Among the sites the share of right answers runs from {percent(sites[low]['accuracy']['value'])} "
            f"({low}) to {percent(sites[high]['accuracy']['value'])} ({high})."
        )
    return [
        *said,
        *_blasts(metrics["blast"]),
        _calibration(metrics["calibration"]["overall"]),
        _characteristics(metrics),
    ]


def _blasts(blast: Json) -> list[str]:
    overall, smears = blast["overall"], blast["smears"]
    if not overall["support"]:
        return ["No blast stands among the labelled cells: nothing is known about finding blasts."]
    said = [
        f"Of {count(overall['support'], 'labelled blast')} the recogniser named {stated(overall['sensitivity'])}; of "
        f"the cells that it called blasts {stated(overall['ppv'])} were blasts."
    ]
    found = smears.get("any_blast_found")
    if found and found["smears"]:
        none = smears["no_blast_and_none_predicted"]
        without = f"none on {stated(none)} of the {count(none['smears'], 'smear')} without"
        said.append(
            f"It saw at least one blast on {stated(found)} of the {count(found['smears'], 'smear')} with a labelled "
            f"blast; {without if none['smears'] else 'no smear without one was tested, so nothing is known of false alarms'}."
        )
    return said


def _calibration(calibration: Json) -> str:
    gap = sum(b["cells"] * (b["confidence"] - b["accuracy"]) for b in calibration["bins"]) / calibration["cells"]
    tendency = "too sure of itself" if gap > 0 else "less sure than it could be"
    return (
        "Its stated probability and the share that was right differ by "
        f"{100 * calibration['ece']:.1f} percentage points on average; on the "
        f"whole it is {tendency} (by {100 * abs(gap):.1f} points)."
    )


def _characteristics(metrics: Json) -> str:
    rows = metrics["characteristics"]
    tested = [c for c in rows.values() if c["status"] == "tested"]
    better = sum(c["beats_type_only"] for c in tested)
    return (
        f"Of {len(rows)} morphological characteristics {len(tested)} were tested; {better} of these are recognised "
        "demonstrably better than the cell's type alone would tell."
    )
