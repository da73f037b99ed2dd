"""Versions and stages of the package, as annotated git tags that `gto` makes and shows (`gto show`, `gto history`).

smearline@v2.0.0 names a candidate's commit; smearline#production#3 says that a version went, or came back, to production.
A tag's message holds the package's version and the head of the audit log.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from flows.workspace import STATE, FlowError, Workspace

ARTIFACT, STAGE = "smearline", "production"


@dataclass(frozen=True)
class Version:
    name: str
    """v2.0.0"""
    commit: str
    package: str
    """The version of the package: what the service answers with."""


@dataclass(frozen=True)
class Tag:
    name: str
    commit: str
    time: str
    said: dict[str, str]
    """package, audit"""


def tags(space: Workspace) -> list[Tag]:
    """All annotated tags of the package."""
    form = "%(refname:strip=2)%00%(*objectname)%00%(creatordate:iso-strict)%00%(contents:body)%01"
    found = []
    for record in space.git("for-each-ref", f"--format={form}", "refs/tags").split("\x01"):
        name, commit, time, body = [*record.strip("\n").split("\0"), "", "", ""][:4]
        if name.startswith((f"{ARTIFACT}@", f"{ARTIFACT}#")) and commit:
            said = yaml.safe_load(body)
            found.append(Tag(name, commit, time, said if isinstance(said, dict) else {}))
    return found


def versions(space: Workspace) -> list[Version]:
    """Every version, oldest first."""
    found = [
        Version(t.name.partition("@")[2], t.commit, str(t.said.get("package", "")))
        for t in tags(space)
        if t.name.startswith(f"{ARTIFACT}@v")
    ]
    return sorted(found, key=lambda v: _number(v.name))


def find(space: Workspace, name: str) -> Version:
    """The version called 'v2.0.0', 'v2' or '2'. Raises FlowError where there is none."""
    known = versions(space)
    for version in known:
        if _number(version.name) == _number(name):
            return version
    names = ", ".join(v.name for v in known) or "none: run the flow retrain"
    raise FlowError(f"there is no version '{name}'; registered are {names}")


def of_package(space: Workspace, package: str) -> Version | None:
    return next((v for v in versions(space) if v.package == package), None)


def next_name(space: Workspace) -> str:
    return f"v{_number(versions(space)[-1].name)[0] + 1 if versions(space) else 1}.0.0"


def register(space: Workspace, name: str, package: str, audit_head: str) -> None:
    """Tag HEAD as a version."""
    from gto import api

    message = f"{ARTIFACT} {name}\n\npackage: '{package}'\naudit: '{audit_head}'\n"
    api.register(str(space.folder), ARTIFACT, "HEAD", version=name, message=message)


def productions(space: Workspace) -> list[Version]:
    """The versions in production, the last one now. A version that came back takes away those that came after it, so
    that a second rollback goes further back and not forth again."""
    by_commit = {v.commit: v for v in versions(space)}
    assigned = [t for t in tags(space) if t.name.startswith(f"{ARTIFACT}#{STAGE}#")]
    stack: list[Version] = []
    for tag in sorted(assigned, key=lambda t: int(t.name.rpartition("#")[2])):
        version = by_commit[tag.commit]
        stack = [*(stack[: stack.index(version)] if version in stack else stack), version]
    return stack


def assign(space: Workspace, version: Version, message: str, audit_head: str) -> str:
    """Tag a version as the one in production. Returns the tag."""
    from gto import api

    body = f"{message}\n\npackage: '{version.package}'\naudit: '{audit_head}'\n"
    event = api.assign(str(space.folder), ARTIFACT, STAGE, version=version.name, message=body, force=True)
    return str(event.tag)


def fetched(space: Workspace, version: Version, out: str) -> Path:
    """`package` or `reference` of a version, fetched once by its commit from DVC's cache or remote.

    Raises:
        FlowError: DVC cannot find it, or it is not what was registered.
    """
    folder = space.folder / STATE / f"{out}s" / version.package
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        space.run("dvc", "get", "-q", "--force", ".", out, "--rev", version.commit, "-o", str(unfinished))
        about = json.loads(
            (unfinished / {"package": "lineage.json"}.get(out, f"{out}.json")).read_text(encoding="utf-8")
        )
        if about["version"] != version.package:
            raise FlowError(f"the {out} at {version.name} is of {about['version']}, {version.package} was registered")
        unfinished.replace(folder)
    return folder


def _number(name: str) -> tuple[int, ...]:
    parts = name.removeprefix(f"{ARTIFACT}@").removeprefix("v").split(".")
    if not all(p.isdigit() for p in parts):
        raise FlowError(f"'{name}' is no version; say it as v2.0.0 or v2")
    return tuple(int(p) for p in [*parts, "0", "0"][:3])
