"""Limits learned on validation cells keep what they promise on cells of the same kind, and say so where they cannot."""

import json

import numpy as np
import pytest

from smearline import confidence

T, E = 4, 8


def drawn(num: int, seed: int, sharp: float = 1.0, away: float = 0.0):
    """Cells whose probabilities are right, raised to a power (an over-sure model), and embeddings about their type's centre."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3.5, (num, T))
    true_NT = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    kind = (true_NT.cumsum(axis=1) > random.random((num, 1))).argmax(axis=1)
    said = true_NT**sharp / (true_NT**sharp).sum(axis=1, keepdims=True)
    embedding = np.eye(T, E)[kind] * 10 + random.normal(0, 1, (num, E)) + away
    return said.astype(np.float32), np.eye(T, dtype=bool)[kind], embedding.astype(np.float32), kind


def fitted(num: int = 2000, sharp: float = 1.0, **given) -> confidence.Confidence:
    said, allowed, embedding, kind = drawn(num, 1, sharp)
    made = confidence.fit(
        said,
        allowed,
        kind,
        ["a"] * num,
        embedding,
        embedding,
        kind,
        **{"coverage": 0.9, "max_error": 0.1, "typical": 0.99, **given},
    )
    assert made is not None
    return confidence.Confidence.model_validate(json.loads(json.dumps(made.model_dump(mode="json"))))


@pytest.mark.mission("sets of types hold the right one as often as was said, type by type")
def test_sets_cover_each_type_on_new_cells_of_the_same_kind():
    made = fitted()
    said, _, embedding, kind = drawn(4000, 2)
    _, sets, _, _ = made.judge(said, embedding, ["a"] * len(said))
    for t in range(T):
        held = sets[kind == t, t].mean()
        assert 0.87 < held < 0.94, (t, held)
    assert 1 < sets.sum(axis=1).mean() < T, "a set of everything would hold it too"


@pytest.mark.mission("and site by site, where one is answered less surely than the other")
def test_sets_cover_each_type_at_each_site():
    said, allowed, embedding, kind = drawn(6000, 11)
    site = np.where(np.arange(6000) < 5000, "large", "small")
    shy = said**0.4 * np.array([0.2, 1, 1, 1])  # there type 0 looks little like itself, which no temperature mends
    said = np.where(site[:, None] == "small", shy / shy.sum(axis=1, keepdims=True), said).astype(np.float32)
    fit, new = np.arange(6000) % 2 == 0, np.arange(6000) % 2 == 1
    made = confidence.fit(
        said[fit], allowed[fit], kind[fit], list(site[fit]), embedding[fit], embedding, kind,
        coverage=0.9, max_error=0.1, typical=0.99,
    )  # fmt: skip
    assert made is not None and made.limits["small"][0] < made.limits["*"][0] < made.limits["large"][0] * 1.1
    here = new & (site == "small")
    sets = made.judge(said[here], embedding[here], list(site[here]))[1]
    by_all = made.model_copy(update={"limits": {"*": made.limits["*"]}})
    before = by_all.judge(said[here], embedding[here], list(site[here]))[1]
    own = kind[here] == 0
    assert before[own, 0].mean() < 0.8 < 0.84 < sets[own, 0].mean() < 0.96
    assert sets.any(axis=1).all()


def test_a_type_is_never_ruled_out_from_a_probability_on():
    made, said = fitted(), np.float32([[0.3, 0.1, 0.31, 0.29], [0.1, 0.3, 0.3, 0.3]])
    assert min(made.limits["a"][0], made.limits["*"][0]) < 0.9
    strict = made.never_ruled_out(0, 2.0)
    assert strict.limits == made.limits, "a limit is lowered, not raised"
    one = made.model_copy(update={"limits": {"*": (0.9,) * T}, "temperatures": {}}).never_ruled_out(0, 0.3)
    sets = one.judge(said, np.zeros((2, E), np.float32), ["a", "b"])[1]
    assert sets[0].tolist() == [True, False, True, False] and not sets[1, 0]


@pytest.mark.mission("an over-sure model is calibrated, by the site's own labels or by those of all")
def test_temperatures_mend_a_model_that_is_too_sure():
    made = fitted(sharp=2.5)
    assert made.temperatures[confidence.ELSEWHERE] == made.temperatures["a"], "one site has all the labels here"
    said, _, embedding, kind = drawn(4000, 3, sharp=2.5)
    assert made.temperatures["a"] == pytest.approx(2.5, rel=0.15)
    gap = {}
    for site in ("a", "elsewhere"):
        calibrated, *_ = made.judge(said, embedding, [site] * len(said))
        np.testing.assert_allclose(calibrated.sum(axis=1), 1, atol=1e-5)
        assert (calibrated.argmax(axis=1) == said.argmax(axis=1)).all()
        gap[site] = abs(calibrated.max(axis=1).mean() - (calibrated.argmax(axis=1) == kind).mean())
    untouched = abs(said.max(axis=1).mean() - (said.argmax(axis=1) == kind).mean())
    assert gap["a"] < 0.02 < 0.1 < untouched and gap["elsewhere"] < 0.02


@pytest.mark.mission("what training drew more often than it comes is not answered more often than it comes")
def test_offsets_bring_back_the_sites_own_mix_of_types():
    """Bayes: probabilities learned at another mix, moved to the site's, are those of the site; elsewhere nothing is moved."""
    random = np.random.default_rng(5)
    own, drawn_mix = np.array([0.7, 0.2, 0.08, 0.02]), np.full(4, 0.25)
    kind = random.choice(4, 6000, p=own)
    seen = np.eye(4)[kind] * 1.5 + random.normal(0, 1, (6000, 4))
    likelihood = np.exp(-((seen[:, None] - 1.5 * np.eye(4)) ** 2).sum(axis=2) / 2)
    said = (likelihood * drawn_mix / (likelihood * drawn_mix).sum(axis=1, keepdims=True)).astype(np.float32)
    embedding = np.zeros((6000, E), np.float32)
    moves = {"a": tuple(np.log(own / drawn_mix))}
    limits = {"coverage": 0.9, "max_error": 0.1, "typical": 1.0, "offsets": moves}
    made = confidence.fit(said, np.eye(4, dtype=bool)[kind], kind, ["a"] * 6000, embedding, embedding, kind, **limits)
    assert made is not None and made.temperatures["a"] == pytest.approx(1, abs=0.08)
    moved, *_ = made.judge(said, embedding, ["a"] * 6000)
    np.testing.assert_allclose(moved.mean(axis=0), own, atol=0.02)
    assert (moved.argmax(axis=1) == kind).mean() > (said.argmax(axis=1) == kind).mean() + 0.05
    elsewhere = made.judge(said, embedding, ["elsewhere"] * 6000)[0]
    np.testing.assert_array_equal(elsewhere.argmax(axis=1), said.argmax(axis=1))


@pytest.mark.mission("no site's mix makes a blast less of a blast")
def test_a_mix_never_speaks_against_blasts():
    types = ("BASO", "BLAST", "LYMPH", "MONO", "PLASMA")
    for blasts in (np.nan, 1.0, 20.0, 4000.0):
        own = np.array([40, blasts, 2500, 600, np.nan])
        moved = np.array(confidence.offsets_for(types, own, np.sqrt(np.nan_to_num(own, nan=5)), 1.0))
        assert (moved[1] >= moved).all() and (moved[4] >= moved).all(), (
            "beside no other type is it less probable than before"
        )
        assert moved[2] - moved[3] == pytest.approx(np.log(2500 / 600) / 2, abs=1e-5) or blasts == 4000
    cells = np.float32([[0, 0.6, 0.4, 0, 0]])
    card = fitted().model_copy(
        update={"offsets": {"a": tuple(moved)}, "temperatures": {}, "limits": {"*": (0.0,) * 5}, "whitening": ()}
    )
    assert card.judge(cells, np.zeros((1, E), np.float32), ["a"])[0].argmax() == 1
    clipped = confidence.offsets_for(types, np.array([1e-9, 1, 1, 1, 1]), np.ones(5), 1.0, most=4)
    assert clipped[2] - clipped[0] == pytest.approx(np.log(4) + np.log(5 / 4), abs=1e-4)
    assert not len(card.judge(np.zeros((0, 5), np.float32), np.zeros((0, E), np.float32), [])[0])


@pytest.mark.mission("the mix of types at a new site is estimated without labels")
def test_a_mix_is_found_without_labels():
    random = np.random.default_rng(6)
    own, drawn_mix = np.array([0.6, 0.3, 0.1, 0.0]), np.array([0.1, 0.2, 0.3, 0.4])
    kind = random.choice(4, 4000, p=own)
    seen = np.eye(4)[kind] * 2 + random.normal(0, 1, (4000, 4))
    likelihood = np.exp(-((seen[:, None] - 2 * np.eye(4)) ** 2).sum(axis=2) / 2)
    said = (likelihood * drawn_mix / (likelihood * drawn_mix).sum(axis=1, keepdims=True)).astype(np.float32)
    naive = said.mean(axis=0)
    found = confidence.mix_of(said, drawn_mix)
    assert found.sum() == pytest.approx(1) and np.abs(found - own).max() < 0.03 < np.abs(naive - own).max()

    # A network that is less sure than it may be: the mix is that of its tempered answers, and so is what is served.
    shy, types = said.astype(float) ** 0.5, ("BASO", "EOS", "LYMPH", "MONO")
    shy = (shy / shy.sum(axis=1, keepdims=True)).astype(np.float32)
    assert np.abs(confidence.mix_of(shy, drawn_mix) - own).max() > 0.05
    offsets, told = confidence.unlabelled_offsets(types, shy, drawn_mix, 0.5, 1.0, np.inf)
    assert np.abs(told - own).max() < 0.03
    site = fitted().model_copy(
        update={"offsets": {"new": offsets}, "temperatures": {"*": 0.5}, "limits": {"*": (0.0,) * 4}}
    )
    served = site.judge(shy, np.zeros((len(shy), E), np.float32), ["new"] * len(shy))[0]
    np.testing.assert_allclose(served.mean(axis=0), own, atol=0.03)


def test_cells_are_left_unidentified_until_the_error_is_what_was_asked_for():
    made = fitted()
    assert made.error <= 0.1
    said, _, embedding, kind = drawn(4000, 4)
    *_, named = made.judge(said, embedding, ["a"] * len(said))
    right = said.argmax(axis=1) == kind
    assert 0.5 < named.mean() < 0.95 and 1 - right[named].mean() < 0.12 < 1 - right.mean()


def test_an_error_that_cannot_be_had_still_names_half_of_the_cells():
    made = fitted(max_error=0.0001)
    assert made.error > 0.0001
    assert 0.49 <= made.named < 0.6


def test_cells_unlike_the_training_are_told_and_left_unidentified():
    made = fitted()
    said, _, embedding, _ = drawn(500, 5)
    _, _, unlike, _ = made.judge(said, embedding, ["a"] * 500)
    assert (unlike > 1).mean() < 0.05
    said, _, embedding, _ = drawn(500, 5, away=6.0)
    _, _, unlike, named = made.judge(said, embedding, ["a"] * 500)
    assert (unlike > 1).mean() > 0.95 and named.mean() < 0.05


def test_a_type_with_few_cells_shares_the_limit_of_all():
    said, allowed, embedding, kind = drawn(400, 6)
    keep = np.concatenate([np.flatnonzero(kind != 3), np.flatnonzero(kind == 3)[:4]])
    made = confidence.fit(
        said[keep],
        allowed[keep],
        kind[keep],
        ["a"] * len(keep),
        embedding[keep],
        embedding,
        kind,
        coverage=0.9,
        max_error=0.1,
        typical=0.99,
    )
    assert made is not None and made.num_cells["a"][3] == 4 and made.in_common("wxyz", "a") == ["z"]
    together = np.sort(said[keep][allowed[keep]])  # the temperature may differ a little from 1
    assert made.limits["a"][3] == pytest.approx(np.quantile(together, 0.1), abs=0.05)
    assert 0 < made.limits["a"][3] < 1


def test_parents_and_no_labels():
    said, allowed, embedding, kind = drawn(100, 7)
    given = {"coverage": 0.9, "max_error": 0.1, "typical": 0.99}
    nothing, no_label = np.zeros_like(allowed), np.full(100, -1)
    assert confidence.fit(said, nothing, no_label, ["a"] * 100, embedding, embedding, kind, **given) is None
    allowed[:, :2] = allowed[:, :2].any(axis=1, keepdims=True)  # types 0 and 1 are known as their parent alone
    label = np.where(kind < 2, -1, kind)
    made = confidence.fit(said, allowed, label, ["a"] * 100, embedding, embedding, kind, **given)
    assert made is not None and made.num_cells["a"][:2] == (0, 0)


def test_risk_falls_with_what_is_left_out():
    answered, risk = confidence.risk_by_coverage(np.array([0.5, 0.9, 0.7, 0.8]), np.array([False, True, False, True]))
    assert answered.tolist() == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(risk, [0, 0, 1 / 3, 0.5])


def test_cells_of_a_type_that_was_not_trained_are_wrong_whatever_they_are_called():
    said, allowed, embedding, kind = drawn(1000, 8)
    strange = np.arange(1000) < 200
    said[strange] = [0.97, 0.01, 0.01, 0.01]
    allowed[strange], label = False, np.where(strange, -1, kind)
    made = confidence.fit(
        said, allowed, label, ["a"] * 1000, embedding, embedding, kind, coverage=0.9, max_error=0.05, typical=1.0
    )
    assert made is not None and made.error > 0.05 and made.named >= 0.49
    assert sum(made.num_cells["*"]) == 800


def test_without_centres_nothing_is_unlike():
    said, allowed, embedding, kind = drawn(100, 9)
    made = confidence.fit(
        said, allowed, kind, ["a"] * 100, embedding, embedding[:3], kind[:3], coverage=0.9, max_error=0.1, typical=0.99
    )
    assert made is not None and made.whitening == () and (made.judge(said, embedding, ["a"] * 100)[2] == 0).all()


def test_nine_cells_are_enough_for_ninety_in_a_hundred():
    said, allowed, embedding, kind = drawn(300, 10)
    keep = np.concatenate([np.flatnonzero(kind == 0)[:9], np.flatnonzero(kind == 1)[:8], np.flatnonzero(kind > 1)])
    made = confidence.fit(
        said[keep], allowed[keep], kind[keep], ["a"] * len(keep), embedding[keep], embedding, kind, coverage=0.9, max_error=0.1,
        typical=0.99,
    )  # fmt: skip
    assert made is not None and made.fewest == 9
    calibrated = made.judge(said[keep], embedding[keep], ["a"] * len(keep))[0]
    assert made.limits["a"][0] == pytest.approx(calibrated[:9, 0].min(), abs=1e-5)
    assert made.limits["a"][1] != pytest.approx(calibrated[9:17, 1].min(), abs=1e-5)
