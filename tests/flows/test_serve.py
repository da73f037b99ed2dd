"""The times stand in prefect.yaml alone, one run at a time; and only reports are shown over HTTP."""

import functools
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from conftest import CHECKOUT, put

from flows import serve


def test_every_deployment_runs_alone_at_the_time_in_prefect_yaml():
    found = {d.name: d for d in serve.deployments(CHECKOUT)}
    assert set(found) == {"ingest", "retrain", "monitor", "promote"}
    for deployment in found.values():
        assert deployment.concurrency_limit == 1
        assert deployment.concurrency_options.collision_strategy == "CANCEL_NEW"
        assert deployment.parameters["workspace"] == str(CHECKOUT)
        assert deployment.schedules[0].schedule.cron.endswith("* * *")
    assert found["retrain"].triggers[0].expect == {"smearline.verdict.hold", "smearline.verdict.stop"}


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[str]:
    put(tmp_path / "watch/lab/2026-03-02/index.html", "a report")
    put(tmp_path / "watch/secret", "x")
    (tmp_path / "watch/link.html").symlink_to(put(tmp_path / "data/cells.parquet", "patients"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(serve.Pages, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_reports_are_shown_and_nothing_else_of_the_workspace(pages: str):
    assert httpx.get(f"{pages}/watch/lab/2026-03-02/index.html").text == "a report"
    for path in (
        "/",
        "/watch/",
        "/data/cells.parquet",
        "/watch/../data/cells.parquet",
        "/watch/link.html",
        "/audit.jsonl",
    ):
        assert httpx.get(f"{pages}{path}").status_code == 404, path
