"""Flow promote: the gate, then a person's approval, then the switch. Also that approval.

gate/VERSION.json is the gate's result. An approval names its SHA-256, so it holds for that comparison and no other.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows import audit, gate, production, registry, smears
from flows.frame import in_workspace, nothing_new, table
from flows.registry import Version
from flows.workspace import FlowError, Workspace
from smearline import plain_json, settings


@flow(name="promote", log_prints=True)
@in_workspace()
def promote(workspace: str = ".", version: str | None = None) -> State[Any]:
    """Compare the newest candidate (or `version`) with the champion; switch to it where a person approved that."""
    space = Workspace(Path(workspace))
    registry.refuse_untrusted(space)
    production.repair(space)
    stack, known = registry.productions(space), registry.versions(space)
    if not known:
        raise FlowError("there is no candidate; run the flow retrain")
    champion = stack[-1] if stack else None
    challenger = registry.find(space, version) if version else known[-1]
    if challenger == champion:
        return nothing_new(f"{challenger.name} is in production")

    path, digest, result, new = compare(space, challenger, champion)
    against = champion.name if champion else "no champion"
    table("gate", result["checks"], f"{challenger.name} against {against}: {result['says']}")
    if not result["passed"]:
        if not new:
            return nothing_new(f"{challenger.name} was refused before: {result['says']}")
        return Failed(name="Refused", message=f"{challenger.name} is {result['says']}; {path.name} says why")
    approval = approved(space, challenger, digest)
    if approval is None:
        command = f"python -m flows approve {challenger.name} --workspace {space.folder} --reason '...'"
        says = f"{challenger.name} {result['says']}. Somebody whose token has the role approve types: {command}"
        return Completed(name="AwaitingApproval", message=says)
    told = {"gate_sha256": digest, "approved_by": approval["who"], "reason": approval["reason"]}
    with space.lock("promote", "production"):
        if (now := registry.productions(space)[-1:]) != stack[-1:]:
            raise FlowError(f"{now[0].name if now else 'nothing'} came into production meanwhile; run promote again")
        production.switch(space, challenger, "flow promote", "promote", **told)
    return Completed(message=f"{challenger.name} (package {challenger.package}) is in production")


@task(task_run_name="gate {challenger.name}", cache_policy=NO_CACHE)
def compare(space: Workspace, challenger: Version, champion: Version | None) -> tuple[Path, str, dict[str, Any], bool]:
    """Run the gate and keep its result: its file, its SHA-256, what it says, and whether it says anything new."""
    params = settings.load()
    if space.git("diff", "HEAD", "--name-only", "--", str(smears.FROZEN)):
        raise FlowError(
            f"{smears.FROZEN} is not what git holds of it, and what is frozen stays: git checkout {smears.FROZEN}"
        )
    if smears.FROZEN.exists() and not space.git("ls-files", "--", str(smears.FROZEN)):
        smears.FROZEN.unlink()  # left by a run that was cut off, or laid there by hand: it is made from the data
    space.refuse_unversioned(params.data.folder)
    data, cells = params.data.folder, smears.frozen(params.data.folder)
    space.commit("Smears frozen", smears.FROZEN)
    old, old_groups = smears.named(space, champion, data, cells) if champion else (None, None)
    new, new_groups = smears.named(space, challenger, data, cells)
    package = registry.fetched(space, challenger, "package")
    lineage = plain_json.read(package / "lineage.json")
    of_champion: dict[str, Any] = {"metrics": {}}
    if champion:
        of_champion = plain_json.read(registry.fetched(space, champion, "package") / "lineage.json")
    listed = package / "recogniser" / "trained_on.parquet"
    known = set(pq.read_schema(listed).names)  # older packages do not know the smear
    seen = pd.read_parquet(listed, columns=sorted({"sha256", "site", "patient", "smear"} & known))
    checks = [
        *gate.compare(cells, new, old, margin=params.gate.margin, seed=params.gate.seed),
        gate.seen_in_training(cells, seen),
        *gate.diagnosis(lineage, of_champion, params.gate.margin),
        *gate.diagnosed(smears.diagnoses(data, cells), new_groups, old_groups, params.gate.diagnosis_margin),
    ]
    result = gate.verdict(
        checks,
        challenger={"version": challenger.name, "package": challenger.package},
        champion={"version": champion.name, "package": champion.package} if champion else None,
        margin=params.gate.margin,
        smears={
            "sha256": smears.digest(cells),
            "cells": len(cells),
            "cells_without_a_label": pq.read_metadata(smears.FROZEN).num_rows - len(cells),
            "smears": int(cells["smear"].nunique()),
            "patients": int(cells["patient"].nunique()),
            "sites": sorted(set(cells["site"])),
        },
    )
    path = space.folder / "gate" / f"{challenger.name}.json"
    plain_json.write(path, result)
    digest = audit.digest(path.read_bytes())
    told = audit.entries(space.folder, "gate", version=challenger.name)
    fresh = not told or told[-1]["gate_sha256"] != digest
    if fresh:
        about = {"champion": champion.name if champion else None, "passed": result["passed"], "says": result["says"]}
        audit.append(space.folder, "flow promote", "gate", version=challenger.name, gate_sha256=digest, **about)
    space.commit(f"Gate: {challenger.name} {result['says']}", path, audit.LOG)
    return path, digest, result, fresh


def approve(workspace: Path, version: str, reason: str) -> None:
    """Approve a version whose gate passed, as the holder of $SMEARLINE_TOKEN.

    Raises:
        FlowError: there is no reason, or no gate that passed.
        TokenError: the token is nobody's, or its holder may not approve.
    """
    space = Workspace(workspace)
    registry.refuse_untrusted(space)
    who, found = production.approver(space), registry.find(space, version)
    path = space.folder / "gate" / f"{found.name}.json"
    told = audit.entries(space.folder, "gate", version=found.name)
    if not reason.strip():
        raise FlowError("an approval needs a reason: --reason 'what you looked at, and why it may serve'")
    if not told or not path.exists():
        raise FlowError(f"no gate has compared {found.name} yet; run: python -m flows promote")
    gate_sha256 = audit.digest(path.read_bytes())
    if told[-1]["gate_sha256"] != gate_sha256:
        raise FlowError(f"{path} is not what the gate wrote; run: python -m flows promote")
    stack = registry.productions(space)
    if stack[-1:] == [found]:
        raise FlowError(f"{found.name} is in production already")
    if told[-1]["champion"] != (stack[-1].name if stack else None):
        raise FlowError(
            f"the gate compared {found.name} with another version than serves now; run: python -m flows promote"
        )
    if not told[-1]["passed"]:
        raise FlowError(f"{found.name} was {told[-1]['says']}; a refused version cannot be approved")
    about = {"version": found.name, "package": found.package, "gate_sha256": gate_sha256}
    audit.append(space.folder, who, "approve", reason=reason, **about)
    space.commit(f"{who} approves {found.name}", audit.LOG)
    print(f"{who} approves {found.name}; next: python -m flows promote")


def approved(space: Workspace, version: Version, digest: str) -> audit.Entry | None:
    """The approval of this version by this gate; none where it was rolled back since."""
    found = None
    for entry in audit.entries(space.folder):
        if entry["what"] == "approve" and (entry["version"], entry["gate_sha256"]) == (version.name, digest):
            found = entry
        elif entry["what"] == "rollback" and entry["back_from"] == version.name:
            found = None
    return found
