"""Blood counts: analyser exports read into one long table, sentinels kept as missing with their reason."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from smearline import pseudonyms
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
# Sysmex XN export: columns that describe the sample, not the blood. Names verbatim (docs/data.md, 'Blood counts').
HEADER = [
    "Nickname",
    "Analyzer ID",
    "Date",
    "Time",
    "Rack",
    "Position",
    "Sample No.",
    "Sample Inf.",
    "Order Type",
    "Reception Date",
    "Measurement Mode",
    "Patient ID",
    "Analysis Info.",
    "Error(Func.)",
    "Error(Result)",
    "Order Info.",
    "WBC Info.",
    "PLT Info.",
    "Rule Result",
    "Validate",
    "Validator",
    "Action Message (Check)",
    "Action Message (Review)",
    "Action Message (Retest)",
    "Sample Comment",
    "Patient Name",
    "Birth",
    "Sex",
    "Patient Comment",
    "Ward Name",
    "Doctor Name",
    "Output",
    "Sequence No.",
    "Discrete",
    "Judgment",
    "Positive(Diff.)",
    "Positive(Morph.)",
    "Positive(Count)",
]
_HEADER = {name.casefold() for name in HEADER}
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


def read_sysmex_xn(path: Path) -> pd.DataFrame:
    """A row a value: sample, patient, sampled_at, parameter, unit, value, raw, mark, reason. Identifiers are raw.

    Raises:
        ImportSourceError: the file is no such export.
    """
    try:
        text = path.read_bytes()
        decoded = text.decode("utf-8-sig") if _is_utf8(text) else text.decode("cp1252")
        head = decoded.split("\n", 1)[0]
        separator = max(",;\t", key=head.count)
        frame = pd.read_csv(io.StringIO(decoded), sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise ImportSourceError(f"{path.name} cannot be read as an analyser's export: {error}") from error
    if "Sample No." not in frame.columns:
        raise ImportSourceError(f"{path.name} has no column 'Sample No.', so it is no Sysmex XN export")
    rows: list[dict[str, Any]] = []
    for record in frame.to_dict("records"):
        names = list(record)
        sampled = pd.to_datetime(
            f"{record.get('Date', '')} {record.get('Time', '')}".strip(), utc=True, errors="coerce"
        )
        for position, column in enumerate(names):
            if column.strip().casefold() in _HEADER or column.endswith("/M") or column.startswith("Judgment"):
                continue
            following = names[position + 1] if position + 1 < len(names) else ""
            mark = record[following].strip() if following.endswith("/M") else ""
            parameter, unit = _parameter(column)
            raw = record[column].strip()
            reason = reason_missing(raw, mark)
            rows.append(
                dict(
                    sample=record["Sample No."].strip(),
                    patient=record.get("Patient ID", "").strip(),
                    sampled_at=None if pd.isna(sampled) else sampled.to_pydatetime(),
                    parameter=parameter,
                    unit=unit,
                    value=None if reason else float(raw),
                    # Text that is neither a number nor a sentinel may be a name, under whatever heading: not kept.
                    raw=None if reason == "text_not_kept" else raw,
                    mark=mark,
                    reason=reason,
                )
            )
    return pd.DataFrame(rows)


KEY = ["site", "smear", "sampled_at", "parameter"]
"""Of a value: what says it again adds nothing."""


def read_counts(path: Path, site: Site, key: bytes) -> list[dict[str, Any]]:
    """An export as rows of COUNTS, identifiers as pseudonyms. Raises ImportSourceError as `read_sysmex_xn`."""
    found = read_sysmex_xn(path)
    table = found.assign(
        site=site.name,
        origin=site.origin,
        patient=_pseudonyms(found["patient"], site, "patient", key),
        smear=_pseudonyms(found["sample"], site, "smear", key),
    )[COUNTS.names].astype(object)
    return [dict(row) for row in table.where(table.notna(), None).to_dict("records")]


def _pseudonyms(values: Iterable[str], site: Site, kind: str, key: bytes) -> list[str | None]:
    return [pseudonyms.pseudonym(key, site.name, kind, v) if v else None for v in values]
