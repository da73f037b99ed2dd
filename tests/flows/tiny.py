"""A small workspace, real in all its parts: git, DVC with a remote, labelled cells of two sites, a pipeline of three stages
that ends in a package. What it lacks is a network: its package says what it would name."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from conftest import CHECKOUT, picture, put

from flows.workspace import Workspace
from smearline import dataset, images

TYPES = ("BLAST", "LYMPH", "MONO", "EOS")
SITES = ("lab", "second")
CELLS_PER_SITE = 160
PACKAGE = """
import hashlib, json, pathlib
out = pathlib.Path("package/recogniser"); out.mkdir(parents=True)
count = json.loads(pathlib.Path("metrics/count.json").read_text())
(out / "trained_on.parquet").write_bytes(pathlib.Path("trained_on.parquet").read_bytes())
version = hashlib.sha256(json.dumps(count).encode()).hexdigest()[:12]
lineage = {"version": version, "commit": "c0de", "data": {"dvc": {}}, "parameters": {}, "metrics": count, "origin": "real"}
pathlib.Path("package/lineage.json").write_text(json.dumps(lineage))
"""
PIPELINE = """
stages:
  list:
    cmd: ls data/cells > list.txt
    deps: [data/cells]
    outs: [list.txt]
  count:
    cmd: 'mkdir -p metrics && echo "{\\"accuracy\\": 0.$(wc -l < list.txt)}" > metrics/count.json'
    deps: [list.txt]
    metrics: [metrics/count.json: {cache: false}]
  package:
    cmd: python package.py
    deps: [metrics/count.json, package.py, trained_on.parquet]
    outs: [package]
"""


def cell(seed: int, site: str, patient: str | None, smear: str | None) -> dict[str, object]:
    """A row of CELLS."""
    data = picture(seed, 40)
    pixels = images.check(data)
    return {
        "sha256": f"{seed:064x}",
        "image": data,
        "width": 40,
        "height": 40,
        "microns_per_px": 0.2,
        "site": site,
        "scanner": "s",
        "stain": "s",
        "patient": patient,
        "smear": smear,
        "acquired_at": None,
        "origin": "real",
        "source": "folder",
        "thumbnail": images.thumbnail(pixels).tobytes(),
    }


def label(sha256: str, value: str, source: str = "folder") -> dict[str, object]:
    said = {"name": "type", "value": value, "source_label": value, "labelled_by": source, "labelled_at": None}
    return {"sha256": sha256, **said, "role": "reference", "vocabulary": "1", "source": source, "conflicted": False}


def make(folder: Path) -> Workspace:
    """Cells of 8 patients a site, all of them in the test split; a pipeline that has not run."""
    for number, site in enumerate(SITES):
        with dataset.CellWriter(folder / "data/cells", site) as writer:
            rows = [
                cell(1000 * number + i, site, f"{site}-p{i % 8}", f"{site}-s{i % 8}") for i in range(CELLS_PER_SITE)
            ]
            for row in rows:
                writer.add(row)
        said = [label(str(row["sha256"]), TYPES[i // 8 % 4]) for i, row in enumerate(rows)]
        dataset.merge_labels(folder / "data", site, pa.Table.from_pylist(said, schema=dataset.LABELS))
    known = dataset.index(folder / "data", ["sha256", "patient"])
    known.assign(split="test", group=known["patient"], near_duplicate=False).drop(columns="patient").to_parquet(
        folder / "splits.parquet"
    )
    pd.DataFrame({"sha256": ["f" * 64], "site": ["lab"], "patient": ["other"]}).to_parquet(
        folder / "trained_on.parquet"
    )
    for name, text in (
        ("dvc.yaml", PIPELINE),
        ("package.py", PACKAGE),
        (".gitignore", ".smearline/\n/data/local/\n/inbox/\n/watch/\n/reference/\n/gate/*.unfinished\n"),
        ("params.yaml", (CHECKOUT / "params.yaml").read_bytes()),
    ):
        put(folder / name, text)
    for command in (
        ["git", "init", "-q"],
        ["git", "config", "user.name", "test"],
        ["git", "config", "user.email", "test@localhost"],
        [sys.executable, "-m", "dvc", "init", "-q"],
        [sys.executable, "-m", "dvc", "config", "core.autostage", "true"],
        [sys.executable, "-m", "dvc", "remote", "add", "-q", "--local", "-d", "near", "../remote"],
        [sys.executable, "-m", "dvc", "add", "-q", "data/cells", "data/labels"],
        ["git", "add", "-A"],
        ["git", "commit", "-qm", "start"],
    ):
        subprocess.run(command, cwd=folder, check=True)
    return Workspace(folder)


def copied(made: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    for name in ("SMEARLINE_HOME", "SMEARLINE_STORE", "BENTOML_HOME", "SMEARLINE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(made, to, symlinks=True, dirs_exist_ok=True)
    return Workspace(to / "workspace")
