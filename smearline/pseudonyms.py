"""Patients and smears are known by keyed pseudonyms from the moment of import."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from smearline.errors import SiteError
from smearline.sites import Site

# For identifiers that their owners published as pseudonyms: no secret is needed, and a fixed key keeps the
# pseudonyms, and so the splits by patient, the same on every machine.
_PUBLIC_KEY = b"smearline: identifiers that are public already"


def key(site: Site) -> bytes:
    """The site's HMAC key. A private one lies in $SMEARLINE_KEY_FILE or ~/.smearline/pseudonym.key, never in a repository, and is
    made on first use (32 random bytes, mode 600).

    Raises:
        SiteError: the key file exists but is too short to protect anyone.
    """
    if site.identifiers == "public":
        return _PUBLIC_KEY
    path = Path(os.environ.get("SMEARLINE_KEY_FILE") or Path.home() / ".smearline" / "pseudonym.key")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode())
        print(
            f"a new pseudonym key was made in {path}: keep it safe; without it the same patient gets another pseudonym"
        )
    found = path.read_bytes().strip()
    if len(found) < 32:
        raise SiteError(
            f"{path} holds {len(found)} bytes; a pseudonym key has at least 32. Remove it to have one made."
        )
    return found


def pseudonym(secret: bytes, site: str, kind: str, identifier: str) -> str:
    """16 hex digits for one identifier: HMAC-SHA256 over site, kind ('patient', 'smear', 'file') and identifier."""
    message = "\0".join((site, kind, identifier)).encode()
    return hmac.new(secret, message, hashlib.sha256).hexdigest()[:16]
