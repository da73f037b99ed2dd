"""The frame of every flow."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect.states import Cancelled, Completed, Failed, State

from flows.workspace import Busy, Workspace
from smearline.errors import SmearlineError


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
