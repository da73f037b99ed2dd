"""Bearer tokens: who may ask a service for what, and at which sites.

tokens.yaml holds, by name, the SHA-256 of the token, its roles and its sites; never the token. A token is 256 random
bits, so that a plain hash of it cannot be searched. `create` shows it once.
"""

import fcntl
import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml
from pydantic import BaseModel, Field, ValidationError

from smearline.errors import TokenError, nearest

ROLES = ("recognise", "diagnose", "review", "approve")


class _Entry(BaseModel, frozen=True, extra="forbid"):
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    roles: tuple[str, ...]
    sites: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Holder:
    """Who stands behind a token."""

    name: str
    roles: frozenset[str]
    sites: frozenset[str] | None
    """None: every site."""

    def at(self, site: str) -> bool:
        return self.sites is None or site in self.sites


def create(path: Path, name: str, roles: Sequence[str], sites: Sequence[str] | None = None) -> str:
    """Add a token to the file (mode 600, made where there is none) and return it: it is not kept anywhere.

    Raises:
        TokenError: the name is taken, or a role is not known.
    """
    if unknown := sorted(set(roles) - set(ROLES)):
        raise TokenError(
            f"unknown role '{unknown[0]}'; known: {', '.join(ROLES)} (nearest: {nearest(unknown[0], ROLES)})"
        )
    if not name or not roles:
        raise TokenError(f"a token needs a name and at least one role of {', '.join(ROLES)}")
    token = f"smearline_{secrets.token_urlsafe(32)}"
    entry = _Entry(sha256=_digest(token), roles=tuple(roles), sites=None if sites is None else tuple(sites))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    guard = path.with_name(f".{path.name}.lock")
    with os.fdopen(os.open(guard, os.O_WRONLY | os.O_CREAT, 0o600), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _read(path) if path.exists() else {}
        if name in known:
            raise TokenError(f"{path} has a token called '{name}' already; take it out of the file to replace it")
        entries = {n: e.model_dump(mode="json") for n, e in {**known, name: entry}.items()}
        new = path.with_name(f".{path.name}.{os.getpid()}.new")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            yaml.safe_dump(entries, file, sort_keys=False, allow_unicode=True)
        new.replace(path)
    return token


def holder(path: Path, token: str) -> Holder:
    """Whose token it is; all entries are compared, each in constant time.

    Raises:
        TokenError: nobody's, or the file is missing or damaged.
    """
    if not path.is_file():
        raise TokenError(f"there is no {path}, so no token is valid; make one: smearline token NAME --roles ...")
    digest, found = _digest(token), None
    for name, entry in _known(path, path.stat().st_mtime_ns).items():
        if hmac.compare_digest(entry.sha256, digest):
            found = Holder(name, frozenset(entry.roles), None if entry.sites is None else frozenset(entry.sites))
    if found is None:
        raise TokenError("the token is not known")
    return found


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


@lru_cache(maxsize=4)
def _known(path: Path, _: int) -> dict[str, _Entry]:
    """The file's entries, read again when it was written again."""
    return _read(path)


def _read(path: Path) -> dict[str, _Entry]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return {str(name): _Entry.model_validate(entry) for name, entry in given.items()}
    except (ValidationError, yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise TokenError(f"{path} is no file of tokens: {error}") from error
