"""The simulated laboratory: sites with their own stain and scanner, patients, cells and analyser exports.

It makes the platform run on a fresh machine and gives drift and diagnosis a known truth. It never stands for clinical
performance: shapes, rates and counts are made up (`population.yaml` says what is unrealistic).
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pandas as pd
import simplejpeg

from smearline import vocabulary
from smearline.errors import DataError, SettingsError
from smearline.simulator.analyser import export
from smearline.simulator.field import picture
from smearline.simulator.optics import Simulation, look_of, simulation_of
from smearline.simulator.population import Patient, diagnosis_of, draw_cell, draw_patient
from smearline.sites import Site

# The random streams of one patient; a cell's own is keyed by its number too.
_PATIENT, _LOOK, _ANALYSER, _CELL, _PICTURE = range(1, 6)


@dataclass(frozen=True)
class SimulationSummary:
    out: Path
    num_images: int
    num_bytes: int  # of the images alone
    num_by_type: Mapping[str, int]


def simulate(
    out: Path,
    *,
    sites: Sequence[Site],
    seed: int,
    num_patients: int,
    cells_per_smear: int,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> SimulationSummary:
    """Draw laboratories into `out`/<site>/, as class folders with labels.csv, patients.csv and xn.csv.

    The same arguments give the same bytes. A site, a patient and a cell are each drawn from their own random stream,
    so that more sites, patients or cells add files and change none that were there.

    Args:
        num_patients: per site; each has one smear.
        progress: called after each smear with the pictures done and their total.

    Raises:
        SettingsError: a count below 1 or a negative seed.
        SiteError: a site that is not simulated, or whose parameters are not valid.
        DataError: a site's folder exists already and is not empty.
    """
    if min(num_patients, cells_per_smear) < 1 or seed < 0 or not sites:
        raise SettingsError(
            f"nothing to simulate with num_patients={num_patients}, cells_per_smear={cells_per_smear}, seed={seed} and "
            f"{len(sites)} sites: give at least one site, one patient and one cell, and a seed of 0 or more"
        )
    laboratories = [(site, simulation_of(site), out / site.name) for site in sites]
    for *_, folder in laboratories:
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} is not empty; give another folder, or remove it first")
    num_bytes, counts = 0, Counter[str]()
    for site, simulation, folder in laboratories:
        folder.mkdir(parents=True, exist_ok=True)
        people, exports = [], []
        with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
            for index in range(num_patients):
                key = [seed, zlib.crc32(site.name.encode()), index]
                patient, rows, smear_bytes = _draw_smear(folder, site, simulation, key, cells_per_smear)
                rows.to_csv(file, index=False, header=not index, lineterminator="\n")
                people.append(patient)
                exports.append(export(patient, site.cbc_units, _acquired(simulation, index), _rng(key, _ANALYSER)))
                num_bytes += smear_bytes
                counts.update(rows["type"])
                progress(counts.total(), len(sites) * num_patients * cells_per_smear)
        fields = ["patient", "smear", "diagnosis", "age", "sex"]
        pd.DataFrame(people)[fields].to_csv(folder / "patients.csv", index=False, lineterminator="\n")
        pd.DataFrame(exports).to_csv(folder / "xn.csv", index=False, lineterminator="\n")
    return SimulationSummary(out, counts.total(), num_bytes, dict(sorted(counts.items())))


def _rng(key: Sequence[int], stream: int, *number: int) -> np.random.Generator:
    seed, site, index = key
    return np.random.default_rng([seed, site, stream, index, *number])


def _acquired(simulation: Simulation, index: int, cell: int = 0) -> datetime:
    """Five smears a day from a Monday on; a cell every two seconds."""
    day, turn = divmod(index, 5)
    first = datetime(2024, 1, 8, 8, 0, tzinfo=timezone(timedelta(hours=simulation.utc_offset_hours)))
    return first + timedelta(days=day, minutes=40 * turn, seconds=2 * cell)


def _draw_smear(
    folder: Path, site: Site, simulation: Simulation, key: Sequence[int], num_cells: int
) -> tuple[Patient, pd.DataFrame, int]:
    """Write one smear's pictures; returns the patient, the rows of labels.csv and the bytes written."""
    seed, site_key, index = key
    scale = site.microns_per_px
    assert scale is not None, "simulation_of has seen to it"
    patient = draw_patient(simulation.prefix, index, diagnosis_of(index, site_key, seed), _rng(key, _PATIENT))
    look_rng = _rng(key, _LOOK)
    look, crowding = look_of(simulation, scale, look_rng), look_rng.uniform(0.3, 0.9)
    rows, num_bytes = [], 0
    for number in range(num_cells):
        cell = draw_cell(patient, _rng(key, _CELL, number))
        stream = np.random.SeedSequence([seed, site_key, _PICTURE, index, number])
        pixels = picture(cell, simulation.image_px, scale, look, crowding, stream)
        data = simplejpeg.encode_jpeg(pixels, quality=simulation.jpeg_quality, colorsubsampling="420")
        name = f"{cell.type}/{patient.smear}_{number + 1:04d}.jpg"
        (folder / cell.type).mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        num_bytes += len(data)
        row = {"file": name, "type": cell.type, "patient": patient.patient, "smear": patient.smear}
        rows.append(row | {"acquired_at": _acquired(simulation, index, number).isoformat()} | dict(cell.traits))
    columns = ["file", "type", "patient", "smear", "acquired_at", *vocabulary.load().characteristics]
    return patient, pd.DataFrame(rows, columns=columns), num_bytes
