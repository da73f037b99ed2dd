"""What stands behind an answer: package, commit, data version, parameters, gate, approvals, that day's verdict."""

from pathlib import Path
from typing import Any

from flows import audit, registry
from flows.workspace import Workspace
from serving.cases import CaseStore

MISSING = "missing"


def trace(workspace: Path, answer_id: str) -> dict[str, Any]:
    """All that is known of an answer; what is not known stands there as 'missing'.

    Raises:
        DataError: the case store has no such answer.
    """
    space = Workspace(workspace.resolve())
    answer = CaseStore(home=space.service).answer(answer_id)
    package, site, day = answer["version"], answer["site"], answer["day"]
    version = registry.of_package(space, package)
    acts = ("candidate", "approve", "promote", "rollback")
    told = {what: audit.entries(space.folder, what, package=package) for what in acts}
    made = told["candidate"][-1] if told["candidate"] else {}
    gates = audit.entries(space.folder, "gate", version=version.name) if version else []
    judged = [e for e in audit.entries(space.folder, "verdict", site=site) if e["first"] <= day <= e["day"]]
    verdict = min(reversed(judged), key=lambda e: e["day"], default=None)  # the last one of the nearest day
    return {
        "answer": answer_id,
        "received_at": answer["received_at"],
        "site": site,
        "case": answer["case_id"],
        "package": package,
        "version": version.name if version else MISSING,
        "commit": version.commit if version else MISSING,
        "code_and_parameters": {k: made.get(k, MISSING) for k in ("commit", "parameters_sha256", "origin")},
        "data": made.get("data", MISSING),
        "gate": [_told(e, "says", "champion", "gate_sha256") for e in gates] or MISSING,
        "approvals": [_told(e, "reason", "gate_sha256") for e in told["approve"]] or MISSING,
        "production": [_told(e, "what") for e in told["promote"] + told["rollback"]] or MISSING,
        "verdict_of_that_day": _told(verdict, "day", "verdict", "sentence", "page") if verdict else MISSING,
        "audit_log": registry.audit_problems(space) or "whole",
        "metrics": made.get("metrics", MISSING),
    }


def _told(entry: audit.Entry, *details: str) -> dict[str, Any]:
    return {name: entry.get(name) for name in ("time", "who", *details)}
