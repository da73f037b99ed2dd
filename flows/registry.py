"""Versions and stages of the package, as annotated git tags that `gto` makes and shows (`gto show`, `gto history`).

smearline@v2.0.0 names a candidate's commit; smearline#production#3 says that a version went, or came back, to production.
A tag's message holds the package's version and the head of the audit log.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import gto.api
import yaml

from flows import audit
from flows.workspace import STATE, FlowError, Workspace
from smearline import plain_json

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
    said: dict[str, str]
    """package, audit; of an assignment `what` it was"""


def tags(space: Workspace) -> list[Tag]:
    """The tags that the flows made."""
    form = "--format=%(refname:strip=2)%00%(*objectname)%00%(contents:body)%01"
    found = []
    for record in filter(None, space.git("for-each-ref", form, f"refs/tags/{ARTIFACT}*").split("\x01")):
        name, commit, body = record.strip("\n").split("\0")
        said = yaml.safe_load(body)
        if isinstance(said, dict) and {"package", "audit"} <= said.keys():
            found.append(Tag(name, commit, said))
    return found


def audit_problems(space: Workspace) -> list[str]:
    """What is wrong with the audit log, beside what git and the tags remember of it."""
    found = audit.problems(space.folder, [tag.said["audit"] for tag in tags(space)])
    if space.git("ls-tree", "HEAD", str(audit.LOG)):  # every line is committed with what it tells of
        log, committed = space.folder / audit.LOG, space.git("show", f"HEAD:{audit.LOG}")
        if not log.is_file() or not log.read_text("utf-8").startswith(committed):
            found.append("it is not what git holds of it: lines were changed or cut off")
    return found


def refuse_untrusted(space: Workspace) -> None:
    """Raises FlowError where the audit log has been tampered with: no act of a person may stand on it."""
    if problems := audit_problems(space):
        raise FlowError(
            f"{audit.LOG} cannot be trusted, so nothing is done: {'; '.join(problems)}. Compare it with git's"
        )


def versions(space: Workspace) -> list[Version]:
    """Every version, oldest first."""
    made = [tag for tag in tags(space) if tag.name.startswith(f"{ARTIFACT}@v")]
    found = [Version(tag.name.partition("@")[2], tag.commit, tag.said["package"]) for tag in made]
    return sorted(found, key=lambda version: _number(version.name))


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
    message = f"{ARTIFACT} {name}\n\npackage: '{package}'\naudit: '{audit_head}'\n"
    gto.api.register(str(space.folder), ARTIFACT, "HEAD", version=name, message=message)


def productions(space: Workspace) -> list[Version]:
    """The versions in production, the last one now. A version that came back by a rollback takes away those that came after it,
    so that a second rollback goes further back and not forth again."""
    by_commit = {v.commit: v for v in versions(space)}
    assigned = [t for t in tags(space) if t.name.startswith(f"{ARTIFACT}#{STAGE}#")]
    stack: list[Version] = []
    for tag in sorted(assigned, key=lambda t: int(t.name.rpartition("#")[2])):
        version = by_commit[tag.commit]  # gto assigns registered versions alone
        back = tag.said.get("what") != "promote"  # tags of before do not say what they are
        if back and version in stack:
            while stack.pop() != version:
                pass
        stack.append(version)
    return stack


def assign(space: Workspace, version: Version, what: str, who: str, audit_head: str) -> None:
    """Tag a version as the one in production. `what`: promote or rollback."""
    body = f"{what} {version.name}, {who}\n\npackage: '{version.package}'\naudit: '{audit_head}'\nwhat: {what}\n"
    gto.api.assign(str(space.folder), ARTIFACT, STAGE, version=version.name, message=body, force=True)


def fetched(space: Workspace, version: Version, out: str) -> Path:
    """`package` or `reference` of a version, fetched once by its commit from DVC's cache or remote.

    Raises:
        FlowError: DVC cannot find it, or it is not what was registered.
    """
    folder = space.folder / STATE / f"{out}s" / version.package
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # into a folder that is there, DVC would put another
        space.run("dvc", "get", "-q", "--force", ".", out, "--rev", version.commit, "-o", str(unfinished))
        card = unfinished / ("lineage.json" if out == "package" else f"{out}.json")
        about = plain_json.read(card)
        if about["version"] != version.package:
            raise FlowError(f"the {out} at {version.name} is of {about['version']}, {version.package} was registered")
        unfinished.replace(folder)
    return folder


def _number(name: str) -> tuple[int, ...]:
    parts = name.removeprefix(f"{ARTIFACT}@").removeprefix("v").split(".")
    if not all(p.isdigit() for p in parts):
        raise FlowError(f"'{name}' is no version; say it as v2.0.0 or v2")
    return tuple(int(p) for p in [*parts, "0", "0"][:3])
