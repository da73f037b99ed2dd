"""How often drift is called where there is none: monitoring.drift and a bootstrap, on tables of random numbers.

    python -m bench.false_alarms [--tables 200]      bench/results/false_alarms.json

A table has 25 features, half of them skewed. A day's smears share a part of the variance (`day`), or none. Stated is a rate of
5 % over all features. Dealing days (or patients, of whom the same holds) keeps it; dealing smears keeps it only where days do
not differ; drawing from the reference with replacement, as is often done, does not keep it at all.
"""

import argparse
from typing import Any

import numpy as np
import pandas as pd

from bench.results import write
from monitoring import drift

X = [f"x{i}" for i in range(25)]
NAMES = ("days dealt", "smears dealt", "bootstrap of the reference")
DAYS = (0.0, 0.36)
"""Share of the variance that the smears of a day have in common."""
SHAPES = ((5, 5, 5, 4), (20, 5, 5, 4), (20, 5, 2, 10), (40, 1, 10, 1), (40, 1, 5, 10), (40, 10, 5, 1))
"""Days of the reference, smears a day; days of the window, smears a day."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=200, help="a setting")
    write("false_alarms", {"stated": drift.FALSE_ALARM_RATE, **tables(parser.parse_args().tables)})


def tables(num: int) -> dict[str, Any]:
    found: dict[str, Any] = {"tables": num}
    for day in DAYS:
        for shape in SHAPES:
            days, per_day, now_days, now_per_day = shape
            random, alarms = np.random.default_rng(1), dict.fromkeys(NAMES, 0)
            for _ in range(num):
                base, now = _table(random, days, per_day, day), _table(random, now_days, now_per_day, day)
                fired = (
                    _fires(random, base, now, "day"),
                    _fires(random, base, now, "smear"),
                    _bootstrap_fires(random, base, now),
                )
                alarms = {name: alarms[name] + f for name, f in zip(NAMES, fired, strict=True)}
            label = f"day {day}: reference {days} days x {per_day} smears, window {now_days} x {now_per_day}"
            found[label] = {name: round(count / num, 3) for name, count in alarms.items()}
            found[label]["days dealt, shifted by 1.5 standard deviations"] = round(_power(num, *shape, day), 3)
    return found


def _power(num: int, days: int, per_day: int, now_days: int, now_per_day: int, share: float) -> float:
    """How often a window is called of which one feature is shifted."""
    random, called = np.random.default_rng(2), 0
    for _ in range(num):
        base, now = _table(random, days, per_day, share), _table(random, now_days, now_per_day, share)
        called += _fires(random, base, now.assign(x0=now["x0"] + 1.5), "day")
    return called / num


def _table(random: np.random.Generator, days: int, per_day: int, share: float) -> pd.DataFrame:
    day = np.repeat(np.arange(days), per_day)
    values = random.normal(size=(days, 25))[day] * share**0.5 + random.normal(size=(len(day), 25)) * (1 - share) ** 0.5
    values[:, 12:] = np.exp(values[:, 12:])
    return pd.DataFrame(values, columns=X).assign(day=day.astype(str), smear=[f"{n}" for n in range(len(day))])


def _fires(random: np.random.Generator, base: pd.DataFrame, now: pd.DataFrame, unit: str) -> bool:
    here, there = drift._blocks(now, base, unit, X, random)
    inside = drift._deal(random, len(there), len(here))
    pooled = pd.concat([there, here])
    found = np.stack([drift._distances(pooled[x].to_numpy(np.float32), inside, 1 - inside) for x in X], axis=1)
    largest = (found / np.quantile(found, 0.99, axis=0)).max(axis=1)
    return bool((largest >= largest[0]).mean() <= drift.FALSE_ALARM_RATE)


def _bootstrap_fires(random: np.random.Generator, base: pd.DataFrame, now: pd.DataFrame) -> bool:
    """Thresholds from smears drawn from the reference with replacement, as monitoring tools do it."""
    num, size = len(base), len(now)
    inside = np.stack([np.bincount(random.integers(0, num, size), minlength=num) for _ in range(400)]).astype(
        np.float32
    )
    null = np.stack(
        [drift._distances(base[f"x{i}"].to_numpy(np.float32), inside, np.ones_like(inside)) for i in range(25)], axis=1
    )
    true = np.r_[np.zeros(num), np.ones(size)].astype(np.float32)[None]
    pooled = pd.concat([base, now])
    seen = np.array([drift._distances(pooled[f"x{i}"].to_numpy(np.float32), true, 1 - true)[0] for i in range(25)])
    unit = np.quantile(null, 0.99, axis=0)
    return bool((seen / unit).max() > np.quantile((null / unit).max(axis=1), 1 - drift.FALSE_ALARM_RATE))


if __name__ == "__main__":
    main()
