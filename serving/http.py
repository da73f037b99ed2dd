"""What stands before every request to /v1: the bearer token, the limits, and errors as problem details (RFC 9457)."""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from prometheus_client import Histogram
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.cases import CaseConflict, KeyReused
from smearline import plain_json, tokens
from smearline.errors import ImportSourceError, SiteError, SmearlineError, TokenError, VocabularyError

NOTICE = "research use only"
LIMITS = {
    "images": 512,
    "part_bytes": 8_000_000,
    "request_bytes": 128_000_000,
    "requests_at_once": 32,
    "requests_at_once_of_a_holder": 16,
}
REQUESTS = Histogram("smearline_request_seconds", "Requests to /v1 and how long they took", ["route", "status"])
STALLED_SECONDS = 30
"""A request whose next bytes do not come for so long is ended: it would keep a place from others."""
_CLIENTS = (KeyReused, ImportSourceError, SiteError, VocabularyError)
"""Errors that are the request's."""


def problem(status: int, detail: Any, headers: Mapping[str, str] | None = None) -> Response:
    body = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail, "intended_use": NOTICE}
    return JSONResponse(body, status, {**(headers or {})}, media_type="application/problem+json")


def answer_errors(app: FastAPI) -> None:
    """Every error of the app as problem details."""

    @app.exception_handler(StarletteHTTPException)
    async def _(_: Request, error: StarletteHTTPException) -> Response:
        return problem(error.status_code, error.detail, error.headers)

    @app.exception_handler(SmearlineError)
    async def _(_: Request, error: SmearlineError) -> Response:
        status = 409 if isinstance(error, CaseConflict) else 422 if isinstance(error, _CLIENTS) else 500
        return problem(status, str(error))

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> Response:
        return problem(500, "the service failed; its log says more")


class Guard:
    """ASGI middleware: whose token it is, how many requests are at work and how long they take, how many bytes a request has.

    Bytes are counted as they arrive, so that no more than the limit is ever held; the holder is in `request.state.holder`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._at_work = app, Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refused := self._refusal(scope, headers):
            await refused(scope, receive, send)
            return
        got, whole, name = 0, False, scope["state"]["holder"].name
        began, status = time.monotonic(), 500

        async def counted() -> Message:
            nonlocal got, whole
            try:
                message = await asyncio.wait_for(receive(), None if whole else STALLED_SECONDS)
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {STALLED_SECONDS} s", {"Connection": "close"}) from None
            whole = not message.get("more_body", False)
            got += len(message.get("body", b""))
            if got > LIMITS["request_bytes"]:
                raise too_large()
            return message

        async def told(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self._at_work[name] += 1
        try:
            await self._app(scope, counted, told)
        finally:
            self._at_work[name] -= 1
            if "route" in scope:
                REQUESTS.labels(scope["route"].path, status).observe(time.monotonic() - began)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        kind, _, token = headers.get("authorization", "").strip().partition(" ")
        try:
            if kind.casefold() != "bearer" or not token:
                raise TokenError("a bearer token is needed: Authorization: Bearer ...")
            file = scope["app"].state.desk.store.home / "tokens.yaml"
            holder = scope.setdefault("state", {})["holder"] = tokens.holder(file, token)
        except TokenError as error:
            return problem(401, str(error), {"WWW-Authenticate": "Bearer"})
        if int(headers.get("content-length") or 0) > LIMITS["request_bytes"]:
            return problem(413, too_large().detail, {"Connection": "close"})
        everybody, own = self._at_work.total(), self._at_work[holder.name]
        if everybody >= LIMITS["requests_at_once"] or own >= LIMITS["requests_at_once_of_a_holder"]:
            return problem(
                503, f"{everybody} requests are at work, {own} of them yours; come again", {"Retry-After": "2"}
            )
        return None


def too_large() -> HTTPException:
    return HTTPException(413, f"a request has at most {LIMITS['request_bytes']} bytes", {"Connection": "close"})


def allowed(request: Request, *roles: str, site: str | None = None) -> tokens.Holder:
    """The request's holder, who needs one of the roles, and the site. Raises HTTPException (403)."""
    holder: tokens.Holder = request.state.holder
    if roles and not holder.roles & set(roles):
        raise HTTPException(403, f"'{holder.name}' has no role {' or '.join(roles)}")
    if site is not None and not holder.at(site):
        raise HTTPException(403, f"'{holder.name}' may not ask for site '{site}'")
    return holder


@dataclass(frozen=True)
class Parts:
    """A multipart request: its texts, its images in order, the attached blood count; names of files are not looked at."""

    texts: dict[str, str]
    images: list[bytes]
    cbc: bytes | None
    digest: str = field(repr=False)
    """Of all of it, so that a resend is known for one whatever its multipart boundary."""


async def multipart(request: Request, known: Iterable[str]) -> Parts:
    """Read the parts `known`, of which `images` and `cbc` are files and the others texts; HTTPException (400, 413, 415, 422) for
    anything else."""
    known = tuple(known)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(415, "send multipart/form-data: the parts " + ", ".join(known))
    try:
        form = await request.form(max_files=LIMITS["images"] + 2, max_fields=len(known))
    except StarletteHTTPException as error:
        if str(error.detail).startswith("Too many files"):
            raise HTTPException(413, f"a request has at most {LIMITS['images']} images") from error
        raise
    read: dict[str, list[bytes]] = {}
    for name, part in form.multi_items():
        read.setdefault(name, []).append(await part.read() if isinstance(part, UploadFile) else part.encode())
    await form.close()
    if unknown := sorted(set(read) - set(known)):
        raise HTTPException(422, f"unknown part '{unknown[0]}'; known: {', '.join(known)}")
    for name, number, data in [(n, i, d) for n, values in read.items() for i, d in enumerate(values)]:
        if len(data) > LIMITS["part_bytes"]:
            raise HTTPException(413, f"{name} {number} has {len(data)} bytes; at most {LIMITS['part_bytes']}")
    images = read.pop("images", [])
    if len(images) > LIMITS["images"]:
        raise HTTPException(413, f"{len(images)} images; a request has at most {LIMITS['images']}")
    if several := [name for name, values in read.items() if len(values) > 1]:
        raise HTTPException(422, f"the part '{several[0]}' comes more than once")
    digest = hashlib.sha256(request.url.path.encode())
    for name, data in [*sorted((n, v[0]) for n, v in read.items()), *(("images", i) for i in images)]:
        digest.update(f"\0{name} {len(data)} ".encode() + data)
    cbc = read.pop("cbc", [None])[0]
    try:
        said = {name: values[0].decode() for name, values in read.items()}
    except UnicodeDecodeError as error:
        raise HTTPException(400, "a text part is not UTF-8") from error
    return Parts(said, images, cbc, digest.hexdigest())


async def json_body(request: Request) -> tuple[Any, str]:
    """The body as JSON, and its digest. Raises HTTPException (400, 415)."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise HTTPException(415, "send application/json")
    data = await request.body()
    return parse_json(data), hashlib.sha256(request.url.path.encode() + b"\0" + data).hexdigest()


def parse_json(data: bytes | str) -> Any:
    """Raises HTTPException (400)."""
    try:
        return plain_json.strict(data)
    except ValueError as error:
        raise HTTPException(400, f"this is no JSON that can be used: {error}") from error


def as_json(body: Any) -> bytes:
    """Compact JSON; numbers to six places, what is no number as null."""
    return json.dumps(plain_json.plain(body), ensure_ascii=False, separators=(",", ":")).encode()
