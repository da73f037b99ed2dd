"""`make scale` killed with SIGKILL once a step or two, at random moments, must end where a run that was left alone ends.

    python -m bench.kill_drill [--images 100000] [--kills 25]     (make proof-kill)

Half of the kills take the whole tree of processes, half one process of it. Then the run goes to its end, a fresh clone pulls and
verifies it, and images, labels, patients, blood counts, quarantine and paths (digests) are compared with those of a run that was
never killed (bench/results/scale_100000.json where it has as many images, else one made now). Result:
bench/results/kill_drill.json.
"""

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import psutil  # type: ignore[import-untyped]

from bench import results
from flows.workspace import PRODUCT, environment

NAME = "kill-drill"
WORK = PRODUCT / ".work"


def start(*arguments: str) -> psutil.Process:
    log = (WORK / f"{NAME}.log").open("a")
    command = [sys.executable, "-m", "bench.scale", "--real-size", *arguments]
    return psutil.Popen(command, cwd=PRODUCT, env=environment(), stdout=log, stderr=log)


def steps_done() -> dict[str, Any]:
    file = WORK / NAME / ".smearline" / "scale.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def undisturbed(images: int) -> dict[str, Any]:
    for name in ("scale_100000", "kill_undisturbed"):
        file = results.RESULTS / f"{name}.json"
        if not file.exists() and name == "kill_undisturbed":
            print("first the run that is left alone", flush=True)
            if start("--images", str(images), "--name", "kill-undisturbed").wait():
                raise SystemExit(f"it failed; see {WORK / NAME}.log")
        if file.exists():
            told: dict[str, Any] = json.loads(file.read_text())
            if told["import"]["images"] == images:
                return told
            file.unlink() if name == "kill_undisturbed" else None
    raise SystemExit("there is no run to compare with")


def kill(process: psutil.Process, whole: bool, dice: random.Random) -> str:
    """SIGKILL to the tree or to one of it; what was hit. Waits until all of it is gone."""
    tree = [process, *process.children(recursive=True)]
    victim, hit = dice.choice(tree), "the tree"
    if not whole:
        try:
            hit = "the script" if victim == process else " ".join(victim.cmdline()[1:4])[:60]
        except psutil.NoSuchProcess:  # it has ended meanwhile
            whole = True
    for one in tree if whole else [victim]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    if psutil.wait_procs(tree, timeout=90)[1]:  # what outlives its parent, an import, say, ends by itself
        raise SystemExit(f"after a kill of {hit} some process does not end")
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=25)
    given = parser.parse_args()
    for folder in (WORK / NAME, WORK / f"{NAME}-second", WORK / "remotes" / NAME):
        shutil.rmtree(folder, ignore_errors=True)
    (WORK / f"{NAME}.log").unlink(missing_ok=True)
    WORK.mkdir(exist_ok=True)
    if (PRODUCT / ".git").exists() and subprocess.run(["git", "diff", "--quiet"], cwd=PRODUCT).returncode:
        print("note: the checkout has changes that are not committed; change nothing while this runs", flush=True)
    dice, hits, began = random.Random(4), Counter[str](), Counter[str]()
    arguments = ("--images", str(given.images), "--name", NAME, "--keep")
    wanted, seen = undisturbed(given.images), 0
    while hits.total() < given.kills:
        process = start(*arguments)
        while process.poll() is None and len(steps_done()) <= seen:
            time.sleep(0.2)
        with contextlib.suppress(psutil.TimeoutExpired):  # somewhere in the next step, or the one after
            process.wait(dice.uniform(0, 8))
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit(f"the run fails by itself after {hits.total()} kills; see {WORK / NAME}.log")
            break  # it came to its end between two kills
        seen = len(steps_done())
        last = list(steps_done())[-1]
        hits[kill(process, hits.total() % 2 == 0, dice)] += 1
        began[last.split(" ")[0] if last.startswith(("import", "day")) else last] += 1
        print(f"kill {hits.total()} after '{last}'", flush=True)
    if start(*arguments).wait():
        raise SystemExit(f"the run cannot go on after the kills; see {WORK / NAME}.log")
    found = json.loads((results.RESULTS / f"{NAME.replace('-', '_')}.json").read_text())
    fresh = WORK / f"{NAME}-second"
    shutil.rmtree(fresh)
    subprocess.run(["git", "clone", "-q", str(WORK / NAME), str(fresh)], check=True)
    for command in (
        ["dvc", "remote", "add", "--local", "-q", "-f", "-d", "local", str(WORK / "remotes" / NAME)],
        ["dvc", "pull", "-q", "data/cells", "data/labels", "data/cbc", "data/quarantine.parquet"],
        ["smearline.cli", "verify"],
    ):
        said = subprocess.run(
            [sys.executable, "-m", *command], cwd=fresh, env=environment(), capture_output=True, text=True
        )
        if said.returncode:
            raise SystemExit(f"{command}: {said.stdout}{said.stderr}")
    contents = [dict(told["steps"]["contents"], seconds=0) for told in (wanted, found)]
    told = {
        "images": given.images,
        "kills": hits.total(),
        "what_was_hit": dict(hits),
        "last_step_done_before": dict(began),
        "same_as_undisturbed": contents[0] == contents[1],
        "undisturbed": contents[0],
        "killed": contents[1],
        "verify_in_a_fresh_clone": said.stdout.strip().splitlines()[-1],
    }
    results.write(NAME.replace("-", "_"), told)
    for folder in (WORK / NAME, fresh, WORK / "remotes" / NAME):
        shutil.rmtree(folder, ignore_errors=True)
    if contents[0] != contents[1]:
        raise SystemExit("the killed run does not hold what the other holds")


if __name__ == "__main__":
    main()
