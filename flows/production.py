"""What is served: the switch to a version, and back."""

import os
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, State

from flows import audit, registry
from flows.frame import in_workspace
from flows.registry import Version
from flows.workspace import STATE, FlowError, Workspace
from smearline import tokens
from smearline.errors import TokenError

POINTER = STATE / "production"


@flow(name="rollback", log_prints=True)
@in_workspace("production")
def rollback(workspace: str = ".", reason: str = "") -> State[Any]:
    """Back to the version that was in production before, from the bento store: neither DVC nor a network is needed."""
    space = Workspace(Path(workspace))
    who, stack = approver(space), registry.productions(space)
    registry.refuse_untrusted(space)
    if repair(space):
        return Completed(
            message=f"the switch to {stack[-1].name}, which had been cut off, is finished; nothing more was done"
        )
    if not reason.strip():
        raise FlowError("a rollback needs a reason: --reason 'what went wrong'")
    if len(stack) < 2:
        raise FlowError(f"no version was in production before {stack[0].name if stack else 'this one'}")
    now, before = stack[-1], stack[-2]
    if not _bento(space, before).exists():
        raise FlowError(
            f"{before.name} has no bento in {_bento(space, before).parents[1]}; build it: python -m serving.bento"
        )
    switch(space, before, who, "rollback", back_from=now.name, reason=reason)
    text = f"**{now.name}** went back to **{before.name}**, by {who}: {reason}"
    create_markdown_artifact(text, "rollback", "Rollback")
    return Completed(message=f"{before.name} (package {before.package}) is in production again, in place of {now.name}")


def switch(space: Workspace, version: Version, who: str, what: str, **told: Any) -> None:
    """Serve a version: its bento, a line in the audit log, gto's tag, and last the pointer that the service reads."""
    if not _bento(space, version).exists():
        store = _bento(space, version).parents[3]
        space.run("serving.bento", "--package", str(registry.fetched(space, version, "package")), "--store", str(store))
    head = audit.append(space.folder, who, what, version=version.name, package=version.package, **told)
    space.commit(f"Production: {version.name} ({what})", audit.LOG)
    registry.assign(space, version, what, who, head)
    _point(space, version)


def repair(space: Workspace) -> bool:
    """Finish a switch that was cut off between its tag and its pointer; whether there was one."""
    stack, pointer = registry.productions(space), space.folder / POINTER
    if stack and (not pointer.exists() or pointer.read_text().strip() != stack[-1].package):
        _point(space, stack[-1])
        return True
    return False


def approver(space: Workspace) -> str:
    """Who holds $SMEARLINE_TOKEN. Raises TokenError where nobody does, or may not approve."""
    if not (token := os.environ.get("SMEARLINE_TOKEN")):
        raise TokenError("this is a person's act: put a token with the role approve into SMEARLINE_TOKEN")
    holder = tokens.holder(space.service / "tokens.yaml", token)
    if "approve" not in holder.roles:
        raise TokenError(f"'{holder.name}' may {', '.join(sorted(holder.roles))}, but not approve")
    if holder.sites is not None:
        raise TokenError(
            f"'{holder.name}' may act for {', '.join(sorted(holder.sites))} alone; what is served is every site's"
        )
    return holder.name


def _point(space: Workspace, version: Version) -> None:
    path = space.folder / POINTER
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(version.package + "\n", encoding="utf-8")
    unfinished.replace(path)


def _bento(space: Workspace, version: Version) -> Path:
    home = os.environ.get("BENTOML_HOME") or space.folder / STATE / "bentoml"
    return Path(home) / "bentos" / "smearline" / version.package / "bento.yaml"
