"""The simulated laboratory: what it writes, that it writes the same twice, and that each characteristic is drawn."""

import hashlib
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from smearline import sites, vocabulary
from smearline.errors import DataError, SettingsError, SiteError
from smearline.simulator import SimulationSummary, simulate
from smearline.simulator.analyser import LEUCOCYTES, export
from smearline.simulator.cells import Cell
from smearline.simulator.field import picture
from smearline.simulator.optics import look_of, simulation_of
from smearline.simulator.population import cell_of_type, diagnosis_of, draw_cell, draw_patient, tables

SITES_FOLDER = Path(__file__).parents[2] / "sites"
NORTH, SOUTH = (sites.load(name, SITES_FOLDER) for name in ("sim_north", "sim_south"))
KNOWN = vocabulary.load()
SENTINELS = {"", "----", "++++", "ERROR"}


def _digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.*"))}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> SimulationSummary:
    out = tmp_path_factory.mktemp("simulated")
    return simulate(out, sites=[NORTH, SOUTH], seed=3, num_patients=6, cells_per_smear=40)


@pytest.fixture(scope="module")
def labels(drawn: SimulationSummary) -> pd.DataFrame:
    parts = [
        pd.read_csv(drawn.out / s.name / "labels.csv", keep_default_na=False).assign(site=s.name)
        for s in (NORTH, SOUTH)
    ]
    return pd.concat(parts, ignore_index=True)


def test_the_same_arguments_give_the_same_bytes_and_other_seeds_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate(tmp_path / name, sites=[NORTH], seed=seed, num_patients=2, cells_per_smear=4)
    one, again, other = (_digests(tmp_path / name) for name in "abc")
    assert one == again
    assert not set(one.values()) & set(other.values())


def test_more_sites_patients_and_cells_change_nothing_that_was_there(tmp_path: Path) -> None:
    simulate(tmp_path / "few", sites=[SOUTH], seed=1, num_patients=1, cells_per_smear=3)
    simulate(tmp_path / "more", sites=[NORTH, SOUTH], seed=1, num_patients=2, cells_per_smear=5)
    few, more = (_digests(tmp_path / name / "sim_south") for name in ("few", "more"))
    pictures = {name for name in few if name.endswith(".jpg")}
    assert len(pictures) == 3
    assert all(more[name] == few[name] for name in pictures)


def test_layout_is_that_of_a_class_folder_import(drawn: SimulationSummary, labels: pd.DataFrame) -> None:
    assert len(labels) == drawn.num_images == 2 * 6 * 40
    assert labels["type"].value_counts().to_dict() == dict(drawn.num_by_type)
    for row in labels.itertuples():
        kind, _, name = row.file.partition("/")
        assert kind == row.type
        assert name.startswith(f"{row.smear}_")
        assert row.smear.startswith(row.patient)
        assert datetime.fromisoformat(row.acquired_at).tzinfo is not None
        assert (drawn.out / row.site / row.file).stat().st_size < 20_000
    first = labels.iloc[0]
    with Image.open(drawn.out / first.site / first.file) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (256, 256), "RGB")
        assert not image.getexif()


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    simulate(
        tmp_path, sites=[NORTH], seed=1, num_patients=2, cells_per_smear=2, progress=lambda n, of: seen.append((n, of))
    )
    assert seen == [(2, 4), (4, 4)]


def test_characteristics_are_blank_exactly_where_they_do_not_apply(labels: pd.DataFrame) -> None:
    for name, characteristic in KNOWN.characteristics.items():
        applies = labels["type"].isin(characteristic.applies_to)
        assert set(labels.loc[applies, name]) <= set(characteristic.values), name
        assert set(labels.loc[~applies, name]) <= {""}, name


def test_characteristics_agree_with_each_other(labels: pd.DataFrame) -> None:
    granular = labels[labels["granularity"] != ""]
    assert ((granular["granularity"] == "no") == (granular["granule_type"] == "nil")).all()
    assert ((granular["granule_colour"] == "nil") == (granular["granule_type"] == "nil")).all()
    assert not ((labels["hypogranulation"] == "present") & (labels["toxic_granulation"] == "present")).any()
    assert not ((labels["pseudo_pelger_huet"] == "present") & (labels["hypersegmentation"] == "present")).any()


def test_three_thousand_cells_hold_every_type_and_value_forty_times() -> None:
    rng = np.random.default_rng(0)
    diagnoses = list(tables()["mix"])
    patients = [draw_patient("N", i, diagnoses[i % 6], rng) for i in range(48)]
    cells = [draw_cell(p, rng) for p in patients for _ in range(62)]
    kinds = pd.Series([c.type for c in cells]).value_counts()
    assert set(kinds.index) == set(KNOWN.types)
    assert kinds.min() >= 40
    table = pd.DataFrame([c.traits for c in cells])
    for name, characteristic in KNOWN.characteristics.items():
        counts = table[name].value_counts()
        assert all(counts.get(value, 0) >= 40 for value in characteristic.values), (name, counts.to_dict())


def test_any_six_patients_of_a_block_have_the_six_diagnoses() -> None:
    assert sorted(diagnosis_of(i, 7, seed=1) for i in range(6, 12)) == sorted(tables()["mix"])
    assert set(tables()["mix"]) <= set(KNOWN.diagnoses)


def test_blasts_belong_to_leukaemia_mds_and_mpn_alone(labels: pd.DataFrame, drawn: SimulationSummary) -> None:
    people = pd.concat([pd.read_csv(drawn.out / s.name / "patients.csv") for s in (NORTH, SOUTH)])
    blasts = labels[labels["type"] == "BLAST"].merge(people, on="smear")
    assert set(blasts["diagnosis"]) <= {"ALL", "AML", "MDS", "MPN"}


def _exports(site: sites.Site, num: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(num):
        patient = draw_patient("N", i, list(tables()["mix"])[i % 6], rng)
        rows.append(export(patient, site.cbc_units, datetime(2024, 1, 8, 9, 0), rng))
    return pd.DataFrame(rows)


def test_xn_has_the_columns_of_an_export_in_the_units_of_the_site(drawn: SimulationSummary) -> None:
    north, south = (
        pd.read_csv(drawn.out / s.name / "xn.csv", dtype=str, keep_default_na=False) for s in (NORTH, SOUTH)
    )
    assert len(north.columns) >= 200
    assert {
        "WBC(10^3/uL)",
        "HGB(g/dL)",
        "[NE-SSC(ch)]",
        "[NE-SSC(ch)]/M",
        "Q-Flag(Blasts?)",
        "IP SUS(WBC)Blasts?",
    } <= set(north)
    assert {"WBC(10^9/L)", "HGB(g/L)", "MCHC(g/L)"} <= set(south)
    assert sum(c.endswith("/M") for c in north) == len(tables("analyser")["printed"])
    people = pd.read_csv(drawn.out / NORTH.name / "patients.csv")
    assert list(north["Sample No."]) == list(people["smear"])
    assert list(north["Patient ID"]) == list(people["patient"])
    assert set(north["Patient Name"]) | set(north["Doctor Name"]) == {""}


def test_xn_sentinels_are_rare_and_each_occurs() -> None:
    table = _exports(NORTH, 300)
    values = table[[c for c in table if f"{c}/M" in table]].to_numpy().ravel()
    counts = pd.Series([v if v in SENTINELS else v[-1] if v[-1] in "*@" else "number" for v in values]).value_counts()
    assert counts["number"] / len(values) > 0.95
    assert {"", "----", "++++", "ERROR", "*", "@"} <= set(counts.index)


def test_xn_values_agree_with_each_other() -> None:
    table = _exports(NORTH, 120)
    plain = table.apply(pd.to_numeric, errors="coerce")
    shares = (
        plain[[f"{n}%(%)" if f"{n}%(%)" in plain else f"{n}%" for n in LEUCOCYTES]].sum(axis=1, skipna=False).dropna()
    )
    assert len(shares) > 60
    assert shares.to_numpy() == pytest.approx(100.0, abs=1e-6)
    mcv = (plain["HCT(%)"] * 10 / plain["RBC(10^6/uL)"] - plain["MCV(fL)"]).dropna()
    assert mcv.abs().max() < 0.2
    count_name = next(c for c in plain if c.startswith("NEUT#"))
    neutrophils = (
        plain["WBC(10^3/uL)"] * plain[next(c for c in plain if c.startswith("NEUT%"))] / 100 - plain[count_name]
    ).dropna()
    assert neutrophils.abs().max() < 0.02


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="num_patients=0"):
        simulate(tmp_path, sites=[NORTH], seed=1, num_patients=0, cells_per_smear=1)
    with pytest.raises(SiteError, match="cannot be drawn"):
        simulate(tmp_path, sites=[sites.load("pbc", SITES_FOLDER)], seed=1, num_patients=1, cells_per_smear=1)
    broken = NORTH.model_copy(update={"simulation": {**(NORTH.simulation or {}), "blurr_um": 1}})
    with pytest.raises(SiteError, match="blurr_um"):
        simulate(tmp_path, sites=[broken], seed=1, num_patients=1, cells_per_smear=1)
    simulate(tmp_path, sites=[NORTH], seed=1, num_patients=1, cells_per_smear=1)
    with pytest.raises(DataError, match="not empty"):
        simulate(tmp_path, sites=[NORTH], seed=1, num_patients=1, cells_per_smear=1)


# ---- pictures -------------------------------------------------------------------------------------------------------


def _picture(cell: Cell, seed: int = 0, site: sites.Site = NORTH) -> NDArray[np.float32]:
    simulation = simulation_of(site)
    assert site.microns_per_px is not None
    look = look_of(simulation, site.microns_per_px, np.random.default_rng(0))
    image = picture(cell, simulation.image_px, site.microns_per_px, look, 0.5, np.random.SeedSequence([9, seed]))
    return image.astype(np.float32)


def _pair(name: str, kind: str, values: tuple[str, str], seed: int) -> tuple[Cell, Cell]:
    """The same cell with one value of a characteristic and with the other."""
    agreeing = {
        "granularity": [
            {"granule_type": "nil", "granule_colour": "nil"},
            {"granule_type": "small", "granule_colour": "pink"},
        ],
        "granule_type": [{"granule_colour": "nil"}, {"granule_colour": "purple"}],
        "granule_colour": [{"granule_type": "small"}, {"granule_type": "small"}],
    }.get(name, [{}, {}])
    if name == "granule_colour":
        values = ("pink", "purple")
    one, two = (
        cell_of_type(kind, {name: 0.0}, np.random.default_rng(seed), **{name: value}, **extra)
        for value, extra in zip(values, agreeing, strict=True)
    )
    return one, two


@pytest.mark.parametrize("name", list(KNOWN.characteristics))
def test_each_characteristic_changes_the_cell_and_not_its_surroundings(name: str) -> None:
    characteristic = KNOWN.characteristics[name]
    values = (characteristic.values[0], characteristic.values[-1])
    changed = {}
    for kind in characteristic.applies_to:
        if name == "nuclear_cytoplasmic_ratio" and kind in ("NEUT_SEG", "NEUT_BAND", "EOS"):
            continue  # always low in these
        one, two = _pair(name, kind, values, seed=4)
        assert one.traits[name] != two.traits[name]
        difference = np.abs(_picture(one) - _picture(two)).max(axis=2)
        rows, columns = np.indices(difference.shape) - 127.5
        inside = np.hypot(rows, columns) * 0.1 < max(one.diameter_um, two.diameter_um) / 2
        changed[kind] = float((difference[inside] > 12).mean())
        if one.diameter_um == two.diameter_um and name != "cell_shape":
            assert (difference[:20, :20] < 25).all()
    assert min(changed.values()) > 0.004, changed


def _mean_over_cells(measure, kind: str, num: int = 6, **fixed: str) -> float:  # type: ignore[no-untyped-def]
    """The mean of measure(picture) over some cells of a type with the fixed characteristics and no others."""
    quiet = dict.fromkeys(tables()["rates"], 0.0)
    plain = (
        {"cell_shape": "round", "cytoplasm_vacuole": "no"}
        if kind in KNOWN.characteristics["cell_shape"].applies_to
        else {}
    )
    cells = [cell_of_type(kind, quiet, np.random.default_rng([8, i]), **plain, **fixed) for i in range(num)]
    return float(np.mean([measure(_picture(cell, seed=i)) for i, cell in enumerate(cells)]))


def _middle(image: NDArray[np.float32], radius_um: float = 5.0) -> NDArray[np.bool_]:
    rows, columns = np.indices(image.shape[:2]) - 127.5
    return np.hypot(rows, columns) * 0.1 < radius_um


def _cytoplasm_grain(image: NDArray[np.float32]) -> float:
    """Fine texture of what is neither nucleus nor glass."""
    green = image[..., 1]
    grain = np.abs(green - ndimage.gaussian_filter(green, 3))
    cytoplasm = _middle(image) & ndimage.binary_erosion(green > 110, iterations=5)
    return float(grain[cytoplasm].mean())


def _dark_share(image: NDArray[np.float32]) -> float:
    """Share of the cell that is as dark as a nucleus."""
    return float((image[..., 1][_middle(image, 7.0)] < 80).mean())


def _num_dark_parts(image: NDArray[np.float32]) -> float:
    _, num = ndimage.label(ndimage.binary_erosion((image[..., 1] < 80) & _middle(image, 6.0), iterations=5))
    return float(num)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"toxic_granulation": "present"}, {"toxic_granulation": "absent"}),
        (
            {"hypogranulation": "absent", "granule_type": "small", "granule_colour": "pink"},
            {"hypogranulation": "present"},
        ),
    ],
)
def test_granules_roughen_the_cytoplasm(more: dict[str, str], less: dict[str, str]) -> None:
    assert _mean_over_cells(_cytoplasm_grain, "NEUT_SEG", **more) > 1.15 * _mean_over_cells(
        _cytoplasm_grain, "NEUT_SEG", **less
    )


def test_hypersegmented_nuclei_fall_into_more_lobes_than_pseudo_pelger_ones() -> None:
    many = _mean_over_cells(_num_dark_parts, "NEUT_SEG", hypersegmentation="present")
    few = _mean_over_cells(_num_dark_parts, "NEUT_SEG", pseudo_pelger_huet="present")
    assert many > few + 1


def test_a_high_ratio_means_more_nucleus() -> None:
    high = _mean_over_cells(_dark_share, "LYMPH", 12, nuclear_cytoplasmic_ratio="high", large_granular="absent")
    low = _mean_over_cells(_dark_share, "LYMPH", 12, nuclear_cytoplasmic_ratio="low", large_granular="absent")
    assert high > low


def test_an_auer_rod_is_red_and_a_dohle_body_blue() -> None:
    def redness(image: NDArray[np.float32]) -> float:
        return float(np.quantile((image[..., 0] - image[..., 2])[_middle(image, 6.0)], 0.995))

    def blueness(image: NDArray[np.float32]) -> float:
        pale = _middle(image, 5.8) & (image[..., 1] > 90)
        return float(np.quantile((image[..., 2] - image[..., 0])[pale], 0.98))

    assert _mean_over_cells(redness, "BLAST", auer_rod="present") > _mean_over_cells(
        redness, "BLAST", auer_rod="absent"
    )
    assert _mean_over_cells(blueness, "NEUT_SEG", dohle_body="present") > _mean_over_cells(
        blueness, "NEUT_SEG", dohle_body="absent"
    )


def test_types_have_their_size() -> None:
    def diameter(kind: str) -> float:
        quiet = dict.fromkeys(tables()["rates"], 0.0)
        return float(np.mean([cell_of_type(kind, quiet, np.random.default_rng(i)).diameter_um for i in range(60)]))

    assert 2 < diameter("PLT") < 4
    assert diameter("PLT_LARGE") > 7
    assert 8 < diameter("NRBC") < diameter("NEUT_SEG") < diameter("MONO") < 18
    assert 8 < diameter("LYMPH") < 10.5
    assert 12 < diameter("NEUT_SEG") < 14


@pytest.mark.parametrize("path", sorted(SITES_FOLDER.glob("sim_*.yaml")), ids=lambda p: p.stem)
def test_every_simulated_site_in_the_folder_can_be_drawn(path: Path) -> None:
    cell = cell_of_type("BLAST", {}, np.random.default_rng(1))
    image = _picture(cell, site=sites.load(path.stem, SITES_FOLDER))
    assert 40 < image.std() < 90


def test_the_sites_differ_in_white_point_hue_and_sharpness() -> None:
    cell = cell_of_type("NEUT_SEG", {}, np.random.default_rng(1))
    north, south = _picture(cell, site=NORTH), _picture(cell, site=SOUTH)
    assert (north.shape, south.shape) == ((256, 256, 3), (208, 208, 3))
    glass_north, glass_south = (np.quantile(image.reshape(-1, 3), 0.97, axis=0) for image in (north, south))
    assert glass_north[0] - glass_north[2] > 30 > 0 > glass_south[0] - glass_south[2]
