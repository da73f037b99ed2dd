"""The two folders of an import: the one that is read, each file once, and the one that is written, by one run at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smearline.errors import ImportSourceError


def listing(root: Path) -> tuple[list[str], list[str]]:
    """(files, folders that cannot be listed) below `root`, relative and sorted; links are followed, each folder once."""
    unreadable: list[str] = []
    seen: set[str] = set()
    files: list[str] = []

    def missed(error: OSError) -> None:
        unreadable.append(os.path.relpath(error.filename, root))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=missed):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        links = {name for name in folders if Path(folder, name).is_symlink()}
        folders.sort(key=lambda name: (name in links, name))
        here = Path(folder).relative_to(root)
        files += [(here / name).as_posix() for name in names]
    return sorted(files), sorted(unreadable)


@contextmanager
def only_one(into: Path) -> Iterator[None]:
    """The data set's lock; what a killed import left half written is removed under it."""
    with locked(into, into / "local" / ".lock"):
        yield


@contextmanager
def locked(folder: Path, lock: Path) -> Iterator[None]:
    """A folder's lock, which goes with its process; what a killed one left half written in it is removed. Raises
    ImportSourceError where another holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ImportSourceError(
                f"another command is writing into {folder}; wait for it and run this one again"
            ) from None
        for left in folder.rglob(".*.unfinished"):
            left.unlink(missing_ok=True)
        yield
