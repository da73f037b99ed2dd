"""What every flow shares: its frame, its end where nothing is new, and what it leaves on Prefect's page."""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.states import Cancelled, Completed, Failed, State

from flows.workspace import Busy, Workspace
from smearline.errors import SmearlineError

PAGES = "SMEARLINE_PAGES"
"""Where `flows serve` shows the workspace's pages over HTTP; without it a link names the file."""


def in_workspace(lock: str = "flow") -> Callable[[Callable[..., State[Any]]], Callable[..., State[Any]]]:
    """The frame: the workspace is the current folder, nobody else holds its lock, and a user's error is one message.

    The parameter `workspace` names the folder; the function gets it as an absolute path.
    """

    def decorate(function: Callable[..., State[Any]]) -> Callable[..., State[Any]]:
        @functools.wraps(function)
        def run(workspace: str = ".", *given: Any, **named: Any) -> State[Any]:
            try:
                space = Workspace(Path(workspace).resolve())
                with space.lock(function.__name__, lock), contextlib.chdir(space.folder):
                    return function(str(space.folder), *given, **named)
            except Busy as error:
                return Cancelled(message=str(error))
            except SmearlineError as error:
                return Failed(message=str(error))

        return run

    return decorate


def nothing_new(why: str) -> State[Any]:
    """The end of a flow that had nothing to do."""
    return Completed(name="NothingNew", message=why)


def table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    plain = [{name: "" if value is None else value for name, value in row.items()} for row in rows]
    create_table_artifact(table=plain, key=key, description=description)


def link(key: str, page: Path, words: str) -> None:
    """A link to a page, given relative to the workspace; nothing where the page was not made."""
    if page.is_file():
        base = os.environ.get(PAGES)
        address = f"{base}/{page.as_posix()}" if base else page.resolve().as_uri()
        create_link_artifact(link=address, link_text=f"{words} ({page})", key=key, description=words)
