"""The whole line in a workspace that is made for it: `make demo`, `make real`, `make real-full`, `make real-cross`.

The workspace lies in .work/NAME, on its own branch; its parameters are params.yaml with a recipe put over it; its DVC
remote is a folder beside it. Running a command again brings the code up to date and redoes only what changed.
"""

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from flows import rehearsal
from flows.retrain import RUN_FILE
from flows.workspace import PRODUCT, FlowError, Workspace
from smearline import plain_json
from smearline.errors import SmearlineError
from smearline.settings import overlaid

SETS = (
    ("pbc", "pbc", "pbc"),
    ("wbcatt", "wbcatt", "pbc"),
    ("jhu", "jhu", "jhu"),
    ("zheng", "zheng2", "zheng2"),
    ("bccd", "bccd", "bccd"),
)
"""(source, folder under the data's, site)."""
DEMO_SITES = ("sim_north", "sim_south")
PATIENTS, CELLS = 40, 60
SERVED = 10
"""Smears a site that the demo sends to the service; those of sim_north come with another batch of stain."""


def prepare(name: str, recipe: str, product: Path = PRODUCT) -> Workspace:
    """Clone the product, or bring the clone up to its last commit, and put the recipe over the parameters."""
    space, origin = Workspace(product / ".work" / name), Workspace(product)
    if not (space.folder / ".git").is_dir():
        making = Workspace(product / ".work" / f".{name}.unfinished")  # killed half-way it is begun anew
        shutil.rmtree(making.folder, ignore_errors=True)
        making.folder.parent.mkdir(exist_ok=True)
        origin.git("clone", "-q", str(product), str(making.folder))
        making.git("branch", "product")  # the product's commit that the workspace stands on
        making.git("checkout", "-q", "-b", "workspace")
        making.git("config", "user.name", "smearline workspace")
        making.git("config", "user.email", "workspace@localhost")
        remote = product / ".work" / "remotes" / name
        making.run("dvc", "remote", "add", "--local", "-q", "-f", "-d", "local", str(remote))
        making.folder.rename(space.folder)
    else:
        space.commit("What a run that was cut off had done", "dvc.lock")
        space.git("fetch", "-q", "origin", "+HEAD:refs/heads/product")
        space.git("merge", "-q", "--no-edit", "-X", "theirs", "product")
    if dirty := origin.git("status", "--porcelain"):
        print(f"note: the workspace is made from the last commit; not in it:\n{dirty}", flush=True)
    base = yaml.safe_load(origin.git("show", "HEAD:params.yaml"))
    over = yaml.safe_load((space.folder / "pipelines" / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    (space.folder / "params.yaml").write_text(yaml.safe_dump(overlaid(base, over), sort_keys=False), encoding="utf-8")
    space.commit(f"Parameters of the recipe '{recipe}'", "params.yaml")
    return space


def imported(space: Workspace, sets: Sequence[tuple[str, Path, str]]) -> None:
    """Import these (source, folder, site), and make them a version of the data."""
    for source, folder, site in sets:
        space.call("smearline.cli", "import", source, str(folder), "--site", site, "--into", "data")
    begun = time.monotonic()
    space.commit("A version of the data", *space.add_data(Path("data")))
    print(f"data versioned in {time.monotonic() - begun:.0f} s", flush=True)


def from_images(space: Workspace, sets: Sequence[tuple[str, Path, str]]) -> None:
    """Import these, and retrain."""
    started = time.monotonic()
    imported(space, sets)
    space.call("flows", "retrain")
    _report(space, time.monotonic() - started)


def sets_in(data: Path, only: Sequence[str] = ()) -> list[tuple[str, Path, str]]:
    """The real sets below `data`. Raises FlowError where one is missing."""
    sets = [(source, data / folder, site) for source, folder, site in SETS if not only or site in only]
    if missing := [folder.name for _, folder, _ in sets if not folder.is_dir()]:
        raise FlowError(
            f"{data} has no folder {', '.join(missing)}; docs/data.md says where each set is had and how it is laid out"
        )
    return sets


def real(data: Path, recipe: str = "real", only: Sequence[str] = ()) -> None:
    """The whole line on the real sets below `data`, in the workspace of the recipe's name."""
    sets = sets_in(data, only)
    from_images(prepare(recipe, recipe), sets)


def demo() -> None:
    """The whole line on simulated laboratories, from image files to an answer over HTTP and a drift report."""
    space = prepare("demo", "demo")
    if not (space.folder / "raw" / "complete").exists():
        numbers = ("--patients", str(PATIENTS), "--cells", str(CELLS))
        space.call("smearline.cli", "simulate", "raw", "--sites", ",".join(DEMO_SITES), *numbers)
        (space.folder / "raw" / "complete").touch()
    from_images(space, [("folder", Path("raw") / site, site) for site in DEMO_SITES])
    stain = rehearsal.ANOTHER_STAIN
    folders = {
        "sim_north": rehearsal.new_smears(space, "another_stain", "sim_north", 8, SERVED, CELLS, 14, stain),
        "sim_south": rehearsal.new_smears(space, "usual", "sim_south", 9, SERVED, CELLS, 14),
    }
    with rehearsal.service(space) as (url, token):
        for site, folder in folders.items():
            space.call("serving.send", str(folder), "--site", site, "--url", url, SMEARLINE_TOKEN=token)
    space.call("flows", "monitor")
    _what_next(space)


def _report(space: Workspace, seconds: float) -> None:
    """What was made and where."""
    figures: dict[str, float] = {}
    for name in ("headline.json", "diagnosis_headline.json"):
        figures |= plain_json.read(space.folder / "evaluation" / name)
    quarantine = pd.read_parquet(space.folder / "data" / "quarantine.parquet")
    splits = pd.read_parquet(space.folder / "splits.parquet")
    stages, where = plain_json.read(space.folder / RUN_FILE)["seconds"], _shown(space.folder)
    lines = "\n".join(f"               {name:42} {value:.4f}" for name, value in figures.items())
    print(
        f"""
{"=" * 88}
made in {where}, {seconds / 60:.1f} minutes; seconds of each stage, when it last ran: {stages}
  cells        {_counts(splits["split"])}
  quarantined  {_counts(quarantine["reason"]) or "none"}
  metrics
{lines}
  page         {where}/evaluation/evaluation.html   (opens without a network)
  package      {where}/package   (recogniser, diagnostic model, lineage)
  smears       {where}/differentials.parquet
next, serve it, and type the lines that it prints:
  make serve WORKSPACE={where}
judge the model on other cells (those it was trained on are left out):
  .venv/bin/smearline evaluate --model {where}/package/recogniser --cells {where}/data --out /tmp/evaluation
or try another learning rate:
  cd {where} && source {os.path.relpath(PRODUCT / ".venv/bin/activate", space.folder)}
  dvc exp run -S train.lr=5e-4 && dvc exp show""",
        flush=True,
    )


def _what_next(space: Workspace) -> None:
    where, python = _shown(space.folder), os.path.relpath(PRODUCT / ".venv/bin/python", space.folder)
    print("drift reports (each opens without a network):")
    for path in sorted((space.folder / "watch").glob("*/*/verdict.json")):
        found = plain_json.read(path)
        print(f"  {_shown(path.parent)}/index.html\n    {found['verdict']}: {found['sentence']}")
    said = (space.folder / rehearsal.SERVICE_LOG).read_text(encoding="utf-8")
    lines = re.sub(r"http://127\.0\.0\.1:\d+", "http://127.0.0.1:3000", said[said.index("one cell:") :])
    print(f"""three lines that work in {where} once `make serve` runs:
{lines.strip()}
Prefect's page (runs, artifacts, schedules):        make flows WORKSPACE={where}     http://127.0.0.1:4200
Evidently's page (the sites' history):              make drift-ui WORKSPACE={where}  http://127.0.0.1:8000
a model goes to production by the gate and a person: cd {where} && {python} -m flows promote
the loop once around, with another stain:           make loop""")


def _shown(path: Path) -> str:
    return os.path.relpath(path, Path.cwd())


def _counts(values: pd.Series) -> str:
    return ", ".join(f"{count} {name}" for name, count in values.value_counts().items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["demo", "real", "real-full", "cross"])
    parser.add_argument("--data", type=Path, help="folder of the real sets (docs/data.md)")
    given = parser.parse_args()
    started = time.monotonic()
    try:
        if given.what == "demo":
            demo()
        elif given.data is None or not given.data.is_dir():
            raise FlowError(f"--data {given.data} is no folder")
        elif given.what in ("real", "real-full"):
            real(given.data.resolve(), given.what)
        else:
            for site in ("pbc", "jhu"):
                real(given.data.resolve(), f"cross-{site}", only=("pbc", "jhu"))
    except SmearlineError as error:
        print(f"make {given.what}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
