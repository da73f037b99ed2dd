"""Blood counts: analyser exports read into one long table, sentinels kept as missing with their reason."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from smearline import pseudonyms, sites
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
_LOW_RELIABILITY = ("*", "@")


def reason_missing(raw: str, mark: str = "") -> str | None:
    """Why a cell of an export holds no usable number; None where it does.

    Sentinels of Sysmex XN: 'ERROR' analysis error, '----' not determined, '++++' over range, '*' and '@' low
    reliability or out of linearity.
    """
    raw = raw.strip()
    if not raw:
        return "blank"
    if raw.upper() == "ERROR":
        return "analysis_error"
    if set(raw) == {"-"}:
        return "not_determined"
    if set(raw) == {"+"}:
        return "over_range"
    if raw[-1] in _LOW_RELIABILITY or raw[0] in _LOW_RELIABILITY or any(m in mark for m in _LOW_RELIABILITY):
        return "low_reliability"
    try:
        float(raw)
    except ValueError:
        return "text_not_kept"
    return None


def _parameter(column: str) -> tuple[str, str]:
    """(name, unit) of a column: '[NE-SSC(ch)]' is ('[NE-SSC]', 'ch'). Flags, 'Q-Flag(Blasts?)' and 'IP SUS(WBC)Blasts?',
    carry no unit: their brackets are part of the name."""
    match = None if column.startswith(("Q-Flag", "IP ")) else _NAME.match(column)
    if match is None:
        return column, ""
    return (f"[{match['name']}]" if match["open"] else match["name"]), match["unit"] or ""


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True


_SAMPLE, _PATIENT, _SAMPLED = ("Sample No.", "smear", "sample"), ("Patient ID", "patient"), "sampled_at"


def read_export(source: Path | bytes, name: str = "the blood counts") -> pd.DataFrame:
    """A Sysmex XN export, or a plain CSV with a column 'smear' (or 'sample'), optionally 'patient' and 'sampled_at', and one
    column a value, its unit in brackets: HGB(g/dL).

    Returns:
        A row a value: sample, patient, sampled_at, parameter, unit, value, raw, mark, reason. Identifiers are raw.

    Raises:
        ImportSourceError: the file is neither.
    """
    try:
        text, name = (source.read_bytes(), source.name) if isinstance(source, Path) else (source, name)
        decoded = text.decode("utf-8-sig") if _is_utf8(text) else text.decode("cp1252")
        head = decoded.split("\n", 1)[0]
        separator = max(",;\t", key=head.count)
        frame = pd.read_csv(io.StringIO(decoded), sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise ImportSourceError(f"{name} cannot be read as an analyser's export: {error}") from error
    sample = next((c for c in _SAMPLE if c in frame.columns), None)
    if sample is None:
        raise ImportSourceError(
            f"{name} has no column 'Sample No.', so it is no Sysmex XN export, and no column 'smear' or 'sample' either"
        )
    patient = next((c for c in _PATIENT if c in frame.columns), "")
    described = {c.casefold() for c in (*sample_columns(), sample, patient, _SAMPLED)}
    rows: list[dict[str, Any]] = []
    for record in frame.to_dict("records"):
        names = list(record)
        moment = record.get(_SAMPLED) or f"{record.get('Date', '')} {record.get('Time', '')}"
        sampled = pd.to_datetime(moment.strip(), utc=True, errors="coerce")
        for position, column in enumerate(names):
            if column.strip().casefold() in described or column.endswith("/M") or column.startswith("Judgment"):
                continue
            following = names[position + 1] if position + 1 < len(names) else ""
            mark = record[following].strip() if following.endswith("/M") else ""
            parameter, unit = _parameter(column)
            rows.append(
                dict(
                    sample=record[sample].strip(),
                    patient=record.get(patient, "").strip(),
                    sampled_at=None if pd.isna(sampled) else sampled.to_pydatetime(),
                    **_value(parameter, unit, record[column], mark),
                )
            )
    return pd.DataFrame(rows)


def _value(parameter: str, unit: str, raw: str, mark: str) -> dict[str, Any]:
    raw = raw.strip()
    reason = reason_missing(raw, mark)
    # Text that is neither a number nor a sentinel may be a name, under whatever heading: not kept.
    kept = None if reason == "text_not_kept" else raw
    value = None if reason else float(raw)
    return dict(parameter=parameter, unit=unit, value=value, raw=kept, mark=mark, reason=reason)


def counts_from_json(given: Mapping[str, Any], site: Site, smear: str | None, patient: str | None) -> pd.DataFrame:
    """Rows of COUNTS for one smear: {"WBC": 4.2, "HGB(g/dL)": 9.1, "PLT": {"value": "----", "unit": "10^9/L"}}.

    Args:
        smear, patient: pseudonyms.

    Raises:
        ImportSourceError: a value is neither a number, a text, nor an object with 'value' and 'unit'.
    """
    table = pd.DataFrame([_json_value(name, entry) for name, entry in given.items()], columns=_VALUE)
    return table.assign(site=site.name, patient=patient, smear=smear, sampled_at=None, origin=site.origin)[COUNTS.names]


_VALUE = ["parameter", "unit", "value", "raw", "mark", "reason"]


def _json_value(name: str, entry: Any) -> dict[str, Any]:
    parameter, unit = _parameter(str(name))
    if isinstance(entry, Mapping):
        if unknown := set(entry) - {"value", "unit"}:
            raise ImportSourceError(f"blood count {parameter}: unknown {sorted(unknown)}; give 'value' and 'unit'")
        unit, entry = str(entry.get("unit") or unit), entry.get("value")
    if entry is not None and (isinstance(entry, bool) or not isinstance(entry, int | float | str)):
        raise ImportSourceError(f"blood count {parameter}: {entry!r} is neither a number nor a text")
    return _value(parameter, unit, "" if entry is None else str(entry), "")


def read_for(path: Path, summary: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Blood counts for the smears of `summary` (columns site and smear), and the number of samples that are of none of them.

    The file is a Sysmex XN export, a plain CSV, JSON ({smear: {name: value}}) or Parquet of COUNTS. A sample is sought by its
    number as it stands, and by its pseudonym at each site.

    Raises:
        ImportSourceError: the file is none of these.
    """
    wanted = set(zip(summary["site"], summary["smear"], strict=True))
    if path.suffix == ".parquet":
        counts = pq.read_table(path, schema=COUNTS).to_pandas()
        keys = counts[["site", "smear"]].drop_duplicates()
        return counts, sum(key not in wanted for key in keys.itertuples(index=False, name=None))
    if path.suffix == ".json":
        given = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(given, dict) or not all(isinstance(v, dict) for v in given.values()):
            raise ImportSourceError(f"{path.name} is no object of smears, each an object of values")
        rows = [dict(_json_value(n, v), sample=s) for s, values in given.items() for n, v in values.items()]
        found = pd.DataFrame(rows, columns=["sample", *_VALUE]).assign(patient=None, sampled_at=None)
    else:
        found = read_export(path)
    places: dict[str, tuple[str, str]] = {}
    for site in (sites.load(name) for name in sorted({site for site, _ in wanted})):
        key = pseudonyms.key(site)
        for sample in found["sample"].unique():
            for smear in (sample, pseudonyms.pseudonym(key, site.name, "smear", sample)):
                if (site.name, smear) in wanted:
                    places[sample] = (site.name, smear)
    part = found[found["sample"].isin(list(places))]
    part = part.assign(
        site=[places[s][0] for s in part["sample"]],
        smear=[places[s][1] for s in part["sample"]],
        patient=None,
        origin=None,
    )
    return part[COUNTS.names].reset_index(drop=True), found["sample"].nunique() - len(places)


KEY = ["site", "smear", "sampled_at", "parameter"]
"""Of a value: what says it again adds nothing."""


def read_counts(source: Path | bytes, site: Site, key: bytes) -> list[dict[str, Any]]:
    """An export as rows of COUNTS, identifiers as pseudonyms. Raises ImportSourceError as `read_export`."""
    found = read_export(source)
    table = found.assign(
        site=site.name,
        origin=site.origin,
        patient=_pseudonyms(found["patient"], site, "patient", key),
        smear=_pseudonyms(found["sample"], site, "smear", key),
    )[COUNTS.names].astype(object)
    return [dict(row) for row in table.where(table.notna(), None).to_dict("records")]


@dataclass(frozen=True)
class Analyte:
    """A laboratory value that a diagnostic model may read (vocabulary/laboratory.yaml)."""

    name: str
    unit: str
    accepts: Mapping[str, float]
    scale: str = "linear"


@cache
def _tables() -> Mapping[str, Any]:
    text = files("smearline.vocabulary").joinpath("laboratory.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


@cache
def analytes() -> Mapping[str, Analyte]:
    """The analyser's name without unit to what is known of the value."""
    return {name: Analyte(**row) for name, row in _tables()["analytes"].items()}


def sample_columns() -> list[str]:
    """The columns of a Sysmex XN export that describe the sample, not the blood."""
    return list(_tables()["sample_columns"])


def laboratory_values(counts: pd.DataFrame) -> pd.DataFrame:
    """Rows of COUNTS to a row a smear (index site, smear) and a column an analyte, in the analytes' own units.

    Values without a number, and those whose unit is not accepted (or not stated, where more than one unit exists), are
    missing; other parameters are left aside. Of several samples of a smear the last one counts.
    """
    known = analytes()
    part = counts[counts["parameter"].isin(list(known)) & counts["smear"].notna()].copy()
    part["factor"] = [_factor(known[p], u) for p, u in zip(part["parameter"], part["unit"], strict=True)]
    part["value"] = part["value"].astype(float) * part["factor"].astype(float)
    part = part.sort_values("sampled_at", kind="stable", na_position="first")
    wide = part.dropna(subset=["value"]).pivot_table(
        index=["site", "smear"], columns="parameter", values="value", aggfunc="last"
    )
    return wide.reindex(columns=list(known)).rename_axis(columns=None)


def _factor(analyte: Analyte, unit: str | None) -> float | None:
    if not unit:
        return 1.0 if len(analyte.accepts) == 1 else None
    return analyte.accepts.get(unit)


def unused(counts: pd.DataFrame) -> dict[str, str]:
    """Parameter to why a value given for it is not read: its reason code, 'unit_not_accepted', or 'not_read_by_models'."""
    known = analytes()
    found = {}
    for row in counts.itertuples():
        analyte = known.get(row.parameter)
        if pd.notna(row.reason):
            found[row.parameter] = row.reason
        elif analyte is None:
            found[row.parameter] = "not_read_by_models"
        elif _factor(analyte, row.unit) is None:
            found[row.parameter] = "unit_not_accepted" if row.unit else "unit_not_stated"
    return found


def _pseudonyms(values: Iterable[str], site: Site, kind: str, key: bytes) -> list[str | None]:
    return [pseudonyms.pseudonym(key, site.name, kind, v) if v else None for v in values]
