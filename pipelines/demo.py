"""`make demo`: the whole line on simulated laboratories, from image files to an answer over HTTP and a drift report."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

from pipelines import rehearsal
from pipelines.workspace import Workspace

SITES = ("sim_north", "sim_south")
PATIENTS, CELLS = 40, 60
SERVED = 10
"""Smears a site that are sent to the service; those of sim_north come with another batch of stain."""


def main() -> None:
    started = time.monotonic()
    space = Workspace.prepare("demo", "demo")
    raw = space.folder / "raw"
    if not (raw / "complete").exists():
        space.smearline(
            "simulate", "raw", "--sites", ",".join(SITES), "--patients", str(PATIENTS), "--cells", str(CELLS)
        )
        (raw / "complete").touch()
    for site in SITES:
        space.smearline("import", "folder", f"raw/{site}", "--site", site, "--into", "data")
    space.version_data()
    seconds = space.reproduce()
    space.run(sys.executable, "-m", "flows", "retrain")  # all is up to date: it registers the candidate
    watch(space)
    space.report(seconds, time.monotonic() - started)
    _say_more(space)


def watch(space: Workspace) -> None:
    """Smears sent to the service over HTTP, and what the monitor flow says of them."""
    folders = {
        "sim_north": rehearsal.new_smears(
            space, "another_stain", "sim_north", 8, SERVED, CELLS, 14, rehearsal.ANOTHER_STAIN
        ),
        "sim_south": rehearsal.new_smears(space, "usual", "sim_south", 9, SERVED, CELLS, 14, {}),
    }
    with rehearsal.service(space) as (url, token):
        for site, folder in folders.items():
            command = ("serving.send", str(folder), "--site", site, "--url", url)
            space.run(sys.executable, "-m", *command, SMEARLINE_TOKEN=token)
    space.run(sys.executable, "-m", "flows", "monitor")


def _say_more(space: Workspace) -> None:
    where = os.path.relpath(space.folder, Path.cwd())
    print("drift reports (each opens without a network):")
    for path in sorted((space.folder / "watch").glob("*/*/verdict.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        print(f"  {os.path.relpath(path.parent, Path.cwd())}/index.html\n    {found['verdict']}: {found['sentence']}")
    said = (space.folder / rehearsal.SERVICE_LOG).read_text(encoding="utf-8")
    lines = re.sub(r"http://127\.0\.0\.1:\d+", "http://127.0.0.1:3000", said[said.index("one cell:") :])
    print(f"three lines that work in {where} once `make serve` runs:\n{lines.strip()}")
    print(f"""Prefect's page (runs, artifacts, schedules):        make flows WORKSPACE={where}     http://127.0.0.1:4200
Evidently's page (the sites' history):              make drift-ui WORKSPACE={where}  http://127.0.0.1:8000
a model goes to production by the gate and a person: cd {where} && python -m flows promote
the loop once around, with another stain:           make loop""")


if __name__ == "__main__":
    main()
