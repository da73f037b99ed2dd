"""Label codes (types and parents) as indices, and what a label lets one say about a prediction.

Legend of shapes: N cells, K types (columns of a confusion), R codes = types and parents (its rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from smearline.vocabulary import load

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Codes:
    """The vocabulary's codes in reading order: each parent stands behind the last of its children."""

    types: tuple[str, ...]
    codes: tuple[str, ...]
    parents: tuple[str, ...]
    member_RK: Bools
    """True where code r stands for type k: a prediction k is right for a cell labelled r."""
    tolerated_RK: Bools
    """True where k is right for r, or a neighbour of it. A parent tolerates only a neighbour of *all* its children."""
    within_RR: Bools
    """[r, q] True where a cell labelled q certainly is an r (q = r, or q a child of the parent r)."""
    decidable_RR: Bools
    """[r, q] False where a cell labelled q may or may not be an r: q is a parent of r."""

    def index(self, code: str) -> int:
        return self.codes.index(code)


@cache
def codes() -> Codes:
    """The codes of this installation's vocabulary."""
    vocabulary = load()
    order: list[str] = []
    for code in vocabulary.types:
        order.append(code)
        order += [p for p, children in vocabulary.parents.items() if set(children) <= set(order) and p not in order]
    types = tuple(vocabulary.types)
    sets = [set(vocabulary.children(c)) for c in order]
    tolerant = [set.intersection(*({t, *vocabulary.types[t].neighbours} for t in s)) | s for s in sets]
    return Codes(
        types=types,
        codes=tuple(order),
        parents=tuple(c for c in order if c in vocabulary.parents),
        member_RK=np.array([[t in s for t in types] for s in sets]),
        tolerated_RK=np.array([[t in s for t in types] for s in tolerant]),
        within_RR=np.array([[q <= r for q in sets] for r in sets]),
        decidable_RR=np.array([[not r < q for q in sets] for r in sets]),
    )
