"""Blood counts: analyser exports read into one long table, sentinels kept as missing with their reason."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from smearline import plain_json, pseudonyms, sites, vocabulary
from smearline.errors import ImportSourceError
from smearline.sites import Site

COUNTS = pa.schema(
    [
        ("site", pa.string()),
        ("patient", pa.string()),
        ("smear", pa.string()),
        ("sampled_at", pa.timestamp("us", tz="UTC")),
        ("parameter", pa.string()),  # the analyser's name without unit: WBC, NEUT%, [NE-SSC]
        ("unit", pa.string()),
        ("value", pa.float64()),  # null: see reason
        ("raw", pa.string()),
        ("mark", pa.string()),  # of the parameter's /M column: + - * @
        ("reason", pa.string()),  # why there is no value
        ("origin", pa.string()),
    ]
)
_NAME = re.compile(r"^(?P<open>\[?)(?P<name>.+?)(?:\((?P<unit>[^()]*)\))?\]?$")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_MARKED = re.compile(r"[+-]?([0-9]+[.,][0-9]+|[1-9][0-9]{0,2}([.,][0-9]{3})+([.,][0-9]+)?)")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}([.,][0-9]{3})+")
_IDENTIFIES = re.compile(
    r"\b(mrn|id|phone|tel|mobile|birth|born|dob|age|name|address|street|zip|city|mail|ssn|insur\w*|ward|doctor)\b", re.I
)
"""Headings of a column that may say who the patient is: its numbers are not kept either."""
_LOW_RELIABILITY = "*@"
_FLAGS = ("Q-Flag", "IP ")
MAX_HEADINGS, MAX_HEADING = 2000, 200
"""An analyser's export has some hundreds of columns; the time that headings take is everybody's."""


def reason_missing(raw: str, mark: str = "") -> str | None:
    """Why a cell of an export holds no usable number; None where it does.

    Sentinels of Sysmex XN: 'ERROR' analysis error, '----' not determined, '++++' over range, '*' and '@' low
    reliability or out of linearity.
    """
    raw = raw.strip()
    plain = raw.strip(_LOW_RELIABILITY + " ")
    if not plain:
        return "low_reliability" if raw else "blank"
    if plain.upper() == "ERROR":
        return "analysis_error"
    if set(plain) == {"-"}:
        return "not_determined"
    if set(plain) == {"+"}:
        return "over_range"
    if not _NUMBER.fullmatch(plain) or not math.isfinite(float(plain)):
        return "text_not_kept"
    return "low_reliability" if plain != raw or set(mark) & set(_LOW_RELIABILITY) else None


def _parameter(column: str) -> tuple[str, str]:
    """(name, unit) of a column: '[NE-SSC(ch)]' is ('[NE-SSC]', 'ch'). Flags, 'Q-Flag(Blasts?)' and 'IP SUS(WBC)Blasts?',
    carry no unit: their brackets are part of the name."""
    match = None if column.startswith(_FLAGS) else _NAME.match(column)
    if match is None:
        return column, ""
    name = match["name"].rstrip()
    return (f"[{name}]" if match["open"] else name), match["unit"] or ""


def _identifies(title: str) -> bool:
    return bool(_IDENTIFIES.search(title)) and not title.startswith(_FLAGS)


_VALUE = ["parameter", "unit", "value", "raw", "mark", "reason"]
_SAMPLE, _PATIENT, _SAMPLED = ("sample no.", "smear", "sample"), ("patient id", "patient"), "sampled_at"


def read_export(source: Path | bytes) -> pd.DataFrame:
    """A Sysmex XN export, or a plain CSV with a column 'smear' (or 'sample'), optionally 'patient' and 'sampled_at', and one
    column a value, its unit in brackets: HGB(g/dL).

    Separated by comma, semicolon or tab, with decimal points or commas; UTF-8, UTF-16 or Windows-1252. Times are ISO 8601, or date
    and time as the XN writes them (2024/01/31); one without an offset is taken for UTC.

    Returns:
        A row a value: sample, patient, sampled_at, parameter, unit, value, raw, mark, reason. Identifiers are raw.

    Raises:
        ImportSourceError: the file is neither, its headings are too many or too long, a row is longer than the head, a date is
            neither, a sample says two things of one value, or nothing says which is the decimal mark.
    """
    name, data = (source.name, source.read_bytes()) if isinstance(source, Path) else ("the blood counts", source)
    head, lines, separator = _table(data, name)
    places = {title.casefold(): i for i, title in enumerate(head)}
    sample = next((c for c in _SAMPLE if c in places), None)
    if sample is None:
        raise ImportSourceError(
            f"{name} has no column 'Sample No.', so it is no Sysmex XN export, and no column 'smear' or 'sample' either"
        )
    patient = next((c for c in _PATIENT if c in places), "")
    described = {c.casefold() for c in (*sample_columns(), sample, patient, _SAMPLED)}
    marks = {_parameter(title[:-2])[0]: i for i, title in enumerate(head) if title.endswith("/M")}
    values = [
        (i, *_parameter(title), _identifies(title))
        for i, title in enumerate(head)
        if title.casefold() not in described and not title.endswith("/M") and not title.startswith("Judgment")
    ]
    comma = _decimal_comma([cells[i] for _, cells in lines for i, *_ in values], separator, name)
    rows: list[dict[str, Any]] = []
    for number, cells in lines:
        of = {title: cells[i] for title, i in places.items()}
        taken = of.get(_SAMPLED) or f"{of.get('date', '')} {of.get('time', '')}"
        try:
            when = moment(taken) if taken.strip() else None
        except ValueError as error:
            raise ImportSourceError(f"{name}, line {number}: {error}") from None
        whose = {"sample": of[sample], "patient": of.get(patient, ""), "sampled_at": when}
        for i, parameter, unit, identifies in values:
            raw = cells[i].replace(",", ".") if comma else cells[i]
            mark = cells[marks[parameter]] if parameter in marks else ""
            rows.append(whose | _value(parameter, unit, raw, mark, identifies))
    found = pd.DataFrame(rows, columns=["sample", "patient", "sampled_at", *_VALUE])
    refuse_contradictions(found, ["sample", "sampled_at", "parameter"], name)
    return found


def _table(data: bytes, name: str) -> tuple[list[str], list[tuple[int, list[str]]], str]:
    """(head, (line number, cells) of each row that is not blank, separator) of a separated file."""
    for coding in ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "cp1252"]:
        try:
            text = data.decode(coding)
            break
        except UnicodeDecodeError:
            pass
    else:
        raise ImportSourceError(f"{name} is no text in UTF-8, UTF-16 or Windows-1252")
    first, _, rest = text.partition("\n")
    separator = max(",;\t", key=first.count)
    if first.strip().casefold().startswith("sep="):
        separator, text = first.strip()[4:5] or ",", rest
    try:
        table = [
            [c.strip() for c in cells] for cells in csv.reader(io.StringIO(text), delimiter=separator, strict=True)
        ]
    except csv.Error as error:
        raise ImportSourceError(f"{name} cannot be read as an analyser's export: {error}") from error
    head, rows = table[0] if table else [], []
    _refuse_oversized(head, name)
    named = Counter(title.casefold() for title in head if title)
    if twice := min((title for title, times in named.items() if times > 1), default=None):
        raise ImportSourceError(f"{name} has the column '{twice}' twice; keep the right one")
    for number, cells in enumerate(table[1:], 2):
        if any("\0" in cell for cell in cells):
            raise ImportSourceError(f"{name}, line {number}, holds NUL bytes; export it again")
        if len(cells) > len(head) and any(cells[len(head) :]):
            raise ImportSourceError(
                f"{name}, line {number}, has {len(cells)} cells under {len(head)} headings: a number with a decimal comma, "
                "perhaps; export with another separator, or with decimal points"
            )
        if any(cells):
            rows.append((number, [*cells, *[""] * len(head)][: len(head)]))
    return head, rows, separator


def _refuse_oversized(headings: Collection[str], name: str) -> None:
    """Raises ImportSourceError for more or longer headings than any analyser writes."""
    if len(headings) > MAX_HEADINGS:
        raise ImportSourceError(
            f"{name} has {len(headings)} headings; at most {MAX_HEADINGS} are read: export fewer values"
        )
    if len(longest := max(headings, key=len, default="")) > MAX_HEADING:
        raise ImportSourceError(
            f"{name} has a heading of {len(longest)} characters, '{longest[:20]}…'; at most {MAX_HEADING}: give it a shorter name"
        )


def _decimal_comma(cells: Iterable[str], separator: str, name: str) -> bool:
    """Whether the numbers of a file have decimal commas, as far as it shows: '150.000' may be 150 or 150,000.

    Raises:
        ImportSourceError: the file writes numbers in both ways, or nothing in it says which it is.
    """
    marked = [c for c in cells if _MARKED.fullmatch(c)]
    either = {c for c in marked if _THOUSANDS.fullmatch(c)}  # three digits behind each mark
    shown = {re.sub(r"[0-9+-]", "", c)[-1] for c in marked if c not in either}
    if separator == "," and not any("," in c for c in marked):
        return False
    if len(shown) > 1 or (either and not shown):
        which = min(either, default="") or marked[0]
        raise ImportSourceError(
            f"{name} does not say whether the comma or the point is the decimal mark (such as in '{which}'): export it with one of "
            "them, and without a mark for thousands"
        )
    decimal = next(iter(shown), ".")
    if wrong := [c for c in marked if re.sub(r"[0-9+-]", "", c) != decimal]:
        raise ImportSourceError(f"{name} has a mark for thousands, as in '{wrong[0]}': export it without")
    return decimal == ","


def moment(text: str) -> datetime:
    """A point in time; without an offset it is UTC.

    Raises ValueError: of '03/04/2024' nobody knows which is the month, so the year must stand first, and months be numbers.
    """
    plain = text.strip().replace("/", "-").removesuffix("UTC").rstrip()
    plain = re.sub(r"(?<![\d.])(\d)(?!\d)", r"0\1", plain)  # as spreadsheets write: 2024/3/4 8:05
    try:
        found = datetime.fromisoformat(plain)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"'{text}' is no date like 2024/01/31 or 2024-01-31T08:30:00+01:00") from None


def refuse_contradictions(found: pd.DataFrame, key: list[str], name: str) -> None:
    """Raises ImportSourceError where two rows say different things of one value."""
    distinct = found[[*key, "unit", "raw", "mark", "reason"]].drop_duplicates()
    if (again := distinct.duplicated(key)).any():
        row = distinct[again].iloc[0]
        raise ImportSourceError(
            f"{name}: {row['parameter']} stands twice with different values or units, at the same time or at none; keep the right "
            "one, or say when each was sampled"
        )


def _value(parameter: str, unit: str, raw: str, mark: str, identifies: bool) -> dict[str, Any]:
    raw = raw.strip()
    reason = "identifier_not_kept" if identifies else reason_missing(raw, mark)
    # Text that is neither a number nor a sentinel, nor a mark, may be a name, under whatever heading: not kept.
    kept = None if reason in ("text_not_kept", "identifier_not_kept") else raw
    value = None if reason else float(raw)
    mark = mark if set(mark) <= set("+-*@") else ""
    return dict(parameter=parameter, unit=unit, value=value, raw=kept, mark=mark, reason=reason)


def counts_from_json(given: Mapping[str, Any], site: Site, smear: str | None, patient: str | None) -> pd.DataFrame:
    """Rows of COUNTS for one smear: {"WBC": 4.2, "HGB(g/dL)": 9.1, "PLT": {"value": "----", "unit": "10^9/L"}}.

    Args:
        smear, patient: pseudonyms.

    Raises:
        ImportSourceError: a value is neither a number, a text, nor an object with 'value' and 'unit'; names too many
            or too long.
    """
    table = _json_values(given, "the blood count")
    return table.assign(site=site.name, patient=patient, smear=smear, sampled_at=None, origin=site.origin)[COUNTS.names]


def _json_values(given: Mapping[str, Any], name: str) -> pd.DataFrame:
    _refuse_oversized(given, name)
    table = pd.DataFrame([_json_value(title, entry) for title, entry in given.items()], columns=_VALUE)
    refuse_contradictions(table, ["parameter"], name)
    return table


def _json_value(title: str, entry: Any) -> dict[str, Any]:
    parameter, unit = _parameter(title)
    if isinstance(entry, Mapping):
        if unknown := set(entry) - {"value", "unit"}:
            raise ImportSourceError(f"blood count {parameter}: unknown {sorted(unknown)}; give 'value' and 'unit'")
        unit, entry = str(entry.get("unit") or unit), entry.get("value")
    if entry is not None and (isinstance(entry, bool) or not isinstance(entry, int | float | str)):
        raise ImportSourceError(f"blood count {parameter}: {entry!r} is neither a number nor a text")
    return _value(parameter, unit, "" if entry is None else str(entry), "", _identifies(title))


def read_for(path: Path, summary: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Blood counts for the smears of `summary` (columns site and smear), and the number of samples that are of none of them.

    The file is a Sysmex XN export, a plain CSV or JSON ({smear: {name: value}}). A sample is sought by its number as it stands, and
    by its pseudonym at each site.

    Raises:
        ImportSourceError: the file is none of these, or a sample may be of two smears.
    """
    if path.suffix == ".json":
        try:
            given = plain_json.strict(path.read_bytes())
        except ValueError as error:
            raise ImportSourceError(f"{path.name} cannot be read as JSON: {error}") from error
        if not isinstance(given, dict) or not all(isinstance(v, dict) for v in given.values()):
            raise ImportSourceError(f"{path.name} is no object of smears, each an object of values")
        tables = [_json_values(of, f"{path.name}, {s}").assign(sample=s) for s, of in given.items()]
        found = pd.concat([pd.DataFrame(columns=["sample", *_VALUE]), *tables]).assign(sampled_at=None)
    else:
        found = read_export(path)
    names: list[tuple[str, str, str]] = []
    for site in map(sites.load, sorted(set(summary["site"]))):
        key = pseudonyms.key(site)
        for sample in found["sample"].unique():
            names += [(sample, site.name, s) for s in (sample, pseudonyms.pseudonym(key, site.name, "smear", sample))]
    keys = pd.DataFrame(names, columns=["sample", "site", "smear"]).merge(summary[["site", "smear"]].drop_duplicates())
    if (twice := keys["sample"].duplicated(keep=False)).any():
        raise ImportSourceError(
            f"{path.name}: a sample number is that of smears of {' and of '.join(sorted(set(keys['site'][twice])))}; diagnose the "
            "smears of one site at a time"
        )
    part = found.merge(keys, on="sample").assign(patient=None, origin=None)
    return part[COUNTS.names], found["sample"].nunique() - len(keys)


KEY = ["site", "smear", "sampled_at", "parameter"]
"""Of a value: what says it again adds nothing."""


def read_counts(source: Path | bytes, site: Site, key: bytes) -> list[dict[str, Any]]:
    """An export as rows of COUNTS, identifiers as pseudonyms. Raises ImportSourceError as `read_export`."""

    def blind(kind: str, values: Iterable[str]) -> list[str | None]:
        return [pseudonyms.pseudonym(key, site.name, kind, v) if v else None for v in values]

    found = read_export(source)
    found = found.assign(patient=blind("patient", found["patient"]), smear=blind("smear", found["sample"]))
    table = found.assign(site=site.name, origin=site.origin)[COUNTS.names].astype(object)
    return [dict(row) for row in table.where(table.notna(), None).to_dict("records")]


@dataclass(frozen=True)
class Analyte:
    """A laboratory value that a diagnostic model may read (vocabulary/laboratory.yaml)."""

    name: str
    unit: str
    accepts: Mapping[str, float]
    scale: str = "linear"


@cache
def analytes() -> Mapping[str, Analyte]:
    """The analyser's name without unit to what is known of the value."""
    return {name: Analyte(**row) for name, row in vocabulary.read("laboratory")["analytes"].items()}


def sample_columns() -> list[str]:
    """The columns of a Sysmex XN export that describe the sample, not the blood."""
    return list(vocabulary.read("laboratory")["sample_columns"])


def latest(counts: pd.DataFrame) -> pd.DataFrame:
    """Of each smear's parameter the last row that is not blank: where that one is unreliable, no earlier value stands for it."""
    measured = counts.assign(measured=counts["reason"].ne("blank"))
    ordered = measured.sort_values(["measured", "sampled_at"], kind="stable", na_position="first")
    return ordered.drop_duplicates(["site", "smear", "parameter"], keep="last").drop(columns="measured")


def laboratory_values(counts: pd.DataFrame) -> pd.DataFrame:
    """Rows of COUNTS to a row a smear (index site, smear) and a column an analyte, in the analytes' own units.

    Values without a number, and those whose unit is not accepted (or not stated, where more than one unit exists), are
    missing; other parameters are left aside. Of several measurements the last one counts (`latest`).
    """
    counts = latest(counts).astype({"value": float})
    part = counts.assign(value=[_read(row)[0] for row in counts.itertuples()]).astype({"value": float})
    part = part.dropna(subset=["smear", "value"])
    wide = part.pivot_table(index=["site", "smear"], columns="parameter", values="value", aggfunc="last")
    return wide.reindex(columns=list(analytes())).rename_axis(columns=None)


def _factor(analyte: Analyte, unit: str | None) -> float | None:
    if not unit:
        return 1.0 if len(set(analyte.accepts.values())) == 1 else None
    plain = unit.replace("µ", "u").replace("μ", "u").replace(" ", "").removeprefix("x").removeprefix("×")
    return next(
        (factor for accepted, factor in analyte.accepts.items() if accepted.casefold() == plain.casefold()), None
    )


def of_their_patients(counts: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """Rows of COUNTS without those that name another patient than `summary` (site, smear, patient) does of their smear: a
    laboratory may use a number again."""
    whose = summary[["site", "smear", "patient"]].drop_duplicates(["site", "smear"]).astype(object)
    of_smear = counts[["site", "smear"]].astype(object).merge(whose, on=["site", "smear"], how="left")["patient"]
    named = counts["patient"].notna().to_numpy() & of_smear.notna().to_numpy()
    return counts[~(named & (counts["patient"].to_numpy(object) != of_smear.to_numpy(object)))]


def unused(counts: pd.DataFrame) -> dict[str, str]:
    """Parameter to why a value given for it is not read: its reason code, 'unit_not_accepted', 'unit_not_stated', 'impossible' or
    'not_read_by_models'."""
    given = latest(counts).itertuples()
    reasons = ((row.parameter, row.reason if pd.notna(row.reason) else _read(row)[1]) for row in given)
    return {parameter: reason for parameter, reason in reasons if reason}


def _read(row: Any) -> tuple[float | None, str | None]:
    """The value of a row of COUNTS in its analyte's unit, or why there is none."""
    analyte = analytes().get(row.parameter)
    if analyte is None:
        return None, "not_read_by_models"
    if (factor := _factor(analyte, row.unit)) is None:
        return None, "unit_not_accepted" if row.unit else "unit_not_stated"
    value = row.value * factor
    # No analyte is negative, and no share is above the whole.
    possible = value >= 0 and (analyte.unit != "%" or value <= 100)
    return (value, None) if possible else (None, "impossible")
