"""`python -m flows`: a flow at once, the acts of a person, and `serve`, which runs the flows at their times."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from smearline.errors import SmearlineError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Folder = Annotated[Path, typer.Option("--workspace", help="The workspace: a git clone with data of its own.")]
Reason = Annotated[str, typer.Option("--reason", help="Kept in the audit log.")]
HERE = Path()


SERVER = "http://127.0.0.1:4200/api"
"""Where `prefect server start` answers; PREFECT_API_URL names another place."""


def _prepare(workspace: Path, needs_server: bool = False) -> Path:
    """Prefect's settings, before it is imported. Where no server answers, a run brings its own."""
    if not (workspace / ".git").exists():
        raise SmearlineError(
            f"{workspace.resolve()} is no workspace (a git clone with data of its own); name one: --workspace FOLDER"
        )
    home = (workspace / ".smearline" / "prefect").resolve()
    home.mkdir(parents=True, exist_ok=True)
    wanted = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    named = os.environ.pop("PREFECT_API_URL", None)
    if _answers(url := named or SERVER):
        os.environ["PREFECT_API_URL"] = url
    elif needs_server:
        raise SmearlineError(f"no Prefect server answers at {url}; start one: PREFECT_HOME={home} prefect server start")
    elif named:
        print(f"the Prefect server at {named} does not answer; this run brings its own", file=sys.stderr)
    return workspace.resolve()


def _answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


def _end(state: Any) -> None:
    """Say how the flow ended. The exit code is 0 where it completed (also with nothing new), 3 where it was cancelled."""
    print(f"{state.name}: {state.message or 'done'}")
    raise typer.Exit(0 if state.is_completed() else 3 if state.is_cancelled() else 1)


@app.command()
def ingest(workspace: Folder = HERE) -> None:
    """Signed-off cases, and new files in inbox/SITE, into the data set: a version of the data."""
    folder = _prepare(workspace)
    from flows.ingest import ingest

    _end(ingest(str(folder), return_state=True))


@app.command()
def retrain(workspace: Folder = HERE) -> None:
    """Redo what changed, a task a stage; ends in a candidate."""
    folder = _prepare(workspace)
    from flows.retrain import retrain

    _end(retrain(str(folder), return_state=True))


@app.command()
def monitor(site: Annotated[str | None, typer.Argument()] = None, workspace: Folder = HERE) -> None:
    """A verdict for each site that was served, or for SITE; reports in watch/."""
    folder = _prepare(workspace)
    from flows.monitor import monitor

    _end(monitor(str(folder), site, return_state=True))


@app.command()
def promote(version: Annotated[str | None, typer.Argument()] = None, workspace: Folder = HERE) -> None:
    """The gate, and the switch where a person approved; of the newest candidate, or of VERSION."""
    folder = _prepare(workspace)
    from flows.promote import promote

    _end(promote(str(folder), version, return_state=True))


@app.command()
def approve(version: str, reason: Reason, workspace: Folder = HERE) -> None:
    """Approve a version whose gate passed, as the holder of $SMEARLINE_TOKEN; then promote switches to it."""
    folder = _prepare(workspace)
    from flows.promote import approve
    from flows.workspace import Workspace

    print(f"approved {version} as {approve(Workspace(folder), version, reason)}; next: python -m flows promote")


@app.command()
def rollback(reason: Reason, workspace: Folder = HERE) -> None:
    """Back to the version that was in production before, as the holder of $SMEARLINE_TOKEN."""
    folder = _prepare(workspace)
    from flows.production import rollback

    _end(rollback(str(folder), reason, return_state=True))


@app.command()
def trace(answer_id: str, workspace: Folder = HERE, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """What stands behind an answer: model, commit, data version, gate, approvals, that day's verdict."""
    import json

    from flows.trace import shown, trace

    found = trace(workspace, answer_id)
    print(json.dumps(found, indent=1) if as_json else shown(found))


@app.command()
def serve(workspace: Folder = HERE, pages_port: Annotated[int, typer.Option(help="0: any")] = 4280) -> None:
    """Run the flows at the times in prefect.yaml; needs a Prefect server (prefect server start)."""
    folder = _prepare(workspace, needs_server=True)
    from flows.serve import serve

    serve(folder, pages_port)


def main() -> None:
    """Entry point: an error that is the user's is one message, without a trace."""
    try:
        app()
    except SmearlineError as error:
        print(f"flows: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
