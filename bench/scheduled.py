"""Do scheduled runs fire by themselves, and is a second run cancelled?     python -m bench.scheduled [WORKSPACE]

A clone of a workspace (.work/demo), its case store beside it; Prefect's server on a free port with a home of its own; and
`python -m flows serve` with the flow monitor set to every minute in the clone's prefect.yaml. Nobody starts the run that is
waited for. Then two runs are asked for at once, and an event of the kind that monitor emits, which prefect.yaml's automation
answers with a run of retrain.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.results import write
from flows.workspace import environment

PRODUCT = Path(__file__).resolve().parents[1]
PATIENCE = 300


def clone(workspace: Path, to: Path) -> None:
    """The workspace with its data and its case store, and the flow monitor every minute."""
    subprocess.run(["git", "clone", "-q", str(workspace), str(to)], check=True)
    for name, value in (("user.name", "scheduled"), ("user.email", "scheduled@localhost")):
        subprocess.run(["git", "config", name, value], cwd=to, check=True)
    shutil.copy(workspace / ".dvc" / "config.local", to / ".dvc" / "config.local")
    subprocess.run([sys.executable, "-m", "dvc", "pull", "-q"], cwd=to, env=environment(), check=True)
    if (workspace / ".smearline" / "service").exists():
        shutil.copytree(workspace / ".smearline" / "service", to / ".smearline" / "service")
    file = to / "prefect.yaml"
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    for deployment in given["deployments"]:
        deployment["schedules"] = [{"cron": "* * * * *"}] if deployment["name"] == "monitor" else []
    file.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    subprocess.run(["git", "commit", "-qam", "monitor every minute"], cwd=to, check=True)


@contextmanager
def running(command: list[str], folder: Path, env: dict[str, str], log: Path) -> Iterator[None]:
    """A process with its children, ended with its group."""
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def until(what: str, found: Callable[[], Any]) -> Any:
    """The first true answer; a server on SQLite is now and then too busy to give one. Raises SystemExit where none comes."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if answer := found():
                return answer
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise SystemExit(f"{what}: not within {PATIENCE} s")


class Server:
    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=20)

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json=body).raise_for_status().json()

    def deployments(self) -> dict[str, str]:
        return {d["name"]: d["id"] for d in self.post("/deployments/filter")}

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """Those that have ended, oldest first."""
        over = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"]}}}
        of = {"deployment_id": {"any_": [self.deployments()[deployment]]}}
        return list(self.post("/flow_runs/filter", sort="START_TIME_ASC", flow_runs={**of, **over}))


def told(run: dict[str, Any]) -> dict[str, Any]:
    """What the server says of a run."""
    late = None
    if run["start_time"] and run["expected_start_time"]:
        moments = [datetime.fromisoformat(run[k]) for k in ("expected_start_time", "start_time")]
        late = round((moments[1] - moments[0]).total_seconds(), 1)
    return {
        "state": run["state"]["name"],
        "type": run["state"]["type"],
        "message": run["state"]["message"],
        "auto_scheduled": run["auto_scheduled"],
        "created_by": (run["created_by"] or {}).get("type"),
        "expected_start_time": run["expected_start_time"],
        "seconds_after_its_time": late,
        "seconds": round(run["total_run_time"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace", type=Path, nargs="?", default=PRODUCT / ".work" / "demo")
    parser.add_argument("--then", help="a command run before all is stopped; $PREFECT_API_URL names the server")
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, found = f"http://127.0.0.1:{port}/api", dict[str, Any](prefect=version("prefect"))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        here, space = Path(folder), Path(folder) / "workspace"
        clone(given.workspace.resolve(), space)
        started = time.monotonic()
        env = {
            **environment(),
            "PREFECT_HOME": str(here / "prefect"),
            "PREFECT_API_URL": url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PYTHONPATH": str(PRODUCT),
        }
        (here / "prefect").mkdir()
        prefect = [sys.executable, "-m", "prefect"]
        server, logs = Server(url), [here / "server.log", here / "serve.log"]
        command = [*prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        stack.enter_context(running(command, here, env, logs[0]))
        until("the server answers", lambda: server.client.get("/health").is_success)
        found["server_seconds"] = round(time.monotonic() - started, 1)
        command = [sys.executable, "-m", "flows", "serve", "--workspace", str(space), "--pages-port", "0"]
        stack.enter_context(running(command, space, env, logs[1]))
        try:
            until("the deployments are known", lambda: len(server.deployments()) >= 4)
            print("waiting for a run that nobody starts", flush=True)
            found["scheduled"] = [told(r) for r in until("a scheduled run ends", lambda: server.runs("monitor"))]
            assert all(r["auto_scheduled"] and r["type"] == "COMPLETED" for r in found["scheduled"]), found

            print("asking for two runs at once", flush=True)
            path = f"/deployments/{server.deployments()['monitor']}/create_flow_run"
            asked = [until("it is asked for", lambda: server.post(path))["id"] for _ in range(2)]
            both = until(
                "both end",
                lambda: [r for r in server.runs("monitor") if r["id"] in asked][1:] and server.runs("monitor"),
            )
            found["two_at_once"] = [told(r) for r in both if r["id"] in asked]
            assert sorted(r["type"] for r in found["two_at_once"]) == ["CANCELLED", "COMPLETED"], found

            print("emitting the event of a verdict", flush=True)
            event = [*prefect, "event", "emit", "smearline.verdict.hold", "--resource-id", "smearline.site.sim_north"]
            subprocess.run(event, env=env, check=True)
            found["retrain_after_hold"] = told(until("the automation's run ends", lambda: server.runs("retrain"))[0])
            if given.then:
                subprocess.run(given.then, shell=True, env={**env, "WORKSPACE": str(space)}, check=True)
        except BaseException:
            for log in logs:
                print(f"== {log.name}\n{log.read_text(errors='replace')[-6000:]}")
            raise
        found["total_seconds"] = round(time.monotonic() - started, 1)
    write("scheduled", found)


if __name__ == "__main__":
    main()
