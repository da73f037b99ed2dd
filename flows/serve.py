"""`python -m flows serve`: every deployment of the workspace's prefect.yaml at its times, and the workspace's pages."""

import functools
import importlib
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import prefect
import yaml
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron

from flows.frame import PAGES

SHOWN = ("evaluation", "watch")


def deployments(workspace: Path) -> Iterator[RunnerDeployment]:
    """What prefect.yaml names, each with the workspace as its parameter."""
    for given in yaml.safe_load((workspace / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]:
        path, _, function = given["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function)
        times = [
            Cron(s["cron"], timezone=s.get("timezone"), active=s.get("active", True))
            for s in given.get("schedules", [])
        ]
        yield flow.to_deployment(
            given["name"],
            description=given.get("description"),
            schedules=times,
            concurrency_limit=ConcurrencyLimitConfig(**given["concurrency_limit"]),
            triggers=given.get("triggers"),
            parameters={**given.get("parameters", {}), "workspace": str(workspace)},
        )


class Pages(SimpleHTTPRequestHandler):
    """The reports of a workspace, and nothing else of it."""

    def translate_path(self, path: str) -> str:
        found = Path(super().translate_path(path)).resolve()
        allowed = any(found.is_relative_to(Path(self.directory, name).resolve()) for name in SHOWN)
        return str(found if allowed and found.is_file() else Path(self.directory, "not found"))

    def log_message(self, *_: Any) -> None:
        pass


def serve(workspace: Path, pages_port: int) -> None:
    """Run until stopped."""
    pages = ThreadingHTTPServer(("127.0.0.1", pages_port), functools.partial(Pages, directory=str(workspace)))
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    os.environ[PAGES] = f"http://127.0.0.1:{pages.server_port}"  # the runs are children of this process
    prefect.serve(*deployments(workspace), pause_on_shutdown=False)
