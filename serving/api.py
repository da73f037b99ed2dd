"""The routes of /v1."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import pandas as pd
from fastapi import FastAPI, HTTPException, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest, multiprocess
from pydantic import AwareDatetime, BaseModel, Field, ValidationError, field_validator
from starlette.responses import Response

from serving import http
from serving.case_tables import stamp
from serving.cases import Answer, Case, CaseStore, Key, case_of
from smearline import __version__, cbc, pseudonyms, sites, vocabulary
from smearline.errors import ImageError, ImportSourceError
from smearline.sites import Site

if TYPE_CHECKING:
    from serving.reading import Reader

EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
Identifier = Field(default=None, min_length=1, max_length=200)


class SmearRequest(BaseModel, extra="forbid", str_strip_whitespace=True):
    """Whose cells they are. Times carry their offset from UTC."""

    site: str = Field(pattern=r"^[a-z][a-z0-9_]{1,31}$")
    smear: str | None = Identifier
    patient: str | None = Identifier
    acquired_at: AwareDatetime | None = None
    cbc: dict[str, Any] | None = None

    @field_validator("acquired_at", mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        if given is not None and not re.match(r"\d{4}-\d\d-\d\dT", str(given)):
            raise ValueError("give ISO 8601 with the offset from UTC: 2026-01-31T08:30:00+01:00")
        return given

    @field_validator("acquired_at")
    @classmethod
    def _of_these_years(cls, given: datetime | None) -> datetime | None:
        # A clock that is wrong would be taken for the site's last day, and hide all that comes after.
        if given is not None and not EARLIEST <= given <= datetime.now(UTC) + timedelta(days=1):
            raise ValueError("it lies before 2000 or in the future: the scanner's clock is wrong")
        return given


class DiagnoseRequest(SmearRequest):
    """A smear, with the blood count as JSON where it is not attached as the part `cbc`."""

    smear: str = Field(min_length=1, max_length=200)


class CellReview(BaseModel, extra="forbid"):
    sha256: str
    type: str | None = None
    characteristics: dict[str, str] = Field(default_factory=dict)


class Review(BaseModel, extra="forbid"):
    """What a reviewer sets in place of the model's answer; `sign_off` confirms all the rest of the case."""

    case_id: str
    answer_id: str | None = None
    """The newest answer that the reviewer has seen; needed for a sign-off."""
    cells: list[CellReview] = Field(default_factory=list)
    diagnosis: str | None = None
    comment: str | None = Field(default=None, max_length=2000)
    sign_off: bool = False


class Desk:
    """What the routes work with; `app.state.desk`, set when the service starts."""

    def __init__(self, reader: Reader, store: CaseStore) -> None:
        self.reader, self.store = reader, store
        self.refused = Counter("smearline_images_refused", "Images that could not be used", ["reason"])
        self.diagnoses = Counter("smearline_diagnoses", "Diagnoses asked for, by status", ["status"])
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def once(self, request: Request, digest: str, work: Callable[[Key | None], Awaitable[bytes]]) -> Response:
        """Do the work, or give the stored answer of the same request; of two at once the second waits for the first."""
        given = request.headers.get("idempotency-key")
        if given is None:
            return _json(await work(None))
        if not 1 <= len(given) <= 200:
            raise HTTPException(400, "an Idempotency-Key has 1 to 200 characters")
        key = Key(request.state.holder.name, given, digest)
        lock = self._locks.setdefault((key.holder, key.key), asyncio.Lock())
        async with lock:
            before = await asyncio.to_thread(self.store.stored, key)
            return _json(before if before is not None else await work(key))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


app = FastAPI(
    title="Smearline",
    version=__version__,
    description="Research use only.",
    docs_url=None,
    redoc_url=None,  # their pages load scripts from outside; /openapi.json stays
    telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
)
app.add_middleware(http.Guard)
http.answer_errors(app)


def _body(media: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required}
    return {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}


_TEXT, _FILE = {"type": "string"}, {"type": "string", "format": "binary"}
_IMAGES = {"type": "array", "items": _FILE, "maxItems": http.LIMITS["images"]}
_RECOGNISE = {"images": _IMAGES, "site": _TEXT, "smear": _TEXT, "acquired_at": _TEXT | {"format": "date-time"}}
_OCCLUSION = {"images": _IMAGES | {"maxItems": 1}, "site": _TEXT, "type": _TEXT}
_DIAGNOSE = {"images": _IMAGES, "request": DiagnoseRequest.model_json_schema(), "cbc": _FILE}


@app.get("/", include_in_schema=False)
def index() -> Response:
    return Response("Smearline, research use only. What may be asked: /openapi.json\n", media_type="text/plain")


@app.get("/metrics", include_in_schema=False)
def metrics() -> Response:
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@app.post("/v1/recognise", openapi_extra=_body("multipart/form-data", _RECOGNISE, ["images", "site"]))
async def recognise(request: Request) -> Response:
    """Each image's type, probabilities and characteristics, or its own error."""
    http.allowed(request, "recognise")
    parts = await http.multipart(request, _RECOGNISE)
    return await _answer(request, "recognise", _valid(SmearRequest, parts.texts), parts)


@app.post("/v1/diagnose", openapi_extra=_body("multipart/form-data", _DIAGNOSE, ["images", "request"]))
async def diagnose(request: Request) -> Response:
    """The differential of a smear, and its diagnosis with reasons, or an abstention with its own."""
    http.allowed(request, "diagnose")
    parts = await http.multipart(request, _DIAGNOSE)
    given = http.parse_json(parts.texts.get("request", "null"))
    return await _answer(request, "diagnose", _valid(DiagnoseRequest, given), parts)


@app.post("/v1/occlusion", openapi_extra=_body("multipart/form-data", _OCCLUSION, ["images", "site"]))
async def occluded(request: Request) -> Response:
    """A PNG of one image and of what its type rests on; the type, given or as it is answered, is the header Smearline-Type.
    Nothing is kept."""
    http.allowed(request, "recognise")
    parts = await http.multipart(request, _OCCLUSION)
    asked = _valid(SmearRequest, {"site": parts.texts.get("site")})
    reader = request.app.state.desk.reader
    site = _site_of(request, asked)
    if len(parts.images) != 1:
        raise HTTPException(422, "what a type rests on is shown of one image at a time: send one part 'images'")
    named = parts.texts.get("type")
    if named is not None and named not in reader.card.types:
        raise HTTPException(422, f"the recogniser knows no type '{named}'; it knows {', '.join(reader.card.types)}")
    try:
        kind, picture = await reader.occluded(parts.images[0], site, named)
    except ImageError as error:
        request.app.state.desk.refused.labels(error.reason).inc()
        raise HTTPException(422, f"{error.reason}: {error.detail}") from error
    said = {
        "Type": kind,
        "Origin": reader.origin(site, False),
        "Version": reader.lineage["version"],
        "Use": http.NOTICE,
    }
    return Response(
        picture, media_type="image/png", headers={f"Smearline-{name}": str(value) for name, value in said.items()}
    )


async def _answer(request: Request, kind: str, asked: SmearRequest, parts: http.Parts) -> Response:
    received, desk = datetime.now(UTC), request.app.state.desk
    reader, store = desk.reader, desk.store
    site, holder = _site_of(request, asked), http.allowed(request)
    origin = reader.origin(site, kind == "diagnose")
    if not parts.images:
        raise HTTPException(422, "a request needs at least one part 'images'")
    case, counts = await asyncio.to_thread(_whose, asked, site, parts.cbc)

    async def work(key: Key | None) -> bytes:
        reading = await reader.read(parts.images, site, case, asked.acquired_at)
        answer_id = uuid.uuid4().hex

        def finish() -> bytes:
            smear = reader.smear(reading, counts) if kind == "diagnose" else {}
            said = smear.get("diagnosis", {})
            body = {
                "answer_id": answer_id,
                **vars(case),
                "kind": kind,
                "version": reader.lineage["version"],
                "origin": origin,
                "intended_use": http.NOTICE,
                "received_at": stamp(received),
                "acquired_at": asked.acquired_at and stamp(asked.acquired_at),
                "num_images": len(parts.images),
                "errors": reading.errors,
                **smear,
                "cells": reader.cells(reading, site),
            }
            answer = Answer(
                answer_id=answer_id,
                kind=kind,
                version=body["version"],
                origin=origin,
                asked_by=holder.name,
                received_at=received,
                acquired_at=asked.acquired_at,
                body=http.as_json(body),
                status=said.get("status"),
                diagnosis=said.get("group"),
            )
            kept = store.add(case, answer, reading.table, reading.rows, counts, key)
            for error in reading.errors:
                desk.refused.labels(error["reason"]).inc()
            if kind == "diagnose":
                desk.diagnoses.labels(said["status"]).inc()
            return kept

        return await asyncio.to_thread(finish)

    return await desk.once(request, parts.digest, work)


def _site_of(request: Request, asked: SmearRequest) -> Site:
    """Raises HTTPException (403 for a site that is not the holder's, 409) and SiteError."""
    http.allowed(request, site=asked.site)
    site = _site(sites.directory() / f"{asked.site}.yaml")
    if site.use == "clinical" and request.app.state.desk.reader.card.origin == "simulated":
        raise HTTPException(409, f"site '{site.name}' is in clinical use, and this model learned from simulated data")
    return site


def _site(path: Path) -> Site:
    """The site's file as it is now; reading one takes longer than recognising a cell."""
    return _site_at(path, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=256)
def _site_at(path: Path, _: int) -> Site:
    return sites.load(path.stem, path.parent)


def _valid(kind: type[Any], given: Any) -> Any:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        found = [{"field": ".".join(map(str, e["loc"])), "is": e["msg"]} for e in error.errors(include_url=False)]
        raise HTTPException(422, found) from error


def _whose(asked: SmearRequest, site: Site, export: bytes | None) -> tuple[Case, pd.DataFrame | None]:
    """The case, and its blood count; from here on smear and patient are pseudonyms.

    Raises:
        HTTPException: (422) blood counts of another smear or patient.
        ImportSourceError: blood counts that cannot be read.
    """
    secret = pseudonyms.key(site)
    smear = asked.smear and pseudonyms.pseudonym(secret, site.name, "smear", asked.smear)
    patient = asked.patient and pseudonyms.pseudonym(secret, site.name, "patient", asked.patient)
    counts = cbc.counts_from_json(asked.cbc, site, smear, patient) if asked.cbc is not None else None
    if export is not None:
        if counts is not None:
            raise HTTPException(422, "the blood count comes twice, in the request and as the part 'cbc'; send one")
        rows = [row for row in cbc.read_counts(export, site, secret) if row["smear"] == smear]
        if not rows:
            raise ImportSourceError("the part 'cbc' holds no sample of this smear; its number must be the smear's")
        counts = pd.DataFrame(rows, columns=cbc.COUNTS.names)
        said = {*counts["patient"].dropna(), *([patient] if patient else [])}
        if len(said) > 1:
            raise HTTPException(422, "the part 'cbc' says another patient than the request, or several")
        patient = next(iter(said), None)
    case_id = case_of(site.name, smear) if smear else uuid.uuid4().hex[:24]
    return Case(case_id, site.name, smear, patient), counts


@app.get("/v1/smears/{case_id}")
async def smear(request: Request, case_id: str) -> Response:
    """A case with its answers, overrides and sign-offs."""
    http.allowed(request, "diagnose", "review")
    found = await asyncio.to_thread(_case, request, case_id)
    answers = [json.loads(a["body"]) for a in found["answers"]]
    return _json(http.as_json({**found, "answers": answers, **_notice(found)}))


def _notice(case: dict[str, Any]) -> dict[str, str]:
    """What every answer says."""
    simulated = any(answer["origin"] == "simulated" for answer in case["answers"])
    return {"origin": "simulated" if simulated else "real", "intended_use": http.NOTICE}


def _case(request: Request, case_id: str) -> dict[str, Any]:
    found: dict[str, Any] | None = request.app.state.desk.store.case(case_id)
    if found is None:
        raise HTTPException(404, f"there is no case '{case_id}'")
    http.allowed(request, site=found["site"])
    return found


_REVIEW = _body("application/json", Review.model_json_schema()["properties"], ["case_id"])


@app.post("/v1/review", openapi_extra=_REVIEW)
async def review(request: Request) -> Response:
    """Set a cell's type or characteristics, or the diagnosis; sign a case off."""
    holder = http.allowed(request, "review")
    given, digest = await http.json_body(request)
    asked, store = _valid(Review, given), request.app.state.desk.store

    def write(key: Key | None) -> bytes:
        case, at = _case(request, asked.case_id), stamp(datetime.now(UTC))
        newest = case["answers"][-1]["answer_id"]
        if asked.sign_off and asked.answer_id != newest:
            why = "has answers that came after it" if asked.answer_id else "needs the answer that was looked at"
            raise HTTPException(409, f"the sign-off {why}: read the case again, and give answer_id '{newest}'")
        by = {"reviewer": holder.name, "at": at, "comment": asked.comment}
        overrides = [{**row, **by} for row in _overrides(asked, case, store.predictions(asked.case_id))]
        if not overrides and not asked.sign_off:
            raise HTTPException(422, "nothing is set and nothing signed off: give cells, diagnosis or sign_off")
        told = {"overrides": len(overrides), "signed_off": asked.sign_off, **_notice(case)}
        body = http.as_json({"case_id": asked.case_id, **by, **told})
        return store.review(asked.case_id, body, overrides, by if asked.sign_off else None, key, newest)

    desk: Desk = request.app.state.desk
    return await desk.once(request, digest, lambda key: asyncio.to_thread(write, key))


def _overrides(asked: Review, case: dict[str, Any], predictions: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the table overrides. Raises VocabularyError, or HTTPException (422) for a cell that is not the case's."""
    words, rows = vocabulary.load(), []
    known = predictions.set_index("sha256")
    if len({cell.sha256 for cell in asked.cells}) < len(asked.cells):
        raise HTTPException(422, "a cell stands twice in the review")
    for cell in asked.cells:
        if cell.sha256 not in known.index:
            raise HTTPException(422, f"case {asked.case_id} has no cell '{cell.sha256}'")
        predicted = known.loc[cell.sha256]
        said = {name: words.characteristic_value(name, value) for name, value in cell.characteristics.items()}
        if cell.type is not None:
            said["type"] = words.type_code(cell.type)
        kind = said.get("type", predicted["predicted_type"])
        if foreign := [n for n in cell.characteristics if kind not in words.characteristics[n].applies_to]:
            raise HTTPException(422, f"'{foreign[0]}' does not apply to {kind}")
        for name, value in said.items():
            was = predicted.get("predicted_type" if name == "type" else f"c_{name}")
            rows.append({"sha256": cell.sha256, "name": name, "value": value, "was": was})
    if asked.diagnosis is not None:
        was = next((a["diagnosis"] for a in reversed(case["answers"]) if a["kind"] == "diagnose"), None)
        rows.append({"sha256": None, "name": "diagnosis", "value": words.diagnosis_code(asked.diagnosis), "was": was})
    return rows


@app.get("/v1/model")
async def model(request: Request) -> Response:
    """What answers: lineage, cards of both models, contracts, limits."""
    http.allowed(request)
    reader = request.app.state.desk.reader
    cards = {
        "recogniser": reader.card.model_dump(mode="json"),
        "diagnosis": reader.diagnosis and reader.diagnosis.card.model_dump(mode="json"),
    }
    return _json(http.as_json({**reader.lineage, "cards": cards, "limits": http.LIMITS, "intended_use": http.NOTICE}))
