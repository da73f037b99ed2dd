"""Analyser exports: a sentinel is missing with its reason, never a number."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import put

from smearline import cbc, pseudonyms, sites
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
        ("*", "", "low_reliability"),
        ("*----", "", "not_determined"),
        ("*Mueller Hans", "", "text_not_kept"),
        ("Mueller Hans", "*", "text_not_kept"),
        ("n/a", "", "text_not_kept"),
        ("nan", "", "text_not_kept"),
        ("1e400", "", "text_not_kept"),
        ("1_0.5", "", "text_not_kept"),
        ("٤", "", "text_not_kept"),
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


def test_counts_are_found_by_sample_number_and_by_pseudonym(tmp_path: Path, sites_folder: Path):
    blinded = pseudonyms.pseudonym(pseudonyms.key(sites.load("lab")), "lab", "smear", "S2")
    summary = pd.DataFrame({"site": ["lab", "lab"], "smear": ["S1", blinded]})
    export = put(tmp_path / "xn.csv", EXPORT + "S3,P3,,,5.0,,,,,,,,,,\n")
    found, of_others = cbc.read_for(export, summary)
    wbc = found[found["parameter"] == "WBC"].set_index("smear")
    assert of_others == 1 and set(wbc.index) == {"S1", blinded}
    assert wbc.loc["S1", "value"] == 6.1 and wbc.loc[blinded, "reason"] == "over_range"
    said, of_others = cbc.read_for(
        put(tmp_path / "c.json", '{"S1": {"WBC": {"value": 4.2, "unit": "10^9/L"}}}'), summary
    )
    assert said[["smear", "value"]].to_numpy().tolist() == [["S1", 4.2]] and of_others == 0
    twice, _ = cbc.read_for(export, pd.concat([summary, summary]))
    assert len(twice) == len(found), "differentials may be of several runs"
    two_sites = pd.concat([summary, summary.assign(site="second")])
    with pytest.raises(
        ImportSourceError, match="smears of lab and of second; diagnose the smears of one site at a time"
    ):
        cbc.read_for(export, two_sites)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("[1]", "no object of smears"),
        ('{"S1": {"WBC": 4.2, "WBC": 5.2}}', "'WBC' stands twice in one object"),
        ('{"S1": {"WBC": 4.2}, "S1": {"WBC": 5.2}}', "'S1' stands twice in one object"),
        (
            '{"S1": {"WBC(10^9/L)": 4.2, "WBC(/uL)": 4300}}',
            "c.json, S1: WBC stands twice with different values or units",
        ),
        ('{"S1": {' + ", ".join(f'"v{i}": 1' for i in range(2001)) + "}}", "c.json, S1 has 2001 headings"),
    ],
)
def test_json_that_could_be_read_in_two_ways_is_refused(tmp_path: Path, sites_folder: Path, said: str, why: str):
    summary = pd.DataFrame({"site": ["lab"], "smear": ["S1"]})
    with pytest.raises(ImportSourceError, match=re.escape(why)):
        cbc.read_for(put(tmp_path / "c.json", said), summary)


def test_identifiers_in_json_are_not_kept(tmp_path: Path, sites_folder: Path):
    counts = {"MRN": "00123456", "Phone": 791234567, "WBC(10^9/L)": 4.2}
    summary = pd.DataFrame({"site": ["lab"], "smear": ["S1"]})
    by_file, _ = cbc.read_for(put(tmp_path / "c.json", json.dumps({"S1": counts})), summary)
    for found in (by_file, cbc.counts_from_json(counts, sites.load("lab"), "S1", None)):
        assert "123456" not in str(found.to_dict()) and "791234567" not in str(found.to_dict())
        reasons = found.set_index("parameter")["reason"].dropna().to_dict()
        assert reasons == {"MRN": "identifier_not_kept", "Phone": "identifier_not_kept"}


def test_text_under_any_heading_may_be_a_name_and_is_not_kept(tmp_path: Path):
    export = "Sample No.;Nachname;Remark;WBC(10^9/L);WBC/M\nS1;Mustermann;*Mustermann;6.1;Mustermann\n"
    found = cbc.read_export(put(tmp_path / "xn.csv", export.encode("cp1252")))
    assert "Mustermann" not in str(found.to_dict())
    assert found["value"].dropna().tolist() == [6.1]


@pytest.mark.parametrize(
    ("text", "iso"),
    [
        ("2024/3/4 8:05", "2024-03-04T08:05:00+00:00"),
        ("2021-05-21 20:42:39 UTC", "2021-05-21T20:42:39+00:00"),
        ("2024-01-31T08:30:07.5+01:00", "2024-01-31T07:30:07.500000+00:00"),
    ],
)
def test_a_date_that_can_be_read_in_one_way_is_read(text: str, iso: str):
    assert cbc.moment(text).isoformat() == iso


@pytest.mark.parametrize("text", ["3/4/2024", "5.1.2024", "31 Jan 2024", "0001-01-01T00:00:00+01:00", ""])
def test_any_other_date_is_refused(text: str):
    with pytest.raises(ValueError, match="is no date like"):
        cbc.moment(text)


def test_another_csv_is_refused(tmp_path: Path):
    with pytest.raises(ImportSourceError, match=r"no column 'Sample No\.'"):
        cbc.read_export(put(tmp_path / "xn.csv", "a,b\n1,2\n"))


@pytest.mark.parametrize(
    ("export", "why"),
    [
        (
            "smear,WBC(10^9/L),HGB(g/dL)\ncs,4,2,11,0\n",
            "line 2, has 5 cells under 3 headings: a number with a decimal comma",
        ),
        ("smear,WBC(10^9/L),WBC(10^9/L)\ncs,400,4\n", "column 'wbc\\(10\\^9/l\\)' twice"),
        ("smear,WBC(10^9/L),WBC(/uL)\ncs,4,400\n", "WBC stands twice with different values"),
        ("smear,WBC(10^9/L)\ncs,400\ncs,4\n", "WBC stands twice"),
        ("smear,sampled_at,WBC\ncs,13.01.2024,4\n", "'13.01.2024' is no date like 2024/01/31"),
        (b"smear,WBC\ncs,4\0.2\n", "NUL"),
        ("smear;PLT(/uL)\ncs;150.000\n", "does not say whether the comma or the point is the decimal mark"),
        ("smear\tPLT(/uL)\ncs\t150,000\n", "does not say whether"),
        ("smear;WBC;HGB\ncs;4,2;11.5\n", "does not say whether"),
        ("smear;WBC;PLT\ncs;4,2;150.000\n", "has a mark for thousands, as in '150.000'"),
        ("smear;WBC;PLT\ncs;4.2;1,234\n", "has a mark for thousands, as in '1,234'"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path: Path, export: str | bytes, why: str):
    with pytest.raises(ImportSourceError, match=why):
        cbc.read_export(put(tmp_path / "xn.csv", export))


@pytest.mark.parametrize(
    ("headings", "why"),
    [
        ([f"v{i}" for i in range(20_000)], "headings; at most 2000 are read: export fewer values"),
        (["a" + " " * 20_000 + "x("], "a heading of 20003 characters, 'a +…'; at most 200: give it a shorter name"),
    ],
)
def test_more_headings_than_an_analyser_writes_are_refused_unread(
    tmp_path: Path, sites_folder: Path, headings: list[str], why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cbc, "_parameter", None)
    with pytest.raises(ImportSourceError, match=why):
        cbc.read_export(put(tmp_path / "xn.csv", "smear," + ",".join(headings) + "\n"))
    with pytest.raises(ImportSourceError, match=why):
        cbc.counts_from_json(dict.fromkeys(headings, 1), sites.load("lab"), None, None)


def test_marks_go_by_name_wherever_they_stand(tmp_path: Path):
    export = "smear,WBC(10^9/L),HGB(g/dL),WBC/M,HGB/M\ncs,400,11,*,\n"
    found = cbc.read_export(put(tmp_path / "xn.csv", export)).set_index("parameter")
    assert found.loc["WBC", "reason"] == "low_reliability" and found.loc["HGB", "value"] == 11


@pytest.mark.parametrize(
    "export",
    [
        "Smear;WBC (10^9/L); HGB(g/dL) \ncs;4,2;11,0\n",
        "smear\tWBC(G/L)\tHGB(g/dL)\ncs\t4,2\t11,0\n".encode("utf-16"),
        'smear,WBC(G/L),HGB(g/dL)\ncs,"4,2",11\n',
        "sep=;\nsmear;WBC(G/L);HGB(g/dL)\ncs;4.2;11\n".encode("utf-16"),
        "\ufeffsmear\tWBC(x10^3/µL)\tHGB(g/dL)\ncs\t4.2\t11\n",
    ],
)
def test_exports_as_other_countries_write_them(tmp_path: Path, export: str | bytes):
    counts = cbc.read_export(put(tmp_path / "xn.csv", export)).assign(site="lab", smear="cs")
    assert cbc.laboratory_values(counts).loc[("lab", "cs"), ["WBC", "HGB"]].tolist() == [4.2, 11]


def test_an_impossible_value_and_an_identifier_are_no_values(tmp_path: Path):
    export = "smear,WBC(10^9/L),NEUT%(%),MRN,Phone\ncs,-5,119,00123456,0791234567\n"
    found = cbc.read_export(put(tmp_path / "xn.csv", export)).assign(site="lab", smear="cs")
    assert "00123456" not in str(found.to_dict()) and "0791234567" not in str(found.to_dict())
    assert cbc.laboratory_values(found).dropna(axis=1).empty
    assert cbc.unused(found) == {
        "WBC": "impossible",
        "NEUT%": "impossible",
        "MRN": "identifier_not_kept",
        "Phone": "identifier_not_kept",
    }


def test_an_export_without_a_row_holds_nothing(tmp_path: Path):
    assert cbc.read_export(put(tmp_path / "xn.csv", "smear,WBC(10^9/L)\n")).empty


@pytest.mark.mission("no earlier value stands for one that the analyser did not trust")
def test_of_several_measurements_the_last_counts_though_it_is_unreliable(tmp_path: Path):
    export = (
        "smear,sampled_at,WBC(10^9/L),PLT(10^9/L),PLT/M,HGB(g/dL)\ncs,2026-01-02,80,12,*,\ncs,2026-01-01,5,250,,11\n"
    )
    found = cbc.read_export(put(tmp_path / "xn.csv", export))
    counts = found.rename(columns={"sample": "smear"}).assign(site="lab")
    values = cbc.laboratory_values(counts).loc[("lab", "cs")]
    assert values["WBC"] == 80 and pd.isna(values["PLT"]) and values["HGB"] == 11, "a blank was not measured again"
    assert cbc.unused(counts) == {"PLT": "low_reliability"}


def test_another_patients_count_is_not_the_smears():
    summary = pd.DataFrame({"site": "lab", "smear": ["1", "2", "3"], "patient": ["a", "b", None]})
    rows = [("1", "a"), ("1", "z"), ("2", None), ("3", "z"), ("4", "z"), (None, "a")]
    counts = pd.DataFrame([{"site": "lab", "smear": smear, "patient": patient} for smear, patient in rows])
    assert cbc.of_their_patients(counts, summary).index.tolist() == [0, 2, 3, 4, 5]
