"""`python -m flows`: a flow at once, the acts of a person, and `serve`, which runs the flows at their times."""

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from smearline.errors import SmearlineError

SERVER = "http://127.0.0.1:4200/api"
"""Where `prefect server start` answers; PREFECT_API_URL names another place."""
REASON = ("--reason", {"required": True, "help": "kept in the audit log"})
COMMANDS: dict[str, tuple[str, str, tuple[tuple[str, dict[str, Any]], ...]]] = {
    "ingest": ("ingest", "signed-off cases, and new files in inbox/SITE, become a version of the data", ()),
    "retrain": ("retrain", "redo what changed, a task a stage; ends in a candidate", ()),
    "adapt": (
        "adapt",
        "a recogniser for a new site from a few labelled cells",
        (("cells", {}), ("out", {}), ("--budget", {"type": int, "default": 100})),
    ),
    "monitor": ("monitor", "a verdict for each site that was served", (("site", {"nargs": "?"}),)),
    "promote": ("promote", "the gate, and the switch where a person approved", (("version", {"nargs": "?"}),)),
    "approve": (
        "promote",
        "approve what passed the gate, as the holder of $SMEARLINE_TOKEN",
        (("version", {}), REASON),
    ),
    "rollback": ("production", "back to the version before, as the holder of $SMEARLINE_TOKEN", (REASON,)),
    "serve": (
        "serve",
        "run the flows at the times in prefect.yaml; needs prefect server start",
        (("--pages-port", {"type": int, "default": 4280, "help": "of the reports; 0: any"}),),
    ),
}
"""Command to (module, help, arguments)."""


def prepare(workspace: Path, needs_server: bool) -> None:
    """Prefect's settings, before it is imported. Where no server answers, a run brings its own."""
    import httpx

    home = workspace / ".smearline" / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1"}
    own = {"PREFECT_SERVER_EPHEMERAL_ENABLED": "true", "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90"}
    for name, value in {"PREFECT_HOME": str(home), **quiet, **own}.items():
        os.environ.setdefault(name, value)
    named = os.environ.pop("PREFECT_API_URL", None)
    try:
        httpx.get(f"{named or SERVER}/health", timeout=5).raise_for_status()
        os.environ["PREFECT_API_URL"] = named or SERVER
    except httpx.HTTPError:
        if needs_server:
            start = f"PREFECT_HOME={home} prefect server start"
            raise SmearlineError(f"no Prefect server answers at {named or SERVER}; start one: {start}") from None
        if named:
            print(f"the Prefect server at {named} does not answer; this run brings its own", file=sys.stderr)


def run(command: str, workspace: Path, **given: Any) -> int:
    """Do it and say how it ended. 0: done, also where nothing was new; 1: failed or refused; 3: cancelled."""
    if not (workspace / ".git").exists():
        raise SmearlineError(
            f"{workspace} is no workspace (a git clone with data of its own); name one: --workspace FOLDER"
        )
    prepare(workspace, needs_server=command == "serve")
    function = getattr(importlib.import_module(f"flows.{COMMANDS[command][0]}"), command)
    if command in ("approve", "serve"):
        function(workspace, **given)
        return 0
    state = function(str(workspace), **given, return_state=True)
    print(f"{state.name}: {state.message or 'done'}")
    return 0 if state.is_completed() else 3 if state.is_cancelled() else 1


def main() -> None:
    """Entry point: an error that is the user's is one message, without a trace."""
    parser = argparse.ArgumentParser(prog="python -m flows", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what, arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        for argument, options in arguments:
            command.add_argument(argument, **options)
        command.add_argument(
            "--workspace", type=lambda p: Path(p).resolve(), default=Path.cwd(), help="default: this folder"
        )
    try:
        raise SystemExit(run(**vars(parser.parse_args())))
    except SmearlineError as error:
        print(f"flows: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
