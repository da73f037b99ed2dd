"""Analyser exports: a sentinel is missing with its reason, never a number."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from conftest import put

from smearline import cbc, sites
from smearline.errors import ImportSourceError

EXPORT = (
    "Sample No.,Patient ID,Date,Time,WBC(10^9/L),WBC(10^9/L)/M,HGB(g/dL),HGB(g/dL)/M,PLT(10^9/L),PLT(10^9/L)/M,"
    "[NE-SSC(ch)],[NE-SSC(ch)]/M,IP SUS(WBC)Blasts?,Q-Flag(Blasts?),Q-Flag(Left Shift?)\n"
    "S1,P1,2026/01/02,03:04:05,6.1,,13.2,+,----,,151.2,,0,110,20\n"
    "S2,P2,2026/01/02,03:05:05,++++,,ERROR,,210,*,,,1,,\n"
)


@pytest.mark.parametrize(
    ("raw", "mark", "reason"),
    [
        ("6.1", "", None),
        ("6.1", "+", None),
        ("", "", "blank"),
        ("ERROR", "", "analysis_error"),
        ("----", "", "not_determined"),
        ("++++", "", "over_range"),
        ("4.2*", "", "low_reliability"),
        ("@1.0", "", "low_reliability"),
        ("4.2", "*", "low_reliability"),
        ("n/a", "", "text_not_kept"),
    ],
)
def test_why_a_cell_holds_no_number(raw: str, mark: str, reason: str | None):
    assert cbc.reason_missing(raw, mark) == reason


def test_an_export_becomes_a_row_a_value(tmp_path: Path):
    found = cbc.read_export(put(tmp_path / "xn.csv", EXPORT)).set_index(["sample", "parameter"])
    assert found.loc[("S1", "WBC"), "value"] == 6.1
    assert found.loc[("S1", "WBC"), "unit"] == "10^9/L"
    assert found.loc[("S1", "HGB"), "mark"] == "+"
    assert found.loc[("S1", "PLT"), "reason"] == "not_determined"
    assert pd.isna(found.loc[("S2", "PLT"), "value"]), "a value marked unreliable is no value"
    assert found.loc[("S2", "PLT"), "raw"] == "210"
    assert found.loc[("S1", "Q-Flag(Blasts?)"), "value"] == 110
    assert found.loc[("S1", "Q-Flag(Left Shift?)"), "value"] == 20, "flags are not thrown together"
    assert found.loc[("S1", "[NE-SSC]"), "value"] == 151.2, "research parameters keep their brackets"


def test_identifiers_of_an_export_become_pseudonyms(tmp_path: Path, sites_folder: Path):
    put(tmp_path / "xn.csv", EXPORT)
    table = pd.DataFrame(cbc.read_counts(tmp_path / "xn.csv", sites.load("lab"), b"k" * 32))
    assert table["value"].notna().sum() == 7
    assert not set(table["patient"]) & {"P1", "P2"}
    assert table.groupby("patient")["smear"].nunique().eq(1).all()


def test_text_under_any_heading_may_be_a_name_and_is_not_kept(tmp_path: Path):
    export = "Sample No.;Nachname;WBC(10^9/L)\nS1;Mustermann;6.1\n"
    found = cbc.read_export(put(tmp_path / "xn.csv", export.encode("cp1252")))
    assert "Mustermann" not in str(found.to_dict())
    assert found["value"].dropna().tolist() == [6.1]


def test_another_csv_is_refused(tmp_path: Path):
    with pytest.raises(ImportSourceError, match=r"no column 'Sample No\.'"):
        cbc.read_export(put(tmp_path / "xn.csv", "a,b\n1,2\n"))
