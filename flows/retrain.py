"""Flow retrain: DVC's graph, a Prefect task a stage; it ends in a candidate, which nobody serves until it is promoted."""

import json
import time
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows import audit, registry
from flows.frame import in_workspace, link, nothing_new, table
from flows.workspace import STATE, FlowError, Workspace
from smearline import curves, plain_json, settings

LINEAGE = Path("package/lineage.json")
RUN_FILE = STATE / "run.json"
"""Seconds of each stage, when it last ran here."""


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def reproduce(space: Workspace, stage: str) -> State[Any]:
    """One stage as DVC does it, its output in the log. The state's name says whether it ran."""
    started = time.monotonic()
    try:
        said = space.run("dvc", "repro", "--single-item", stage)
    except FlowError as error:
        return Failed(message=str(error))
    if any(line.startswith(f"Running stage '{stage}'") for line in said):
        return Completed(name="Ran", message=f"{time.monotonic() - started:.0f} s")
    cached = any(line.startswith(f"Stage '{stage}' is cached") for line in said)
    return Completed(name="FromRunCache" if cached else "UpToDate", message=next(iter(said), None))


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10)
def push(space: Workspace) -> None:
    """Everything that the workspace's pointers name goes to its DVC remote."""
    with Repo(str(space.folder)) as repo:
        has_remote = bool(repo.config["core"].get("remote"))
    if has_remote:
        space.run("dvc", "push", "-q", variables=space.listed_anew())
    else:
        print("not pushed: the workspace has no DVC remote (dvc remote add --local -d NAME URL)")


@flow(name="retrain", log_prints=True)
@in_workspace()
def retrain(workspace: str = ".") -> State[Any]:
    """Redo what changed, push it, and register the package as a candidate."""
    space = Workspace(Path(workspace))
    space.refuse_unversioned(settings.load().data.folder)
    with Repo(workspace) as repo:
        graph = repo.index.graph
        stages = {s.addressing: s for s in sorted(graph, key=lambda s: s.addressing) if s.cmd}
        needs = {name: [d.addressing for d in graph.successors(s) if d.cmd] for name, s in stages.items()}
        outs = [out for s in stages.values() for out in s.outs]
    kept_in_git = [Path(out.fspath) for out in outs if not out.use_cache]
    made = [space.folder / "dvc.lock", space.folder / audit.LOG, *kept_in_git]
    changed = space.status()
    _refuse_uncommitted(space, made)
    curves.read(space.folder / curves.FOLDER)  # what the page could not show is said before anything is trained
    made += sorted({Path(out.fspath).parent / ".gitignore" for out in outs})
    if not changed and (known := registry.of_package(space, _lineage(space)["version"])):
        return nothing_new(f"data, code and parameters are those of {known.name}, package {known.package}")

    runs: dict[str, State[Any]] = {}
    for name in TopologicalSorter(needs).static_order():
        runs[name] = reproduce(space, name, wait_for=[runs[n] for n in needs[name]], return_state=True)
    rows = [{"stage": name, "state": state.name, "says": state.message} for name, state in runs.items()]
    table("retrain-stages", rows, "The stages of this run")
    file = space.folder / RUN_FILE
    seconds = plain_json.read(file)["seconds"] if file.exists() else {}
    seconds |= {name: float(str(state.message).split()[0]) for name, state in runs.items() if state.name == "Ran"}
    plain_json.write(file, {"seconds": seconds})
    if failed := [f"{name}: {state.message}" for name, state in runs.items() if state.is_failed()]:
        raise FlowError("\n".join(failed))  # those that waited for it were never started
    push(space)
    lineage = _lineage(space)
    if known := registry.of_package(space, lineage["version"]):
        space.commit(f"A run of the pipeline: the package of {known.name}", *made)
        return nothing_new(f"the package is that of {known.name} again ({known.package})")
    return _candidate(space, lineage, made)


def _candidate(space: Workspace, lineage: dict[str, Any], made: list[Path]) -> State[Any]:
    """Commit what the run made, and register it."""
    name, package = registry.next_name(space), lineage["version"]
    if not audit.entries(space.folder, "candidate", version=name, package=package):  # else: killed before it was tagged
        told = {key: lineage.get(key) for key in ("commit", "data", "metrics", "origin")}
        parameters = audit.digest(json.dumps(lineage["parameters"], sort_keys=True))
        told |= {"version": name, "package": package, "parameters_sha256": parameters}
        audit.append(space.folder, "flow retrain", "candidate", **told)
    space.commit(f"Candidate {name}, package {package}", *made)
    registry.register(space, name, package, audit.head(space.folder))
    stack = registry.productions(space)
    champion = audit.entries(space.folder, "candidate", version=stack[-1].name) if stack else []
    new, old = lineage["metrics"], champion[-1]["metrics"] if champion else {}
    rows = [{"metric": m, "candidate": new.get(m), "champion": old.get(m)} for m in sorted({*new, *old})]
    table("retrain-metrics", rows, f"{name} beside the version in production, each on its own test cells")
    link("retrain-evaluation", Path("evaluation/evaluation.html"), f"Evaluation of {name}")
    return Completed(message=f"candidate {name}, package {package}; next: python -m flows promote")


def _lineage(space: Workspace) -> dict[str, Any]:
    path = space.folder / LINEAGE
    if not path.is_file():
        raise FlowError(f"the pipeline left no {LINEAGE}; a candidate is the package of the stage 'package'")
    return plain_json.read(path)


def _refuse_uncommitted(space: Workspace, made: list[Path]) -> None:
    """A candidate's commit must say what made it."""
    files = space.git("diff", "HEAD", "--name-only").splitlines()
    new = space.git("-c", "core.quotePath=false", "ls-files", "--others", "--exclude-standard").splitlines()
    files += [f for f in new if f.endswith((".py", ".yaml")) or f.startswith("curves/")]  # a stage may read them
    if dirty := [f for f in files if space.folder / f not in made and not f.endswith(".gitignore")]:
        raise FlowError(
            f"uncommitted changes in {', '.join(dirty)}: commit them, so that the candidate says what made it"
        )
