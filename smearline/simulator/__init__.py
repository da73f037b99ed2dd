"""The simulated laboratory: sites with their own stain and scanner, patients, cells and analyser exports.

It makes the platform run on a fresh machine and gives drift and diagnosis a known truth. It never stands for clinical
performance: shapes, rates and counts are made up (`population.yaml` says what is unrealistic).
"""

from __future__ import annotations

import csv
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pandas as pd

from smearline import vocabulary
from smearline.errors import DataError, SettingsError
from smearline.simulator.analyser import export
from smearline.simulator.field import picture
from smearline.simulator.optics import Simulation, jpeg, look_of, simulation_of
from smearline.simulator.population import Patient, diagnosis_of, draw_cell, draw_patient
from smearline.sites import Site

__all__ = ["SimulationSummary", "simulate"]

LABEL_COLUMNS = ("file", "type", "patient", "smear", "acquired_at")
FIRST_DAY = datetime(2024, 1, 8, 8, 0, tzinfo=UTC)
# The random streams of one patient; a cell's own is keyed by its number too.
_PATIENT, _LOOK, _ANALYSER, _CELL, _PICTURE = range(1, 6)


@dataclass(frozen=True)
class SimulationSummary:
    out: Path
    num_images: int
    num_bytes: int
    """Of the images alone."""
    num_patients: Mapping[str, int]
    """By site."""
    num_by_type: Mapping[str, int]


def simulate(
    out: Path,
    *,
    sites: Sequence[Site],
    seed: int,
    num_patients: int,
    cells_per_smear: int,
    progress: Callable[[int, int], None] | None = None,
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
    settings = [(site, simulation_of(site)) for site in sites]
    for site in sites:
        folder = out / site.name
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} is not empty; give another folder, or remove it first")
    total, num_images, num_bytes = len(sites) * num_patients * cells_per_smear, 0, 0
    counts: Counter[str] = Counter()
    for site, simulation in settings:
        folder = out / site.name
        folder.mkdir(parents=True, exist_ok=True)
        patients: list[Patient] = []
        with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
            labels = csv.DictWriter(file, LABEL_COLUMNS + tuple(vocabulary.load().characteristics), lineterminator="\n")
            labels.writeheader()
            for index in range(num_patients):
                patient, rows, smear_bytes = _draw_smear(folder, site, simulation, seed, index, cells_per_smear)
                patients.append(patient)
                labels.writerows(rows)
                counts.update(row["type"] for row in rows)
                num_images, num_bytes = num_images + len(rows), num_bytes + smear_bytes
                if progress:
                    progress(num_images, total)
        _write_patients_and_counts(folder, site, simulation, seed, patients)
    return SimulationSummary(
        out, num_images, num_bytes, {s.name: num_patients for s in sites}, dict(sorted(counts.items()))
    )


def _key(site: Site) -> int:
    return zlib.crc32(site.name.encode())


def _acquired(simulation: Simulation, index: int, cell: int = 0) -> datetime:
    """Five smears a day from FIRST_DAY on; a cell every two seconds."""
    day, turn = divmod(index, 5)
    zone = timezone(timedelta(hours=simulation.utc_offset_hours))
    local = FIRST_DAY.replace(tzinfo=zone) + timedelta(days=day, minutes=40 * turn)
    return local + timedelta(seconds=2 * cell)


def _draw_smear(
    folder: Path, site: Site, simulation: Simulation, seed: int, index: int, num_cells: int
) -> tuple[Patient, list[dict[str, str]], int]:
    """Write one smear's pictures; returns the patient, the rows of labels.csv and the bytes written."""
    key, scale = _key(site), site.microns_per_px
    assert scale is not None
    rng = np.random.default_rng([seed, key, _PATIENT, index])
    patient = draw_patient(simulation.prefix, index, diagnosis_of(index, key, seed), rng)
    look_rng = np.random.default_rng([seed, key, _LOOK, index])
    look, crowding = look_of(simulation, scale, look_rng), look_rng.uniform(0.3, 0.9)
    rows, num_bytes = [], 0
    for number in range(num_cells):
        cell = draw_cell(patient, np.random.default_rng([seed, key, _CELL, index, number]))
        stream = np.random.SeedSequence([seed, key, _PICTURE, index, number])
        data = jpeg(picture(cell, simulation.image_px, scale, look, crowding, stream), look.jpeg_quality)
        name = f"{cell.type}/{patient.smear}_{number + 1:04d}.jpg"
        (folder / cell.type).mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        num_bytes += len(data)
        acquired = _acquired(simulation, index, number).isoformat()
        rows.append(
            {"file": name, "type": cell.type, "patient": patient.patient, "smear": patient.smear}
            | {"acquired_at": acquired}
            | dict(cell.traits)
        )
    return patient, rows, num_bytes


def _write_patients_and_counts(
    folder: Path, site: Site, simulation: Simulation, seed: int, patients: Sequence[Patient]
) -> None:
    fields = ["patient", "smear", "diagnosis", "age", "sex"]
    people = pd.DataFrame([[getattr(p, f) for f in fields] for p in patients], columns=fields)
    people.to_csv(folder / "patients.csv", index=False, lineterminator="\n")
    rows = [
        export(p, site.cbc_units, _acquired(simulation, i), np.random.default_rng([seed, _key(site), _ANALYSER, i]))
        for i, p in enumerate(patients)
    ]
    pd.DataFrame(rows).to_csv(folder / "xn.csv", index=False, lineterminator="\n")
