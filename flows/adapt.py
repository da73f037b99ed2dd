"""Flow adapt: a recogniser for a new site from a few labelled cells of it (pipelines/adapt.py), its figures on Prefect's page.

It ends in a model folder that nobody serves: cells of the new site come to production by ingest, retrain and promote.
"""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed, State

from flows.frame import in_workspace, table
from flows.workspace import Workspace
from smearline import plain_json


@flow(name="adapt", log_prints=True)
@in_workspace()
def adapt(workspace: str, cells: str, out: str, model: str = "models/recogniser", budget: int = 100) -> State[Any]:
    """`cells`: a data set of the new site. Fails where chosen cells have no label; the message says where they are listed."""
    given = ["--model", model, "--cells", cells, "--out", out, "--budget", str(budget)]
    Workspace(Path(workspace)).run("smearline.cli", "adapt", *given)
    report = plain_json.read(Path(out) / "adaptation.json")
    rows: list[Any] = [
        {"where": where.replace("_", " "), "model": when, **(figures or {"cells": 0})}
        for where in ("new_site", "home_validation_cells")
        for when, figures in report[where].items()
    ]
    table("adaptation", rows, f"{out}: {report['labelled']} labelled cells of the new site")
    return Completed(message=f"{out}: {report['labelled']} labelled cells; {rows}")
