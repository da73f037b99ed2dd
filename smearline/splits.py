"""Who is trained on and who is tested: by patient, never across a near duplicate.

A group is all that must stay together: the cells of a patient (or of a smear, or one cell, where no patient is known;
a cell that names none goes with its smear's), joined with the groups of their near duplicates. Its place is a hash of
the seed and of its smallest patient (else smear, else cell), so that a group keeps its place when other data are
added, near duplicates without a patient too. A near duplicate between two patients makes them one group, which takes
the place of the smaller: then the other's cells may move.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from smearline import dataset, duplicates
from smearline.errors import DataError


def assign(
    frame: pd.DataFrame,
    *,
    seed: int,
    val: float,
    test: float,
    fold: int = 0,
    train_sites: Sequence[str] = (),
    test_only_sites: Sequence[str] = (),
    near_duplicate_correlation: float = duplicates.MIN_CORRELATION,
    kept: Path | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> pd.DataFrame:
    """Columns sha256, split ('train', 'val', 'test'), group and near_duplicate (whether it has one), in the order of `frame`.

    Args:
        frame: sha256, site, patient, smear, thumbnail; a row an image.
        val, test: expected shares of the groups.
        fold: with a test share of 1 / K, each group that touches no held-out site is tested in one of the folds 0 to K - 1.
        train_sites: if not empty, every other site is test alone.
        test_only_sites: sites that are test alone.
        kept: where the near duplicates that are found are kept for the next time.
        progress: called with (images compared, images to compare).

    Raises:
        DataError: a site named is not in the data, or nothing is left to train on.
    """
    sites = set(frame["site"])
    if unknown := {*train_sites, *test_only_sites} - sites:
        raise DataError(
            f"split names the sites {sorted(unknown)}, which are not in the data; there are {sorted(sites)}"
        )
    group, near = grouped(frame, near_duplicate_correlation, kept, progress)
    place = (places(group, seed) - fold * test) % 1
    split = pd.Series(np.select([place < test, place < test + val], ["test", "val"], "train"), frame.index)
    held_out = frame["site"].isin(test_only_sites) | (bool(train_sites) & ~frame["site"].isin(train_sites))
    # A group with a member at a held-out site is tested as a whole.
    split[held_out.groupby(group).transform("any")] = "test"
    if not (split == "train").any():
        raise DataError(
            f"no image is left to train on; sites: {sorted(sites)}, held out: {sorted(frame['site'][held_out].unique())}"
        )
    has_near = np.zeros(len(frame), bool)
    has_near[near.ravel()] = True
    return pd.DataFrame({"sha256": frame["sha256"], "split": split, "group": group, "near_duplicate": has_near})


def grouped(
    frame: pd.DataFrame,
    near_duplicate_correlation: float,
    kept: Path | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> tuple[pd.Series, np.ndarray]:
    """The group of each image, and the pairs (P x 2, places in `frame`) of near duplicates; arguments as `assign`."""
    keys = dataset.whose(frame)
    codes, _ = pd.factorize(keys)
    near = duplicates.kept_pairs(kept, frame["sha256"], frame["thumbnail"], near_duplicate_correlation, progress)
    component = duplicates.groups(codes.max() + 1, codes[near])[codes]
    rank = np.select([dataset.patients(frame).notna(), frame["smear"].notna()], ["0", "1"], "2")
    return (rank + keys).groupby(component).transform("min").str[1:], near


def places(group: pd.Series, seed: int) -> pd.Series:
    """A number in 0..1 for each image, the same for all images of a group."""
    digests = {g: hashlib.sha256(f"{seed}/{g}".encode()).digest() for g in group.unique()}
    return group.map({g: int.from_bytes(digest[:7], "big") / 2**56 for g, digest in digests.items()})
