"""Every error a user can cause, in one tree.

SmearlineError
├── SettingsError      params.yaml has an unknown key or a value out of range
├── VocabularyError    a class, characteristic or diagnosis that the vocabulary does not map
├── SiteError          a site without a file, or a file that the data contradict
├── ImportSourceError  a source, table or folder that cannot be imported
├── ImageError         an image that cannot be used; `.reason` is its quarantine reason
├── DataError          cells, labels or splits that cannot serve what was asked
├── ModelError         a model folder that is missing, damaged or of another contract
└── TokenError         a bearer token that is unknown, or may not do what was asked

A message says what was given, what is accepted and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SmearlineError(Exception):
    """Base of every error that is the input's or the user's, not the program's."""


class SettingsError(SmearlineError):
    pass


class VocabularyError(SmearlineError):
    pass


class SiteError(SmearlineError):
    pass


class ImportSourceError(SmearlineError):
    pass


class ImageError(SmearlineError):
    """An image that cannot be used.

    Args:
        reason: short, stable code for the quarantine table, such as ``truncated``.
        detail: what exactly was found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class DataError(SmearlineError):
    pass


class ModelError(SmearlineError):
    pass


class TokenError(SmearlineError):
    pass


def nearest(word: str, known: Iterable[str]) -> str:
    """The three known names nearest to `word`, as text for an error message."""
    names = {k.casefold(): k for k in known}
    close = difflib.get_close_matches(word.casefold(), list(names), n=3, cutoff=0.4)
    found = [names[c] for c in close] or sorted(names.values())[:3]
    return ", ".join(repr(f) for f in found)
