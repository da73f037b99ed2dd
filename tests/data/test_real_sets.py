"""The real sets, as their owners lay them out: the numbers of an import."""

from pathlib import Path

import pytest

from smearline import dataset, importing, sites, sources, splits

pytestmark = pytest.mark.mission("real images in their owners' layouts are imported and split by patient")
EXPECTED = {
    # source: (site, found, imported, quarantined)
    "pbc": ("pbc", 4150, 4150, {}),
    "jhu": ("jhu", 6311, 6295, {"duplicate": 11, "truncated": 4}),
    "zheng": ("zheng2", 101, 100, {}),
    "bccd": ("bccd", 351, 351, {}),
}


@pytest.fixture(scope="module")
def imported(
    real_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, importing.ImportReport]]:
    into = tmp_path_factory.mktemp("real")
    reports = {}
    for source, (site, *_) in [*EXPECTED.items(), ("wbcatt", ("pbc",))]:
        folder = real_data / ("zheng2" if source == "zheng" else source)
        reports[source] = importing.import_source(sources.load(source), folder, sites.load(site), into)
    return into, reports


@pytest.mark.parametrize("source", EXPECTED)
def test_the_numbers_of_an_import(imported: tuple[Path, dict[str, importing.ImportReport]], source: str):
    _, found, taken, quarantined = EXPECTED[source]
    report = imported[1][source]
    assert (report.found, report.imported, dict(report.quarantined)) == (found, taken, quarantined)


def test_pictures_under_two_classes_are_left_out(imported: tuple[Path, dict[str, importing.ImportReport]]):
    frame = dataset.labelled_index(imported[0])
    assert frame["conflicted"].sum() == 11
    assert frame.loc[frame["conflicted"], "true_type"].isna().all()
    assert frame["granularity"].notna().sum() == 2380


def test_patients_of_jhu_stay_on_one_side(imported: tuple[Path, dict[str, importing.ImportReport]]):
    frame = dataset.index(imported[0], ["sha256", "site", "patient", "smear", "thumbnail"])
    found = splits.assign(frame, seed=34, val=0.15, test=0.2, test_only_sites=["zheng2", "bccd"])
    by_patient = found[frame["patient"].notna()].assign(patient=frame["patient"])
    assert by_patient["patient"].nunique() == 45
    assert by_patient.groupby("patient")["split"].nunique().eq(1).all()
    # Only BCCD holds near duplicates (the same cell photographed twice); PBC and JHU have no false alarm.
    assert set(frame.loc[found["near_duplicate"], "site"]) == {"bccd"}
