"""Judge what a site sent to the service: the inference log against the reference, with its verdict and its pages.

    python -m monitoring.watch --site X [--day D] [--days N] [--against Y]      in a workspace

writes watch/SITE/DAY/: verdict.json, index.html, evidently.html, smears.parquet.
"""

import argparse
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pandas as pd

from monitoring import page, report
from monitoring.drift import FALSE_ALARM_RATE, LEAST_REFERENCE, LEAST_SMEARS, Comparison, compare
from monitoring.reference import REFERENCE, Reference
from monitoring.smears import LEAST_CELLS, NEEDS_RECOGNISER, by_smear, named
from monitoring.verdict import Verdict, decide, find, limits, sentence
from monitoring.witnesses import analyser, reviewers
from smearline.errors import DataError

_HISTORY = 5
"""So many windows back are read to say since when."""
_PSEUDO = (
    "cells without a smear were cut into pseudo-smears of 50, which differ less among themselves than smears of patients do: "
    "the false-alarm rate holds only between such"
)
_FEW = (
    "the {} are too few to be resampled, so smears were: where {} differ in themselves, false alarms are more frequent than "
    "stated"
)


def judge(
    log: Path,
    site: str,
    reference: Path,
    out: Path,
    *,
    day: str | None = None,
    days: int = 7,
    witnesses: dict[str, Any] | None = None,
    against: str | None = None,
) -> Verdict:
    """Judge the `days` days of a site's log up to `day` (None: the last in the log).

    A site without a reference of its own is judged against `against` or, of the sites of the reference, the one that its
    smears are nearest to; the verdict says so.

    Args:
        log: LOG/SITE/DAY.parquet, as the case store exports it.
        reference: the folder of the stage `reference`.
        out: OUT/SITE/DAY/ is written, and .smearline/evidently beside OUT.
        witnesses: {'reviewers': counts of the window (`reviewers`), 'analyser': rows of cbc.COUNTS}; what is not given is
            printed as missing.

    Raises:
        DataError: the log has nothing of the site, there is no reference, or `against` is not in it.
    """
    known = Reference.load(reference)
    cells, first, day = _read(log, site, day, days)
    cells, because, notes = _comparable(cells, known.about, first)
    enough = [s for s, about in known.about["sites"].items() if about["num_smears"] >= LEAST_REFERENCE]
    if against and against not in enough:
        raise DataError(
            f"no site '{against}' with {LEAST_REFERENCE} smears in {reference}; it has {', '.join(enough) or 'none'}"
        )
    own = site in enough and against in (None, site)

    def compared(base: str | None) -> tuple[str | None, pd.DataFrame, pd.DataFrame, Comparison]:
        smears = by_smear(cells, None if because or base is None else known.centres.get(base))
        rows = known.smears[known.smears["site"] == base]
        return base, smears, rows, compare(smears[smears["day"] >= first], rows, because)

    bases: list[str | None] = [site] if own else [against] if against else list(enough)
    # The nearest of those that can judge most: what is not judged is not near.
    base, smears, rows, comparison = min(
        map(compared, bases or [None]), key=lambda found: (-len(found[3].features), found[3].farthest)
    )
    window = smears[smears["day"] >= first]
    if base and not own:
        how = f"{base}, {'as was asked' if against else 'the nearest of its sites'}"
        notes.append(f"{site} has no reference of its own; it was compared with {how}, and may have differed all along")
    notes += [_PSEUDO] if window["pseudo"].any() or rows["pseudo"].any() else []
    notes += [_FEW.format(comparison.too_few, comparison.too_few)] if comparison.too_few else []
    here = cells[cells["day"] >= first]
    came = here["smear"].nunique()
    if left_out := came - len(window):
        notes.append(f"{left_out} of {came} smears were left out, since they have fewer than {LEAST_CELLS} cells")
    found, said = find(comparison, smears), witnesses or {}
    heard = {
        "reviewers": reviewers(said.get("reviewers"), limits()["overrides"]["limit"]),
        "analyser": analyser(said.get("analyser"), window, limits()["analyser"]["limit"]),
    }
    # Staining and optics alone are no acceptance of a recogniser that is not the reference's.
    cannot = comparison.because.get("staining") or next(iter(because.values()), None)
    if left_out > len(window):
        cannot = cannot or notes[-1]
    word, whose = decide(found, heard, cannot), f"{len(window)} smears of {site}"
    unseen = int((~rows["seen"]).sum())
    about = {"site": base, "own": own, "num_smears": len(rows), "num_smears_not_trained_on": unseen}
    made = Verdict(
        site=site,
        day=day,
        verdict=word,
        sentence=sentence(word, whose, found, heard, cannot),
        version=" and ".join(sorted(here["version"].unique())),
        window={"first": first, "last": day, "days": days},
        num_smears=len(window),
        num_cells=int(window["num_cells"].sum()),
        families=found,
        witnesses=heard,
        false_alarm_rate=FALSE_ALARM_RATE,
        notes=tuple(notes),
        reference=about | {key: known.about[key] for key in ("version", "embedding_version")},
        origin=known.about["origin"],
        path=out / site / day,
    )
    made.path.mkdir(parents=True, exist_ok=True)
    smears.to_parquet(made.path / "smears.parquet", index=False)
    (made.path / "verdict.json").write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if comparison.features:
        report.write(made, window, rows, out.absolute().parent / ".smearline" / "evidently")
    page.write(made, smears, rows)
    return made


def _read(log: Path, site: str, day: str | None, days: int) -> tuple[pd.DataFrame, str, str]:
    """(cells of the window and of the days before it, the window's first day, its last)."""
    files = {p.stem: p for p in sorted((log / site).glob("*.parquet")) if day is None or p.stem <= day}
    if not files:
        raise DataError(
            f"{log} has no day of site '{site}'{f' up to {day}' if day else ''}; export the log of the service first"
        )
    last = day or max(files)
    first, oldest = ((date.fromisoformat(last) - timedelta(days=n * days - 1)).isoformat() for n in (1, _HISTORY))
    read = [pd.read_parquet(path) for name, path in files.items() if name >= oldest]
    if not any(name >= first for name in files):
        raise DataError(f"{log} has no day of site '{site}' from {first} to {last}; its last is {max(files)}")
    cells = pd.concat(read, ignore_index=True)
    if cells.empty:
        raise DataError(f"no picture of site '{site}' that came from {oldest} to {last} could be recognised")
    return named(cells), first, last


def _comparable(
    cells: pd.DataFrame, about: dict[str, Any], first: str
) -> tuple[pd.DataFrame, dict[str, str], list[str]]:
    """(the cells that the reference's recogniser answered, if they are enough; families that none can be judged by; notes)."""
    same = cells["version"] == about["version"]
    if same.all():
        return cells, {}, []
    if cells.loc[same & (cells["day"] >= first), "smear"].nunique() >= LEAST_SMEARS:
        return cells[same], {}, [f"{(~same).sum():,} cells that another recogniser answered were left out"]
    why = f"the cells were answered by another recogniser ({cells['version'].iloc[-1]}) than the reference's ({about['version']})"
    return cells, dict.fromkeys(NEEDS_RECOGNISER, why), []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", required=True)
    parser.add_argument("--day")
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--against")
    parser.add_argument("--log", type=Path, default=Path(".smearline/service/log"))
    a = parser.parse_args()
    made = judge(a.log, a.site, REFERENCE, Path("watch"), day=a.day, days=a.days, against=a.against)
    print(f"{made.sentence}\n{made.path / 'index.html'}")


if __name__ == "__main__":
    main()
