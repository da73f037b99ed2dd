"""What the commands of `smearline` share: the app, the line of progress, and the way to what needs a checkout."""

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from smearline.errors import SmearlineError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="From blood-smear images to a recogniser that can be judged."
)


@contextmanager
def progress_line(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress line on a terminal; a line every ten seconds elsewhere."""
    live = sys.stderr.isatty()
    state = {"said": time.monotonic(), "any": False}

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        if now - state["said"] > (0.2 if live else 10) or (live and done == total):
            state.update(said=now, any=True)
            print(
                f"{chr(13) if live else ''}{what}: {done:,} of {total:,}",
                end="" if live else "\n",
                file=sys.stderr,
                flush=True,
            )

    yield show
    if live and state["any"]:
        print(file=sys.stderr)


def outside(module: str) -> Any:
    """A module of the checkout beside `smearline`: flows.trace, serving.cases. Raises SmearlineError where there is none."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # the command itself stands elsewhere
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SmearlineError(f"this needs a checkout of the product and its extras [flows,serve]: {error}") from error
