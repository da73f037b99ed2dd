"""Requests that work as they are: a smear of the workspace's own data, and the curl lines that send it."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from serving.cases import case_of
from smearline import cbc, dataset, plain_json, pseudonyms, sites


def write(workspace: Path, folder: Path) -> tuple[str, str]:
    """Write a smear's images (cells/) and its request.json with its blood count into `folder`, a smear of the test split
    where there is one. Returns its site and its case id.

    Raises:
        DataError: the workspace has no images, or none that names a smear.
    """
    data, splits = workspace / "data", workspace / "splits.parquet"
    index = dataset.labelled_index(data).dropna(subset=["smear"])
    if splits.exists():
        tested = pd.read_parquet(splits, columns=["sha256", "split"])
        index = index.assign(tested=index["sha256"].isin(tested.loc[tested["split"] == "test", "sha256"]))
        index = index.sort_values("tested", ascending=False, kind="stable")
    if not len(index):
        raise dataset.DataError(f"no image in {data} names its smear")
    first = index.iloc[0]
    mine = index[(index["site"] == first["site"]) & (index["smear"] == first["smear"])]
    # A neutrophil first: much is said of it.
    mine = mine.sort_values("true_type", key=lambda types: types != "NEUT_SEG", kind="stable")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "cells").mkdir(parents=True)
    for number, (shard, row) in enumerate(zip(mine["shard"], mine["row"], strict=True), 1):
        image = pq.read_table(shard, columns=["image"])["image"][row].as_py()
        (folder / "cells" / f"{number:03}").write_bytes(image)
    counts = dataset.read_tables(data, "cbc/*.parquet", cbc.COUNTS)
    counts = counts[(counts["site"] == first["site"]) & (counts["smear"] == first["smear"])]
    request = {name: first[name] for name in ("site", "smear", "patient") if first[name]}
    if not pd.isna(first["acquired_at"]):
        request["acquired_at"] = first["acquired_at"].isoformat()
    request["cbc"] = {c.parameter: {"value": c.raw, "unit": c.unit} for c in counts.itertuples()}
    plain_json.write(folder / "request.json", request)
    site = sites.load(first["site"])
    return site.name, case_of(site.name, pseudonyms.pseudonym(pseudonyms.key(site), site.name, "smear", first["smear"]))


def lines(url: str, folder: Path, site: str, case_id: str, token: str) -> str:
    """Three curl lines; `token` as a shell says it."""
    where, curl = os.path.relpath(folder), f'curl -sS -H "Authorization: Bearer {token}"'
    return f"""one cell:
  {curl} -F site={site} -F images=@{where}/cells/001 {url}/v1/recognise
a smear with its blood count:
  {curl} -F 'request=<{where}/request.json' $(printf -- '-F images=@%s ' {where}/cells/*) {url}/v1/diagnose
the case read back:
  {curl} {url}/v1/smears/{case_id}"""
