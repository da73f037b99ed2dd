"""Every error a user can cause. A message says what was given, what is accepted and what to do next."""

import difflib
from collections.abc import Iterable


class SmearlineError(Exception):
    """Base of every error that is the input's or the user's, not the program's."""


class SettingsError(SmearlineError):
    """Params.yaml has an unknown key or a value out of range."""


class VocabularyError(SmearlineError):
    """A class, characteristic or diagnosis that the vocabulary does not map."""


class SiteError(SmearlineError):
    """A site without a file, or a file that the data contradict."""


class ImportSourceError(SmearlineError):
    """A source, table or folder that cannot be imported."""


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
    """Cells, labels or splits that cannot serve what was asked."""


class ModelError(SmearlineError):
    """A model folder that is missing, damaged or of another contract."""


class TokenError(SmearlineError):
    """A bearer token that is unknown, or may not do what was asked."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The three known names nearest to `word`, as text for an error message."""
    names = {k.casefold(): k for k in known}
    close = difflib.get_close_matches(word.casefold(), list(names), n=3, cutoff=0.4)
    found = [names[c] for c in close] or sorted(names.values())[:3]
    return ", ".join(repr(f) for f in found)
