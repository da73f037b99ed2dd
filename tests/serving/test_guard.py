"""What stands before every request, where a running service would take half a minute to show it."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request

from serving import api, http
from smearline import tokens
from smearline.errors import ImportSourceError


def test_an_upload_that_stalls_is_ended_and_gives_its_place_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "STALLED_SECONDS", 0.05)
    monkeypatch.setitem(http.LIMITS, "requests_at_once_of_a_holder", 1)
    token = tokens.create(tmp_path / "tokens.yaml", "scanner", ["recognise"])
    app = FastAPI()
    app.state.desk = SimpleNamespace(store=SimpleNamespace(home=tmp_path))
    app.add_middleware(http.Guard)
    http.answer_errors(app)

    @app.post("/v1/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    def ask(*chunks: bytes, whole: bool) -> tuple[int, dict | int]:
        """The status and the body of the answer to these chunks, after which nothing comes."""
        waiting, sent = list(chunks), []

        async def receive():
            if not waiting:
                await asyncio.sleep(60)
            chunk = waiting.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(waiting) or not whole}

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", f"Bearer {token}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/echo", "headers": headers, "query_string": b""}
        asyncio.run(asyncio.wait_for(app(scope, receive, send), 10))
        return sent[0]["status"], json.loads(sent[1]["body"])

    status, said = ask(b"half a", whole=False)
    assert status == 408 and said["detail"] == "nothing came for 0.05 s"
    assert ask(b"a ", b"whole one", whole=True) == (200, 11)


def test_other_requests_do_not_wait_for_a_blood_count(monkeypatch: pytest.MonkeyPatch):
    def whose(*_):
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        raise ImportSourceError("read in a thread")

    monkeypatch.setattr(api, "_whose", whose)
    monkeypatch.setattr(api, "_site_of", lambda *_: None)
    desk = SimpleNamespace(reader=SimpleNamespace(origin=lambda *_: "real"), store=None)
    request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(desk=desk)), state=SimpleNamespace(holder=None))
    with pytest.raises(ImportSourceError, match="read in a thread"):
        asyncio.run(api._answer(request, "diagnose", None, http.Parts({}, [b""], b"", "")))
