"""Stage split: who is trained on and who is tested."""

from pathlib import Path

from pipelines.cells import SPLITS
from smearline import commands, dataset, plain_json, settings, splits


def main() -> None:
    params = settings.load()
    frame = dataset.index(params.data.folder, ["sha256", "site", "patient", "smear", "thumbnail"])
    kept = params.data.folder / "local" / "near-duplicates.npz"
    with commands.progress_line("images searched for near duplicates") as shown:
        assigned = splits.assign(frame, **dict(params.split), kept=kept, progress=shown)
    assigned.to_parquet(SPLITS, index=False)
    joined = frame[["site", "patient"]].assign(split=assigned["split"], group=assigned["group"])
    by_site: dict[str, dict[str, dict[str, int]]] = {}
    for (site, split), rows in joined.groupby(["site", "split"]):
        num_groups, num_patients = (int(rows[column].nunique()) for column in ("group", "patient"))
        found = {"cells": len(rows), "groups": num_groups, "patients": num_patients}
        by_site.setdefault(site, {})[split] = found
    near = int(assigned["near_duplicate"].sum())
    plain_json.write(Path("splits.json"), {"cells": len(joined), "near_duplicates": near, "by_site": by_site})
    for name, part in by_site.items():
        print(f"{name:12} " + ", ".join(f"{s} {n['cells']} cells in {n['groups']} groups" for s, n in part.items()))
    print(f"{near} images have a near duplicate; none straddles a split")


if __name__ == "__main__":
    main()
