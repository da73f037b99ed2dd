"""What stands in for a laboratory in the demo and in the loop: new smears of a simulated site, and a running service."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from flows.workspace import Workspace, environment
from serving.run import answers

ANOTHER_STAIN: dict[str, Any] = {
    "white_point": [240, 220, 225],
    "eosin": {"absorbs": [0.10, 1.00, 0.35], "strength": 2.0},
    "azure": {"absorbs": [0.80, 1.00, 0.40], "strength": 0.5},
    "complex": {"absorbs": [0.40, 1.00, 0.35], "strength": 0.6},
}
"""sim_north after its buffer turned acid: eosin too strong, nuclei pale and reddish, and another lamp. Made to cost: the
recogniser of the demo named 0.752 of 960 such cells as they were drawn, and 0.925 with the usual stain."""


def new_smears(
    space: Workspace,
    name: str,
    site: str,
    seed: int,
    smears: int,
    cells: int,
    days_later: int,
    change: dict[str, Any] | None = None,
) -> Path:
    """Draw smears of new patients of a simulated site, `days_later` days after its first ones, its simulation changed by
    `change`. Returns the folder, laid out as the source 'folder'; one that is there stays as it is."""
    folder = space.folder / "raw" / name
    made, sites = folder / "out" / site, folder / "sites"
    if (folder / "complete").exists():
        return made
    sites.mkdir(parents=True, exist_ok=True)
    file = yaml.safe_load((space.folder / "sites" / f"{site}.yaml").read_text(encoding="utf-8"))
    file["simulation"] |= {"prefix": name[:2].upper(), **(change or {})}
    (sites / f"{site}.yaml").write_text(yaml.safe_dump(file), encoding="utf-8")
    numbers = ("--seed", str(seed), "--patients", str(smears), "--cells", str(cells))
    command = ("simulate", str(folder / "out"), "--sites", site, *numbers)
    space.call("smearline.cli", *command, SMEARLINE_SITES=str(sites))
    labels = pd.read_csv(made / "labels.csv", dtype=str, keep_default_na=False)
    moved = pd.to_datetime(labels["acquired_at"]) + pd.Timedelta(days=days_later)
    labels.assign(acquired_at=[t.isoformat() for t in moved]).to_csv(made / "labels.csv", index=False)
    (folder / "complete").touch()
    return made


SERVICE_LOG = Path(".smearline/service.log")


@contextmanager
def service(space: Workspace) -> Iterator[tuple[str, str]]:
    """The workspace's service on a free port, as `make serve` starts it: its URL and a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", space.folder / SERVICE_LOG
    log.parent.mkdir(exist_ok=True)
    log.touch(mode=0o600)  # the first start prints a token
    command = [sys.executable, "-m", "serving.run", "--workspace", str(space.folder), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=space.folder, env=environment(), stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 900  # the first start makes the service's environment
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the service did not start; see {log}")
            time.sleep(0.5)
        yield url, (space.folder / ".smearline" / "service" / "token").read_text(encoding="utf-8").strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
