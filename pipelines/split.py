"""Stage split: who is trained on and who is tested."""

from __future__ import annotations

from pathlib import Path

from pipelines.cells import SPLITS
from smearline import dataset, plain_json, settings, splits


def main() -> None:
    params = settings.load()
    frame = dataset.index(params.data.folder, ["sha256", "site", "patient", "smear", "thumbnail"])
    given = params.split
    assigned = splits.assign(
        frame,
        seed=given.seed,
        val=given.val,
        test=given.test,
        train_sites=given.train_sites,
        test_only_sites=given.test_only_sites,
        near_duplicate_correlation=given.near_duplicate_correlation,
    )
    assigned.to_parquet(SPLITS, index=False)
    joined = frame[["site", "patient"]].assign(split=assigned["split"], group=assigned["group"])
    summary = {
        "cells": len(joined),
        "near_duplicates": int(assigned["near_duplicate"].sum()),
        "by_site": {
            site: {
                split: {
                    "cells": len(rows),
                    "groups": int(rows["group"].nunique()),
                    "patients": int(rows["patient"].nunique()),
                }
                for split, rows in part.groupby("split")
            }
            for site, part in joined.groupby("site")
        },
    }
    plain_json.write(Path("splits.json"), summary)
    for site, part in summary["by_site"].items():  # type: ignore[attr-defined]
        print(f"{site:12} " + ", ".join(f"{s} {n['cells']} cells in {n['groups']} groups" for s, n in part.items()))
    print(f"{summary['near_duplicates']} images have a near duplicate; none straddles a split")


if __name__ == "__main__":
    main()
