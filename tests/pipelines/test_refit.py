"""The head for the types, fitted anew on frozen features."""

import numpy as np
import pandas as pd
import pytest
import torch

from pipelines import new_site, refit, training
from smearline import recogniser


def _head(
    features: np.ndarray, labels: np.ndarray, new: np.ndarray, new_allowed: np.ndarray, strength: float
) -> torch.nn.Linear:
    network = recogniser.Recogniser("efficientnet_lite0", ("BASO", "EOS", "LYMPH"), {}, 8, 64)
    network.type_head = torch.nn.Linear(features.shape[1], 3)
    home = refit.Cells(features, np.eye(3, dtype=bool)[labels], np.ones(len(features)))
    refit.fit_head(network, home, refit.Cells(new, new_allowed, np.ones(len(new))), strength)
    return network.type_head


@pytest.mark.mission("the head that a few labels fit anew is the softmax regression that it is said to be")
def test_the_head_is_the_softmax_regression_of_the_labels_on_the_features():
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(3)
    labels, theirs = random.integers(0, 3, 300), random.integers(0, 3, 30)
    spread = np.array([5, 3, 2, 1, 0.5, 0.1])
    centres = random.normal(0, 1, (3, 6)) * spread
    features, new = (
        (centres[t] + random.normal(0, 1, (len(t), 6)) * spread + 4).astype(np.float32) for t in (labels, theirs)
    )
    head = _head(features, labels, new, np.eye(3, dtype=bool)[theirs], 20.0)
    values, axes = np.linalg.eigh(np.cov(features.T, bias=True))
    turn = axes / values**0.25
    turn *= 10 / np.sqrt((((features - features.mean(0)) @ turn) ** 2).sum(axis=1).mean())
    x = (np.concatenate([features, new]) - features.mean(0)) @ turn
    weight = np.concatenate([np.full(300, 0.5 / 300), np.full(30, 0.5 / 30)])
    expected = LogisticRegression(C=20.0, tol=1e-8, max_iter=5000).fit(x, [*labels, *theirs], sample_weight=weight)
    with torch.inference_mode():
        found = torch.softmax(head(torch.from_numpy(np.concatenate([features, new]))), 1).numpy()
    np.testing.assert_allclose(found, expected.predict_proba(x), atol=2e-3)


def test_a_label_of_a_parent_teaches_the_head_what_it_says_and_no_more():
    random = np.random.default_rng(4)
    labels = np.repeat([0, 1, 2], 100)
    features = (np.eye(3, 6)[labels] * 6 + random.normal(0, 1, (300, 6))).astype(np.float32)
    new = (np.eye(6)[[3] * 40] * 6 + random.normal(0, 1, (40, 6))).astype(np.float32)  # unlike all of home
    either = np.tile([True, True, False], (40, 1))
    first, none = np.tile([True, False, False], (40, 1)), np.zeros_like(either)
    told, single, untold = (
        torch.softmax(_head(features, labels, new, allowed, 20.0)(torch.from_numpy(new)), 1).detach().numpy()
        for allowed in (either, first, none)
    )
    assert told[:, 2].max() < 0.2 < untold[:, 2].mean(), "it is neither said to be the third"
    assert told[:, 1].mean() > 3 * single[:, 1].mean(), "nor which of the two it is"


@pytest.mark.mission("a new site's labels teach a head that site, and it keeps what it knew of home")
def test_a_head_learns_the_new_site_and_keeps_home():
    """There the first two types look more like their neighbours at home than like themselves; one direction tells the sites."""
    random = np.random.default_rng(5)

    def cells(num: int, new: bool) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(0, 2 if new else 3, num)
        looks = np.eye(3)[labels] * (2 if new else 6) + np.eye(4, 3)[labels + 1] * (4 if new else 0)
        centre = np.concatenate([looks, np.full((num, 1), 15.0 * new)], axis=1)
        return (centre + random.normal(0, 1, (num, 4))).astype(np.float32), labels

    home, there = cells(600, False), cells(60, True)
    judged = [cells(2000, False), cells(2000, True)]

    def right(labelled: np.ndarray) -> list[float]:
        allowed = np.eye(3, dtype=bool)[there[1]] & labelled
        head = _head(*home, there[0], allowed, 20.0)
        with torch.inference_mode():
            said = [head(torch.from_numpy(x)).argmax(1).numpy() for x, _ in judged]
        return [float((s == labels).mean()) for s, (_, labels) in zip(said, judged, strict=True)]

    before, after = right(np.zeros((60, 1), bool)), right(np.ones((60, 1), bool))
    assert before[0] > 0.98 and before[1] < 0.3, "unlabelled, it takes each for its neighbour"
    assert after[1] > 0.9 and after[0] > before[0] - 0.01


def test_what_a_head_was_taught_is_not_said_where_parents_hide_it():
    taught = pd.DataFrame({"true_type": ["BASO", "EOS", "NEUT"], "weight": [3.0, 1.0, 0.1]})
    np.testing.assert_allclose(new_site.mix_taught(taught, ("BASO", "EOS")), [0.75, 0.25])
    assert new_site.mix_taught(taught.assign(weight=[3.0, 1.0, 1.0]), ("BASO", "EOS")) is None


def test_freed_pages_are_kept_only_where_glibc_is_known_to_take_it(monkeypatch: pytest.MonkeyPatch):
    for said, kept in (("glibc 2.36", True), ("glibc 2.100", True), ("glibc 2.31", False), ("", False)):
        monkeypatch.setattr(training.os, "confstr", lambda _, said=said: said)
        assert bool(training.kept_pages()) == kept
