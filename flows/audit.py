"""The audit log of a workspace, audit.jsonl: who did what and when, each line bound to the one before it.

A line is JSON with `time` (UTC), `who`, `what`, the details, and `previous`, the SHA-256 of the line before. The head, the
SHA-256 of the last line, stands in every tag that the flows make: so a log that was cut short shows too.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOG = Path("audit.jsonl")
START = "0" * 64
Entry = dict[str, Any]


def append(folder: Path, who: str, what: str, **details: Any) -> str:
    """Write a line, safe on the disk when this returns. Returns the new head."""
    with (folder / LOG).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole, newline, torn = file.read().rpartition(b"\n")
        if torn and _whole(torn):  # an editor took its newline
            file.write(b"\n")
            whole, newline = whole + newline + torn, b"\n"
        elif torn:  # the writer was killed and nobody was told that this line stands
            file.truncate(len(whole) + len(newline))
        previous = digest(whole.rsplit(b"\n", 1)[-1]) if newline else START
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"time": now, "who": who, "what": what, **details, "previous": previous}
        line = json.dumps(entry, sort_keys=True, ensure_ascii=False).encode()
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return digest(line)


def entries(folder: Path, what: str | None = None, **details: Any) -> list[Entry]:
    """The lines, oldest first; those of one kind, with these details."""
    wanted = {**details, **({"what": what} if what else {})}
    found = [json.loads(line) for line in _lines(folder)]
    return [e for e in found if all(e.get(name) == value for name, value in wanted.items())]


def head(folder: Path) -> str:
    """SHA-256 of the last line; zeros for a log that has none."""
    return [START, *map(digest, _lines(folder))][-1]


def problems(folder: Path, heads: Iterable[str] = ()) -> list[str]:
    """What is wrong with the log, in words; empty where it is whole.

    Args:
        heads: heads that were written down elsewhere (in tags); each must be in the chain.
    """
    found, chain = [], [START]
    for number, line in enumerate(_lines(folder), 1):
        try:
            previous = json.loads(line)["previous"]
        except (ValueError, KeyError, TypeError):
            previous = None
        if previous != chain[-1]:
            found.append(
                f"line {number} does not follow the line before it: one of them was changed, removed or put in"
            )
        chain.append(digest(line))
    if lost := sorted(set(heads) - set(chain)):
        found.append(
            f"{len(lost)} heads that stand in tags are not in the log: lines were changed or cut off at its end"
        )
    return found


def _lines(folder: Path) -> list[bytes]:
    """The lines, without one at the end that was cut off in the writing."""
    path = folder / LOG
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return lines if _whole(lines[-1]) else lines[:-1]


def _whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def digest(content: bytes | str) -> str:
    """SHA-256 in hex; of a text, of its UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
