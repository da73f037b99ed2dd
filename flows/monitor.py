"""Flow monitor: a verdict for every site that was served, from the inference log, against the reference of the version in
production."""

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.states import Completed, Failed, State

from flows import audit, registry
from flows.frame import in_workspace, link, nothing_new, table
from flows.workspace import STATE, Workspace
from monitoring import watch
from serving.cases import CaseStore
from smearline import plain_json
from smearline.errors import SmearlineError

DAYS = 7


@flow(name="monitor", log_prints=True)
@in_workspace()
def monitor(workspace: str = ".", site: str | None = None) -> State[Any]:
    """Judge each site, or one; emit smearline.verdict.WORD of each. A bad verdict is a result, and no failure."""
    space = Workspace(Path(workspace))
    store, in_production = CaseStore(home=space.service), registry.productions(space)
    store.export_log()
    sites = [site] if site else sorted(p.name for p in (store.home / "log").glob("*") if p.is_dir())
    reference = registry.fetched(space, in_production[-1], "reference") if in_production else Path("reference")
    told: list[dict[str, str]] = []
    looked_at: dict[Path, str] = {}
    failed: list[str] = []
    for name in sites:
        try:
            told += judge(space, store, name, reference, looked_at)
        except SmearlineError as error:
            failed.append(f"{name}: {error}")
    if told:
        space.commit("Verdicts", audit.LOG)
    for one in told:  # at the end: what an automation starts must find the workspace free
        about = {"prefect.resource.id": f"smearline.site.{one['site']}"}
        emit_event(f"smearline.verdict.{one['verdict'].replace(' ', '-')}", about, payload=one)
    for state, now in looked_at.items():  # last: killed before, the verdict is made, and told, again
        state.write_text(now)
    if failed:
        return Failed(message="\n".join(failed))
    if not told:
        return nothing_new("nothing was served, and nothing reviewed, since the last verdicts")
    return Completed(message="\n".join(f"{one['site']}: {one['sentence']}" for one in told))


@task(task_run_name="judge {site}", cache_policy=NO_CACHE)
def judge(
    space: Workspace, store: CaseStore, site: str, reference: Path, looked_at: dict[Path, str]
) -> list[dict[str, str]]:
    """The verdict of a site's last days: its pages, an artifact, a line in the audit log. Empty: nothing is new.

    Args:
        looked_at: takes what is to be written, and where, once the verdict has been told.
    """
    today = datetime.now(UTC).date().isoformat()  # a scanner whose clock runs ahead must not hide the days that come
    files = sorted(p for p in (store.home / "log" / site).glob("*.parquet") if p.stem <= today)
    first = (date.fromisoformat(files[-1].stem) - timedelta(days=DAYS - 1)).isoformat() if files else ""
    files = [p for p in files if p.stem >= first]
    cases = {case for p in files for case in pd.read_parquet(p, columns=["case_id"])["case_id"]}
    if files and not cases:
        return []  # no picture that came could be recognised
    signed = [case for case in store.signed_off(not_ingested=False) if case.case_id in cases]
    card = reference / "reference.json"
    version = plain_json.read(card)["version"] if card.is_file() else None
    # Of the version that is judged; and of what it named, since what it left unidentified it did not get wrong.
    theirs = [[cell for cell in case.cells if cell.named and version in (None, cell.version)] for case in signed]
    cells = [cell for of_case in theirs for cell in of_case]
    reviews = {"cases_reviewed": sum(map(bool, theirs)), "cells_reviewed": len(cells)}
    reviews |= {"cells_overridden": sum(cell.overridden for cell in cells)}
    state = STATE / f"watched-{site}"
    now = json.dumps([str(reference), reviews, [(p.name, p.stat().st_mtime_ns) for p in files]])
    if state.exists() and state.read_text() == now:
        return []
    witnesses = {"reviewers": reviews, "analyser": store.counts(cases)}
    last = files[-1].stem if files else None
    log, out = store.home / "log", Path("watch")
    found = watch.judge(log, site, reference, out, day=last, days=DAYS, witnesses=witnesses)
    print(found.sentence)
    page, key = out / site / found.day / "index.html", f"verdict-{site.replace('_', '-')}"
    rows: list[Any] = [{"witness": n, "status": w.status, "says": w.says} for n, w in found.witnesses.items()]
    rows += [{"family": n, "status": f.status, "size": f.size, "limit": f.limit} for n, f in found.families.items()]
    text = f"**{found.verdict}** · {site} · {found.day}\n\n{found.sentence}"
    create_markdown_artifact(text, key, f"Verdict of {site}")
    table(f"{key}-findings", rows, f"What moved at {site}, and what the witnesses say")
    link(f"{key}-page", page, f"Report of {site}, {found.day}")
    told = {"site": site, "day": found.day, "first": found.window["first"], "version": found.version}
    told |= {"verdict": found.verdict, "sentence": found.sentence, "page": str(page)}
    digest = audit.digest(page.with_name("verdict.json").read_bytes())
    audit.append(space.folder, "flow monitor", "verdict", **told, verdict_sha256=digest)
    looked_at[state] = now
    return [told]
