"""What a probability is worth: calibration, sets of types with a stated coverage, abstention, and cells unlike the training's.

Everything is learned from the validation cells, which training did not see, and stands in the model's card:
    offsets        training draws rare types more often than they come; so, at a site that it was trained on, each type's logarithm
                   is moved towards the site's own mix of types (Saerens 2002, Neural Computation 14:21)
    temperatures   one for each site with `LEAST_OF_SITE` labelled cells, and one of all validation cells for the other sites
                   (Guo 2017, ICML)
    sets           label-conditional conformal prediction (Vovk 2012, Machine Learning 92:349): a type is in a cell's set where
                   its probability is at least that type's limit at its site, or where it is the cell's name. Among exchangeable
                   cells of a type and a site, at least `coverage` of the sets hold it. Cells of new patients are not exchangeable
                   with the validation's, and those of a new site still less: what is reached there is measured
                   (metrics.sureness), not promised.
    named_from     the least probability from which a cell is named; others are left to the reviewer as unidentified
    far            Mahalanobis distance of the embedding from the nearest type's centre, with one covariance for all types
                   (Lee 2018, NeurIPS), in units of the distance within which `typical` of the validation cells lie; a cell
                   beyond 1 is unlike what the model has seen, and is unidentified too

Shapes: N cells, T trained types, E embedding.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from scipy.special import softmax

LEAST_OF_SITE = 50
LEAST_OF_TYPE = 5
"""A type with fewer training cells has no centre."""
ELSEWHERE = "*"
LEAST_NAMED = 0.5
"""A limit that leaves more than half of the validation cells unidentified is not taken, whatever its errors."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Confidence(BaseModel, frozen=True, extra="forbid"):
    """As in the card; the lists are in the order of the card's types."""

    coverage: float
    offsets: dict[str, tuple[float, ...]] = {}
    """Site to what is added to the logarithms of the probabilities served, type by type."""
    temperatures: dict[str, float]
    """Site to what they are then divided by; `ELSEWHERE` stands for the sites that have none of their own."""
    limits: dict[str, tuple[float, ...]]
    """Site to the limit of each type's probability; `ELSEWHERE` as above. Types whose validation cells there are too few for this
    coverage have the limit of all cells of the site together, or the type's at all sites where that is lower; neither promises
    anything of them one by one."""
    num_cells: dict[str, tuple[int, ...]]
    """Validation cells of each type, likewise."""
    named_from: float
    error: float
    """Share of wrong names among the validation cells that are named."""
    named: float
    """Share of the validation cells that are named."""
    centres: tuple[tuple[float, ...] | None, ...]
    whitening: tuple[tuple[float, ...], ...]
    """E x E: the distance is the length of (embedding - centre) @ whitening; empty where no type has a centre."""
    blast_from: float | None = None
    """A probability of a blast from which at least `blast_ppv` of the validation cells are blasts (metrics.blasts)."""
    blasts_above: float | None = None
    """A smear with a larger share of cells called blasts is flagged (metrics.blasts.false_alarm_share)."""
    blast_free: tuple[int, int] = (0, 0)
    """Smears and pseudo-smears without blasts on which that rests."""

    @property
    def fewest(self) -> int:
        """Validation cells that a type needs for a limit of its own."""
        return int(np.ceil(1 / (1 - self.coverage) - 1 - 1e-9))

    def never_ruled_out(self, t: int, probability: float) -> "Confidence":
        """With sets that hold type t from this probability on at the latest."""
        lowered = {s: (*of[:t], min(of[t], probability), *of[t + 1 :]) for s, of in self.limits.items()}
        return self.model_copy(update={"limits": lowered})

    def in_common(self, types: Sequence[str], site: str) -> list[str]:
        """Types without a limit of their own at a site."""
        return [t for t, n in zip(types, self.num_cells[site], strict=True) if n < self.fewest]

    def judge(
        self, types_NT: NDArray[np.float32], embedding_NE: NDArray[np.float32], sites: Sequence[str]
    ) -> tuple[NDArray[np.float32], Bools, Floats, Bools]:
        """Calibrated probabilities (N x T), sets (N x T), distance (N), and whether each cell is named (N)."""
        calibrated = _calibrated(types_NT, sites, self.offsets, self.temperatures)
        limits = np.array([self.limits.get(s, self.limits[ELSEWHERE]) for s in sites]).reshape(calibrated.shape)
        # What a cell is called is not ruled out.
        in_set = (calibrated >= limits) | (calibrated == calibrated.max(axis=1, keepdims=True))
        far = self._distance(embedding_NE)
        return calibrated.astype(np.float32), in_set, far, (calibrated.max(axis=1) >= self.named_from) & (far <= 1)

    def _distance(self, embedding_NE: NDArray[np.float32]) -> Floats:
        if not self.whitening:
            return np.zeros(len(embedding_NE))
        centres = np.array([c for c in self.centres if c is not None])
        return _nearest(embedding_NE, centres, np.array(self.whitening))


def fit(
    types_NT: NDArray[np.float32],
    allowed_NT: Bools,
    label_N: NDArray[np.int64],
    sites: Sequence[str],
    embedding_NE: NDArray[np.float32],
    taught_ME: NDArray[np.float32],
    taught_M: NDArray[np.int64],
    *,
    coverage: float,
    max_error: float,
    typical: float,
    offsets: dict[str, tuple[float, ...]] | None = None,
) -> Confidence | None:
    """Learn from N labelled validation cells, and from the embeddings of M training cells and their types (indices).

    Args:
        allowed_NT: what each cell's label allows: one type, or a parent's children; nothing where its type was not trained, so that
            whatever it is called is wrong.
        label_N: the index of the label among the types; -1 for a parent's, or an untrained type's.
        max_error: share of wrong names among those named that is aimed at.

    Returns:
        None where there is no cell of a trained type.
    """
    known = allowed_NT.any(axis=1)
    if not known.any():
        return None
    site_N = np.array(sites)
    offsets = offsets or {}
    moved = _calibrated(types_NT, sites, offsets, {})
    temperatures = {
        str(site): _temperature(moved[here], allowed_NT[here])
        for site in np.unique(site_N[known])
        if (here := known & (site_N == site)).sum() >= LEAST_OF_SITE
    }
    if known.sum() >= LEAST_OF_SITE:
        temperatures[ELSEWHERE] = _temperature(types_NT[known].astype(float), allowed_NT[known])
    found = _calibrated(types_NT, sites, offsets, temperatures)
    everywhere = _limits(found, label_N, coverage, np.full(types_NT.shape[1], np.inf))
    limits, numbers = {ELSEWHERE: everywhere[0]}, {ELSEWHERE: everywhere[1]}
    for site in sorted(temperatures.keys() - {ELSEWHERE}):
        here = site_N == site
        limits[site], numbers[site] = _limits(found[here], label_N[here], coverage, np.array(everywhere[0]))
    centres, whitening, far = _centres(embedding_NE, taught_ME, taught_M, types_NT.shape[1], typical)
    right = allowed_NT[np.arange(len(found)), found.argmax(axis=1)]
    usual = far <= 1
    named_from, error, named = _limit(found.max(axis=1)[usual], right[usual], max_error)
    return Confidence(
        coverage=coverage,
        offsets=offsets,
        temperatures=temperatures,
        limits=limits,
        num_cells=numbers,
        named_from=named_from,
        error=error,
        named=named * float(usual.mean()),
        centres=centres,
        whitening=whitening,
    )


def offsets_for(
    types: Sequence[str], own_T: Floats, drawn_T: Floats, part: float, most: float = np.inf
) -> tuple[float, ...]:
    """`part` of the way from the mix that training drew to a site's own, as what is added to each type's logarithm.

    Blasts, and types that the site never had (NaN in `own_T`), are raised as much as the type that is raised most: a site's mix
    makes none of them less probable beside any other, so that the first blast of a site of healthy donors stays one.

    Args:
        own_T, drawn_T: numbers or shares; their sums do not matter.
        most: times that one type is moved at most, up or down, before `part` is taken.
    """
    with np.errstate(invalid="ignore"):
        moved = np.log(own_T / own_T[own_T > 0].sum()) - np.log(drawn_T / drawn_T.sum())
    moved = np.clip(moved, -np.log(most), np.log(most)) * part
    safe = np.isnan(moved) | (np.array(types) == "BLAST")
    moved = np.where(safe, moved[~np.isnan(moved)].max(initial=-np.inf), moved)
    return tuple(round(float(v), 6) for v in moved - moved.mean())


def mix_of(types_NT: NDArray[np.floating], drawn_T: Floats, rounds: int = 200) -> Floats:
    """The mix of types among unlabelled cells (T, sums to 1), by expectation and maximisation (Saerens 2002).

    It holds as far as a type looks there as it did in training; a cell of an untaught type falls to some type all the same.

    Args:
        drawn_T: the mix that training drew.
    """
    mix = drawn_T
    for _ in range(rounds):
        odds = types_NT * (mix / drawn_T)
        mix = (odds / odds.sum(axis=1, keepdims=True)).mean(axis=0)
    found: Floats = mix
    return found


def unlabelled_offsets(
    types: Sequence[str], types_NT: NDArray[np.float32], drawn_T: Floats, temperature: float, part: float, most: float
) -> tuple[tuple[float, ...], Floats]:
    """(offsets of a site whose N cells have no label, its estimated mix), as `offsets_for` and `mix_of`.

    The mix is that of the probabilities at this temperature, which is divided by after the offsets are added.

    Args:
        types_NT: the network's own probabilities.
        temperature: that of the site's answers (`temperatures`).
    """
    logs = np.log(np.maximum(types_NT.astype(float), 1e-12))
    mix = mix_of(softmax(logs / temperature, axis=1), drawn_T)
    moved = offsets_for(types, np.maximum(mix, 1e-6), drawn_T, part, most)
    return tuple(round(temperature * v, 6) for v in moved), mix


def risk_by_coverage(sure_N: Floats, right_N: Bools) -> tuple[Floats, Floats]:
    """(share answered, share wrong among them), the surest cells first: the risk-coverage curve (El-Yaniv & Wiener 2010,
    JMLR 11:1605)."""
    order = np.argsort(-sure_N, kind="stable")
    count = np.arange(1, len(order) + 1)
    return count / len(order), np.cumsum(~right_N[order]) / count


def _calibrated(
    types_NT: NDArray[np.floating],
    sites: Sequence[str],
    offsets: dict[str, tuple[float, ...]],
    temperatures: dict[str, float],
) -> Floats:
    none, other = (0.0,) * types_NT.shape[1], temperatures.get(ELSEWHERE, 1.0)
    moved = np.log(np.maximum(types_NT.astype(float), 1e-12))
    moved = moved + np.array([offsets.get(s, none) for s in sites]).reshape(types_NT.shape)
    found: Floats = softmax(moved / np.array([temperatures.get(s, other) for s in sites])[:, None], axis=1)
    return found


def _temperature(types_NT: Floats, allowed_NT: Bools) -> float:
    grid = np.exp(np.linspace(np.log(0.3), np.log(3.0), 60))
    logs = np.log(np.maximum(types_NT, 1e-12))
    loss = [-np.log(np.maximum((softmax(logs / t, axis=1) * allowed_NT).sum(axis=1), 1e-12)).mean() for t in grid]
    return round(float(grid[int(np.argmin(loss))]), 6)


def _limit(sure_N: Floats, right_N: Bools, max_error: float) -> tuple[float, float, float]:
    """(least probability, error, share named): as many cells named as the error allows, and at least LEAST_NAMED."""
    if not len(sure_N):
        return 0.0, 0.0, 0.0
    share, risk = risk_by_coverage(sure_N, right_N)
    last = np.append(np.diff(np.sort(-sure_N)) != 0, True)  # cells of one probability are named together or not at all
    enough = last & (share >= LEAST_NAMED)
    allowed = np.flatnonzero(enough & (risk <= max_error))
    place = int(allowed[-1]) if len(allowed) else int(np.flatnonzero(enough)[np.argmin(risk[enough])])
    return _rounded_down(float(-np.sort(-sure_N)[place])), float(risk[place]), float(share[place])


def _limits(
    found_NT: Floats, label_N: NDArray[np.int64], coverage: float, most_T: Floats
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """(the limit of each type, its cells); types with too few cells have that of all cells together, and at most `most_T`."""
    own = [np.sort(found_NT[label_N == t, t]) for t in range(found_NT.shape[1])]
    single = np.flatnonzero(label_N >= 0)
    together = _lowest(np.sort(found_NT[single, label_N[single]]), coverage) or 0.0
    limits = [_lowest(cells, coverage) for cells in own]
    shared = np.minimum(together, most_T)
    return (
        tuple(float(shared[t]) if limit is None else limit for t, limit in enumerate(limits)),
        tuple(len(cells) for cells in own),
    )


def _lowest(sorted_N: Floats, coverage: float) -> float | None:
    """The k-th smallest of n with k = (1 - coverage) (n + 1) rounded down: a further exchangeable one lies below it with a
    chance of at most k / (n + 1). None where n is too small for any."""
    k = int(np.floor((1 - coverage) * (len(sorted_N) + 1) + 1e-9))
    return _rounded_down(float(sorted_N[k - 1])) if k else None


def _rounded_down(value: float) -> float:
    """Six places, so that the cell at the limit stays within it."""
    return float(np.floor(value * 1e6) / 1e6)


def _nearest(embedding_NE: NDArray[np.float32], centres_CE: Floats, whitening_EE: Floats) -> Floats:
    """The distance (N) of each cell from the nearest of the centres; one centre at a time, since N may be 200,000."""
    nearest = np.full(len(embedding_NE), np.inf)
    for centre in centres_CE:
        away = (embedding_NE.astype(float) - centre) @ whitening_EE
        nearest = np.minimum(nearest, np.sqrt((away**2).sum(axis=1)))
    return nearest


def _centres(
    embedding_NE: NDArray[np.float32],
    taught_ME: NDArray[np.float32],
    taught_M: NDArray[np.int64],
    num_types: int,
    typical: float,
) -> tuple[tuple[tuple[float, ...] | None, ...], tuple[tuple[float, ...], ...], Floats]:
    """The centres, the whitening, and the distances of the validation cells."""
    from sklearn.covariance import ledoit_wolf  # half a second, and service needs none of it

    taught = taught_ME.astype(float)
    mean = [
        taught[taught_M == t].mean(axis=0) if (taught_M == t).sum() >= LEAST_OF_TYPE else None for t in range(num_types)
    ]
    known = np.array([t for t, m in enumerate(mean) if m is not None])
    if not len(known):
        return (None,) * num_types, (), np.zeros(len(embedding_NE))
    centre = np.array([mean[t] for t in known])
    rest = np.concatenate([taught[taught_M == t] - mean[t] for t in known])
    values, vectors = np.linalg.eigh(ledoit_wolf(rest, assume_centered=True)[0])
    whitening = vectors / np.sqrt(np.maximum(values, 1e-9 * max(float(values.max()), 1.0)))
    distance = _nearest(embedding_NE, centre, whitening)
    unit = float(np.quantile(distance, typical)) or 1.0
    rows = tuple(tuple(round(float(v), 6) for v in row) for row in whitening / unit)
    told = tuple(None if m is None else tuple(round(float(v), 6) for v in m) for m in mean)
    return told, rows, distance / unit
