"""Evidently's report of a window against its reference, on the table of smears.

Every column has its method and its threshold: the distance and the calibrated threshold of monitoring.drift, so that
Evidently's tests and our verdict say the same (its defaults change with the number of rows, and call a data set when half
of its columns are). A page of its own, and a run a day in the workspace that `evidently ui --workspace .smearline/evidently` shows.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from monitoring.smears import describe, families
from monitoring.verdict import Verdict

_LEAST_NORM = 0.001
"""Evidently divides by the reference's standard deviation, or by this where that is smaller."""


def write(verdict: Verdict, window: pd.DataFrame, reference: pd.DataFrame, history: Path) -> None:
    """evidently.html beside the verdict, and the run in `history`, in place of an earlier one of the same site and day."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # is read when evidently is imported
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import RowCount, ValueDrift
    from evidently.sdk.models import PanelMetric
    from evidently.sdk.panels import line_plot_panel
    from evidently.ui.workspace import Workspace

    features = [f for found in verdict.families.values() for f in found.features]
    names = [f.name for f in features]
    spread = {name: max(float(reference[name].std(ddof=0)), _LEAST_NORM) for name in names}
    limits = {f.name: f.threshold / describe(f.name).factor / spread[f.name] for f in features}
    drifts = [ValueDrift(column=name, method="wasserstein", threshold=limits[name]) for name in names]
    definition = DataDefinition(numerical_columns=names)
    tables = (t[names].astype(float).reset_index(drop=True) for t in (window, reference))
    name, about = f"{verdict.site} {verdict.day}", {"verdict": verdict.verdict, "sentence": verdict.sentence}
    run = Report([RowCount(), *drifts], include_tests=True).run(
        *(Dataset.from_pandas(table, definition) for table in tables),
        timestamp=datetime.fromisoformat(verdict.day).replace(tzinfo=UTC),
        metadata=about | {"reference": str(verdict.reference["site"])},
        tags=[verdict.verdict],
        name=name,
    )
    run.save_html(str(verdict.path / "evidently.html"))
    history.mkdir(parents=True, exist_ok=True)
    workspace = Workspace.create(str(history))
    found = workspace.search_project(verdict.site)
    project = found[0] if found else workspace.create_project(verdict.site, "Smears by day. Research use only.")
    if not found:
        for family, columns in families().items():
            lines = [
                PanelMetric(legend=describe(c).words, metric="ValueDrift", metric_labels={"column": c}) for c in columns
            ]
            project.dashboard.add_panel(line_plot_panel(f"{family.capitalize()}: distance from the reference", lines))
        project.save()
    for path in (history / str(project.id) / "snapshots").glob("*.json"):
        if json.loads(path.read_text(encoding="utf-8")).get("name") == name:
            workspace.delete_run(project.id, path.stem)
    workspace.add_run(project.id, run)
