"""Workspaces: a git clone of this repository with data of its own (`make real`, `make real-cross`; demo.py: `make demo`).

A workspace lies in .work/NAME, on its own branch; its parameters are params.yaml with a recipe put over it; its DVC
remote is a folder beside it. Running a command again brings the code up to date and redoes only what changed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from smearline.settings import overlaid

PRODUCT = Path(__file__).resolve().parents[1]
DATA = ("cells", "labels", "cbc", "quarantine.parquet")
_STAGE = "Running stage '"


@dataclass(frozen=True)
class Workspace:
    folder: Path
    name: str

    @classmethod
    def prepare(cls, name: str, recipe: str) -> Workspace:
        """Clone the product, or bring the clone up to its last commit, and put the recipe over the parameters."""
        folder = PRODUCT / ".work" / name
        space = cls(folder, name)
        if not (folder / ".git").is_dir():
            folder.parent.mkdir(exist_ok=True)
            _run(["git", "clone", "--quiet", str(PRODUCT), str(folder)], PRODUCT)
            space.git("branch", "product")  # the product's commit that the workspace stands on
            space.git("checkout", "-q", "-b", "workspace")
            space.git("config", "user.name", "smearline workspace")
            space.git("config", "user.email", "workspace@localhost")
            remote = PRODUCT / ".work" / "remotes" / name
            space.run(sys.executable, "-m", "dvc", "remote", "add", "--local", "-f", "-d", "local", str(remote))
        else:
            space.git("fetch", "-q", "origin", "+HEAD:refs/heads/product")
            space.git("merge", "-q", "--no-edit", "-X", "theirs", "product")
        if dirty := _run(["git", "status", "--porcelain"], PRODUCT, capture=True).strip():
            print(f"note: the workspace is made from the last commit; not in it:\n{dirty}", flush=True)
        params = folder / "params.yaml"
        base = yaml.safe_load(_run(["git", "show", "HEAD:params.yaml"], PRODUCT, capture=True))
        over = yaml.safe_load((folder / "pipelines" / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
        params.write_text(yaml.safe_dump(overlaid(base, over), sort_keys=False), encoding="utf-8")
        space.commit(f"Parameters of the recipe '{recipe}'")
        return space

    def git(self, *arguments: str) -> str:
        return _run(["git", *arguments], self.folder, capture=True)

    def run(self, *command: str, **variables: str) -> None:
        _run(command, self.folder, variables=variables)

    def smearline(self, *arguments: str) -> None:
        """The command `smearline`, with the workspace's own code and sites."""
        print(f"$ smearline {' '.join(arguments)}", flush=True)
        self.run(sys.executable, "-m", "smearline.cli", *arguments)

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        if self.git("status", "--porcelain").strip():
            self.git("commit", "-q", "-m", message)

    def version_data(self) -> None:
        """Put images, labels, counts and quarantine under DVC, commit the pointers and push the bytes."""
        started = time.monotonic()
        self.run(sys.executable, "-m", "dvc", "add", "-q", *(f"data/{name}" for name in DATA))
        self.commit("A version of the data")
        print(f"data versioned in {time.monotonic() - started:.0f} s", flush=True)

    def reproduce(self) -> dict[str, float]:
        """`dvc repro`, shown as it goes; seconds of each stage that ran."""
        seconds: dict[str, float] = {}
        stage, started = "", time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro"],
            cwd=self.folder,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("Running stage") and ("is cached" in line or not line.strip()):
                continue
            print(line, end="", flush=True)
            if line.startswith(_STAGE):
                if stage:
                    seconds[stage] = round(time.monotonic() - started, 1)
                stage, started = line.removeprefix(_STAGE).split("'")[0], time.monotonic()
        if stage:
            seconds[stage] = round(time.monotonic() - started, 1)
        if process.wait():
            raise SystemExit(
                f"dvc repro failed in {self.folder}; its message stands above. Mend it and run the same command again."
            )
        self.commit("A run of the pipeline")
        self.run(sys.executable, "-m", "dvc", "push", "-q")
        return seconds

    def report(self, seconds: Mapping[str, float], total: float) -> None:
        """What was made and where."""
        timing = self.folder / ".smearline" / "run.json"
        timing.parent.mkdir(exist_ok=True)
        before = json.loads(timing.read_text(encoding="utf-8"))["seconds"] if timing.exists() else {}
        timing.write_text(
            json.dumps({"seconds": {**before, **seconds}}), encoding="utf-8"
        )  # of each stage, the last time
        headline: dict[str, float] = {}
        for name in ("headline.json", "diagnosis_headline.json"):
            headline |= json.loads((self.folder / "evaluation" / name).read_text(encoding="utf-8"))
        quarantine = pd.read_parquet(self.folder / "data" / "quarantine.parquet")
        splits = pd.read_parquet(self.folder / "splits.parquet")
        where = os.path.relpath(self.folder, Path.cwd())
        figures = "\n".join(f"               {name:42} {value:.4f}" for name, value in headline.items())
        print(
            f"""
{"=" * 88}
made in {where}, {total / 60:.1f} minutes; stages run now (s): {dict(seconds) or "none, all was up to date"}
  cells        {_counts(splits["split"])}
  quarantined  {_counts(quarantine["reason"]) or "none"}
  metrics
{figures}
  page         {where}/evaluation/evaluation.html   (opens without a network)
  package      {where}/package   (recogniser, diagnostic model, lineage)
  smears       {where}/differentials.parquet
next, serve it, and type the lines that it prints:
  make serve WORKSPACE={where}
judge the model on other cells (those it was trained on are left out):
  .venv/bin/smearline evaluate --model {where}/package/recogniser --cells {where}/data --out /tmp/evaluation
or try another learning rate:
  cd {where} && source {os.path.relpath(PRODUCT / ".venv/bin/activate", self.folder)}
  dvc exp run -S train.lr=5e-4 && dvc exp show"""
        )


def _counts(values: pd.Series) -> str:
    return ", ".join(f"{count} {name}" for name, count in values.value_counts().items())


SETS = (
    ("pbc", "pbc", "pbc"),
    ("wbcatt", "wbcatt", "pbc"),
    ("jhu", "jhu", "jhu"),
    ("zheng", "zheng2", "zheng2"),
    ("bccd", "bccd", "bccd"),
)
"""(source, folder under DATA, site)."""


def real(data: Path, name: str = "real", recipe: str = "real", only: Sequence[str] = ()) -> None:
    """The whole line on the real sets below `data`."""
    started = time.monotonic()
    missing = [folder for _, folder, site in SETS if not (data / folder).is_dir() and (not only or site in only)]
    if missing:
        raise SystemExit(
            f"{data} has no folder {', '.join(missing)}; docs/data.md says where each set is had and how it is laid out"
        )
    space = Workspace.prepare(name, recipe)
    for source, folder, site in SETS:
        if not only or site in only:
            space.smearline("import", source, str(data / folder), "--site", site, "--into", "data")
    space.version_data()
    space.report(space.reproduce(), time.monotonic() - started)


def environment() -> dict[str, str]:
    """DVC's stages find this interpreter as `python`, and nothing calls home."""
    quiet = {"DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return {
        **os.environ,
        **quiet,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }


def _run(
    command: Sequence[str], folder: Path, capture: bool = False, variables: Mapping[str, str] | None = None
) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**environment(), **(variables or {})},
        text=True,
        stdout=subprocess.PIPE if capture else None,
    )
    if done.returncode:
        raise SystemExit(
            f"'{' '.join(map(str, command))}' failed in {folder} (exit code {done.returncode}); its message stands above"
        )
    return done.stdout or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["real", "cross"])
    parser.add_argument("--data", type=Path, help="folder of the real sets (docs/data.md)")
    given = parser.parse_args()
    if given.data is None or not given.data.is_dir():
        raise SystemExit(f"--data {given.data} is no folder")
    data = given.data.resolve()
    if given.what == "real":
        real(data)
    else:
        for site in ("pbc", "jhu"):
            real(data, f"cross-{site}", f"cross-{site}", only=("pbc", "jhu"))


if __name__ == "__main__":
    main()
