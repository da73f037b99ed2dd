"""What the service says of images and smears: decoded beside the recogniser, answered in the vocabulary's terms."""

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from serving.cases import Case
from smearline import cbc, diagnosis, differential, images, occlusion, plain_json, sites, vocabulary
from smearline.errors import ImageError
from smearline.reader import prepare
from smearline.recognition import RecognitionModel, nothing, split, table_of
from smearline.sites import Site

MAX_PIXELS = 4_000_000
"""A picture is of one cell and has some 100,000; the time that a picture takes is everybody's."""
_FORMATS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"BM")
"""JPEG, PNG, TIFF, BMP: nothing else is handed to a decoder."""
CHUNK = 64
"""Images that go to the recogniser together: while it works on some, others are decoded."""
Recognise = Callable[[NDArray[np.uint8]], Awaitable[NDArray[np.float32]]]


@dataclass(frozen=True)
class _Picture:
    row: dict[str, Any]
    """Of dataset.CELLS."""
    crop: NDArray[np.uint8]
    number: int


@dataclass(frozen=True)
class Reading:
    """What was seen on the images of one request."""

    table: pa.Table
    """A row a cell that was recognised: recognition.table_of."""
    numbers: tuple[int, ...]
    """Of the images in the request, row by row."""
    rows: tuple[dict[str, Any], ...]
    """Rows of dataset.CELLS."""
    errors: tuple[dict[str, Any], ...]


class Reader:
    """The packaged models, without the recogniser's network, which runs in a process of its own.

    Args:
        package: as serving.package made it.
        recognise: crops (B x S x S x 3 uint8) to type probabilities, characteristic probabilities and embedding, one after
            the other in B x (T + V + E).

    Raises:
        ModelError: the models do not belong together (diagnosis.check_pair).
    """

    def __init__(self, package: Path, recognise: Recognise) -> None:
        self.lineage: dict[str, Any] = plain_json.read(package / "lineage.json")
        model = RecognitionModel(package / "recogniser", threads=1)
        self.card, self._embedding_version = model.card, model.embedding_version
        self.diagnosis = diagnosis.DiagnosisModel(package / "diagnosis") if self.lineage["diagnosis"] else None
        if self.diagnosis:
            diagnosis.check_pair(model, self.diagnosis.card)
        real = [name for name in self.card.sites if sites.load(name).origin == "real"]
        seen = model.seen[model.seen["site"].isin(real)]
        taught = {name for name in self.card.characteristics if name in seen and seen[name].notna().any()}
        self._trained = {"real": taught, "simulated": set(self.card.characteristics)}
        self._recognise = recognise
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._occluding = asyncio.Semaphore(1)  # fifty answers each, so one request at a time

    async def read(self, data: Sequence[bytes], site: Site, case: Case, acquired_at: datetime | None) -> Reading:
        """Recognise images; one that cannot be used is among the errors and leaves the others alone."""
        shas = [hashlib.sha256(d).hexdigest() for d in data]
        scale = _scale(site)
        common = {
            **{name: getattr(site, name) for name in ("scanner", "stain", "origin", "microns_per_px")},
            **{name: getattr(case, name) for name in ("site", "smear", "patient")},
            "acquired_at": acquired_at,
            "source": "service",
        }

        def look(number: int) -> _Picture | dict[str, Any]:
            try:
                if (first := shas.index(shas[number])) != number:
                    raise ImageError("duplicate", f"the same bytes as image {first}")
                pixels = _decode(data[number])
                crop = prepare(data[number], scale, self.card.field_um, self.card.size_px, pixels)
            except ImageError as error:
                return {"image": number, "reason": error.reason, "detail": error.detail}
            row = {**common, "sha256": shas[number], "image": images.without_metadata(data[number], pixels)}
            row |= dict(zip(("height", "width"), pixels.shape[:2], strict=True))
            return _Picture(row | {"thumbnail": images.thumbnail(pixels).tobytes()}, crop, number)

        turns = asyncio.Semaphore(os.cpu_count() or 1)  # so that a large request leaves every other picture to others

        async def look_in_turn(number: int) -> Any:
            async with turns:
                return await self._run(look, number)

        async def chunk(numbers: range) -> tuple[list[_Picture | dict[str, Any]], pa.Table | None]:
            seen = await asyncio.gather(*map(look_in_turn, numbers))
            good = [s for s in seen if isinstance(s, _Picture)]
            if not good:
                return seen, None
            crops = np.stack([s.crop for s in good])
            outputs = await self._recognise(crops)
            return seen, await self._run(self._table, [s.row for s in good], crops, outputs, site)

        starts = range(0, len(data), CHUNK)
        parts = await asyncio.gather(*(chunk(range(s, min(s + CHUNK, len(data)))) for s in starts))
        pictures = [s for seen, _ in parts for s in seen if isinstance(s, _Picture)]
        return Reading(
            pa.concat_tables([table for _, table in parts if table is not None] or [nothing(self.card)]),
            tuple(p.number for p in pictures),
            tuple(p.row for p in pictures),
            tuple(s for seen, _ in parts for s in seen if isinstance(s, dict)),
        )

    async def occluded(self, data: bytes, site: Site, named: str | None) -> tuple[str, bytes]:
        """(type, PNG): what this name, or the most probable, rests on in the picture (smearline.occlusion). Raises ImageError."""

        def look() -> NDArray[np.uint8]:
            crop = prepare(data, _scale(site), self.card.field_um, self.card.size_px, _decode(data))
            return occlusion.covered(crop)

        async with self._occluding:
            crops = await self._run(look)
            outputs = await self._recognise(crops)
        if named is None:  # as the cell is answered
            row = {"sha256": None, "site": site.name, "patient": None, "smear": None}
            named = self._table([row], crops[:1], outputs[:1], site)["predicted_type"][0].as_py()
        drop = occlusion.drop(outputs[:, : len(self.card.types)], self.card.types.index(named))
        return named, await self._run(occlusion.png, crops[0], drop)

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def _table(
        self, rows: list[dict[str, Any]], crops: NDArray[np.uint8], outputs: NDArray[np.float32], site: Site
    ) -> pa.Table:
        num_types, num_values = len(self.card.types), sum(len(v) for v in self.card.characteristics.values())
        types, values, embedding = np.split(outputs, [num_types, num_types + num_values], axis=1)
        said = [{**row, "scale_assumed": site.microns_per_px is None} for row in rows]
        return table_of(self.card, said, crops, types, values, embedding)

    def origin(self, site: Site, with_diagnosis: bool) -> str:
        """Of an answer: what has one simulated input is simulated."""
        inputs = {self.card.origin, site.origin}
        if with_diagnosis and self.diagnosis:
            inputs.add(self.diagnosis.card.origin)
        return "simulated" if "simulated" in inputs else "real"

    def cells(self, reading: Reading, site: Site) -> list[dict[str, Any]]:
        """What is answered of each cell. A characteristic that no real cell taught is not served on real cells."""
        trained, words, found = self._trained[site.origin], vocabulary.load(), []
        applies = {t: [n for n, c in words.characteristics.items() if t in c.applies_to] for t in words.types}
        for number, row in zip(reading.numbers, reading.table.to_pylist(), strict=True):
            kind, characteristics = row["predicted_type"], {}
            for name in applies[kind]:
                value = row[f"c_{name}"] if name in trained else None
                chance = {"value": value, "probability": row[f"p_{name}_{value}"]} if value else "not trained"
                characteristics[name] = chance
            cell = {"image": number, "sha256": row["sha256"], "type": kind, "probability": row[f"p_{kind}"]}
            cell["probabilities"] = {t: row[f"p_{t}"] for t in self.card.types}
            if "named" in row:
                status = "named" if row["named"] else "unidentified"
                cell |= {"status": status, "type_set": row["type_set"].split(), "unlike": row["unlike"]}
            limit = self.card.confidence and self.card.confidence.blast_from
            if limit is not None:
                cell["possible_blast"] = row["p_BLAST"] >= limit
            found.append({**cell, "characteristics": characteristics, "scale_assumed": row["scale_assumed"]})
        return found

    def smear(self, reading: Reading, counts: pd.DataFrame | None) -> dict[str, Any]:
        """The differential with its intervals, the diagnosis or its abstention, and what became of the blood count."""
        found: dict[str, Any] = {"differential": None, "diagnosis": self._no_diagnosis(), "cbc": _told(counts)}
        if not len(reading.table):
            return found
        summary = differential.summarise(*split(reading.table))
        summary = summary.assign(embedding_version=self._embedding_version)
        row = summary.iloc[0]
        types = vocabulary.load().differential_types
        shares = {t: {part: row[f"{part}_{t}"] for part in ("share", "low", "high")} for t in types}
        found["differential"] = {"num_cells": row["num_cells"], "num_counted": row["num_counted"], "types": shares}
        if self.diagnosis:
            said = self.diagnosis.diagnose(summary, counts).iloc[0].to_dict()
            probabilities = {g: said[f"p_{g}"] for g in self.diagnosis.card.groups}
            names = ("status", "group", "reasons", "abstained_because", "cautions", "not_available", "origin")
            found["diagnosis"] = {
                **{name: said[name] for name in names},
                "probabilities": probabilities,
                "evidence": self.lineage["diagnosis"].get("evidence"),
            }
        return found

    def _no_diagnosis(self) -> dict[str, Any]:
        if self.diagnosis:
            return {"status": "abstained", "group": None, "abstained_because": ["no image could be recognised"]}
        return {"status": "no diagnosis model", "group": None, "because": self.lineage["diagnosis_absent_because"]}


def _scale(site: Site) -> float:
    scale = site.microns_per_px or site.assumed_microns_per_px
    assert scale is not None, "Site holds one of the two"
    return scale


def _decode(data: bytes) -> images.UInt8Array:
    """Decode as import does: a client's picture may later be a data set's. Raises ImageError."""
    if data and not data.startswith(_FORMATS):
        raise ImageError("unreadable", "no JPEG, PNG, TIFF or BMP")
    return images.decode(data, MAX_PIXELS)


def _told(counts: pd.DataFrame | None) -> dict[str, Any] | None:
    if counts is None:
        return None
    unused, given = cbc.unused(counts), int(counts["parameter"].nunique())
    missing = {name: why for name, why in unused.items() if name in cbc.analytes()}
    kept = len(unused) - len(missing)
    return {"given": given, "read": given - len(unused), "kept_but_not_read": kept, "missing": missing}
