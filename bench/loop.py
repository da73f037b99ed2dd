"""The loop once around, on simulated data (`make loop`): a site's stain changes, and what follows.

In a clone of the demo's workspace: its package goes to production; the site's usual smears are served; then the stain
changes, and the smears of that week are served too; the monitor flow says what it sees; reviewers override and sign off
(here the simulator's truth does); ingest, retrain, gate, approval, switch; the new model answers; `trace` tells of an answer
from before and of one from after. Every part is the one a laboratory uses: nothing is called that has no command.

Some smears of the changed stain are held back from review: their accuracy before and after is what the loop brought.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pandas as pd

from bench import results
from flows import rehearsal
from flows.workspace import Workspace, environment
from serving import send

PRODUCT = Path(__file__).resolve().parents[1]
DEMO, LOOP = PRODUCT / ".work" / "demo", PRODUCT / ".work" / "loop"
SITE = "sim_north"
USUAL, REVIEWED, HELD_BACK = 12, 24, 24
"""Smears of the usual stain, of the changed stain that are reviewed, and of the changed stain that are not."""
CELLS = 60
DAYS_LATER = 28


class Loop:
    def __init__(self) -> None:
        self.minutes: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        yield
        self.minutes[name] = round((time.monotonic() - started) / 60, 2)

    def run(self, *command: str, token: str = "", accept: tuple[int, ...] = (0,)) -> str:
        """`python -m ...` in the workspace, shown as it goes; its output."""
        print(f"$ python -m {' '.join(command)}", flush=True)
        env = {**environment(), **({"SMEARLINE_TOKEN": token} if token else {})}
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=LOOP, env=env, text=True, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            print(f"  {line}", end="", flush=True)
            said.append(line)
        if process.wait() not in accept:
            raise SystemExit(f"'{' '.join(command)}' ended with {process.returncode}")
        return "".join(said)


def clone() -> None:
    """A second clone of the demo's workspace: it pulls, and has nothing to do."""
    shutil.rmtree(LOOP, ignore_errors=True)
    git = lambda *a: subprocess.run(["git", *a], cwd=LOOP, check=True)  # noqa: E731
    subprocess.run(["git", "clone", "-q", str(DEMO), str(LOOP)], check=True)
    git("config", "user.name", "smearline workspace")
    git("config", "user.email", "workspace@localhost")
    remote = PRODUCT / ".work" / "remotes" / "demo"
    dvc = [sys.executable, "-m", "dvc"]
    for command in (["remote", "add", "--local", "-f", "-d", "local", str(remote)], ["pull", "-q"]):
        subprocess.run([*dvc, *command], cwd=LOOP, env=environment(), check=True)
    subprocess.run([sys.executable, "-m", "serving.bento"], cwd=LOOP, env=environment(), check=True)


def serve(client: httpx.Client, folder: Path, again: str = "") -> tuple[list[dict[str, Any]], float]:
    """Send the smears of a folder; the answers, and the share of cells whose type is the simulator's."""
    truth = pd.read_csv(folder / "labels.csv", dtype=str)
    answers, right, cells = [], 0, 0
    for request, images, counts in send.smears(folder):
        answer = send.send(client, SITE, request, images, counts, again=again)
        types = truth.set_index("file").loc[[str(p.relative_to(folder)) for p in images], "type"]
        for cell in answer["cells"]:
            cell["truth"] = types.iloc[cell["image"]]
        right += sum(cell["type"] == cell["truth"] for cell in answer["cells"])
        cells += len(images)
        answers.append(answer)
    print(f"  {len(answers)} smears served, {cells} cells, {right / cells:.3f} of them as the simulator drew them")
    return answers, right / cells


def review(client: httpx.Client, answers: list[dict[str, Any]]) -> int:
    """Override what differs from the truth, and sign each case off; the number of overrides."""
    count = 0
    for answer in answers:
        overrides = [
            {"sha256": cell["sha256"], "type": cell["truth"]}
            for cell in answer["cells"]
            if cell["type"] != cell["truth"]
        ]
        count += len(overrides)
        which = {name: answer[name] for name in ("case_id", "answer_id")}
        body = {**which, "cells": overrides, "comment": "simulated review", "sign_off": True}
        client.post("/v1/review", json=body).raise_for_status()
    print(f"  {len(answers)} cases signed off, {count} cells overridden")
    return count


def verdict() -> dict[str, Any]:
    newest = max((LOOP / "watch" / SITE).glob("*/verdict.json"), key=lambda p: p.stat().st_mtime)
    found: dict[str, Any] = json.loads(newest.read_text(encoding="utf-8"))
    print(f"  {found['verdict']}: {found['sentence']}")
    return found


def promote(loop: Loop, token: str, reason: str) -> str:
    said = loop.run("flows", "promote")
    if "AwaitingApproval" not in said:
        raise SystemExit("the gate let nothing through; its table stands above and in gate/")
    name = max(json.loads(p.read_text())["challenger"]["version"] for p in (LOOP / "gate").glob("v*.json"))
    loop.run("flows", "approve", name, "--reason", reason, token=token)
    loop.run("flows", "promote")
    return name


def main() -> None:
    if not (DEMO / "package" / "lineage.json").exists():
        raise SystemExit("make the demo first: make demo")
    loop, space, found = Loop(), Workspace(LOOP), dict[str, Any]()
    with loop.step("clone, pull"):
        clone()
    with loop.step("simulate"):
        stain = rehearsal.ANOTHER_STAIN
        usual, changed, held_back = (
            rehearsal.new_smears(space, name, SITE, seed, smears, CELLS, later, change)
            for name, seed, smears, later, change in (
                ("usual", 101, USUAL, 14, {}),
                ("changed", 102, REVIEWED, DAYS_LATER, stain),
                ("held_back", 103, HELD_BACK, DAYS_LATER, stain),
            )
        )
    running = rehearsal.service(space)
    with loop.step("start the service"):
        url, token = running.__enter__()
    headers = {"Authorization": f"Bearer {token}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=300) as client:
            with loop.step("first promotion"):
                found["first"] = promote(loop, token, "the first model: judged on its own test cells")
                _until(client, LOOP)
            with loop.step("serve the usual stain"):
                _, found["accuracy_usual"] = serve(client, usual)
            with loop.step("monitor (usual)"):
                loop.run("flows", "monitor")
                found["verdict_usual"] = verdict()
            with loop.step("serve the changed stain"):
                reviewed, found["accuracy_changed"] = serve(client, changed)
                before, found["held_back_before"] = serve(client, held_back, again="before")
            with loop.step("monitor (changed)"):
                loop.run("flows", "monitor")
                found["verdict_changed"] = verdict()
            with loop.step("review and sign off"):
                found["overrides"] = review(client, reviewed)
            with loop.step("ingest"):
                loop.run("flows", "ingest")
            with loop.step("retrain"):
                loop.run("flows", "retrain")
            with loop.step("gate, approval, switch"):
                found["second"] = promote(loop, token, "learned from the changed stain; not worse elsewhere")
                _until(client, LOOP)
            with loop.step("the new model answers"):
                after, found["held_back_after"] = serve(client, held_back, again="after")
            with loop.step("trace"):
                found["trace_before"] = json.loads(loop.run("smearline.cli", "trace", before[0]["answer_id"], "--json"))
                found["trace_after"] = json.loads(loop.run("smearline.cli", "trace", after[0]["answer_id"], "--json"))
                for answer in (before[0], after[0]):
                    loop.run("smearline.cli", "trace", answer["answer_id"])
            with loop.step("rollback"):
                loop.run("flows", "rollback", "--reason", "the drill", token=token)
                _until(client, LOOP)
    finally:
        running.__exit__(None, None, None)
    found["gate"] = json.loads((LOOP / "gate" / f"{found['second']}.json").read_text(encoding="utf-8"))
    results.write("loop", {"minutes": loop.minutes, "total_minutes": round(sum(loop.minutes.values()), 1), **found})
    assert found["verdict_usual"]["verdict"] == "accept", "the usual stain was not accepted"
    assert found["verdict_changed"]["verdict"] not in ("accept", "cannot be judged"), "the changed stain was not called"
    assert found["gate"]["passed"], "the gate did not pass"
    gain = 100 * (found["held_back_after"] - found["held_back_before"])
    assert gain > 0, f"the loop went round and brought nothing: {gain:+.1f} points on the smears that nobody reviewed"


def _until(client: httpx.Client, space: Path) -> None:
    """Wait until the service answers with the version that is to be served."""
    wanted = (space / ".smearline" / "production").read_text(encoding="utf-8").strip()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            reply = client.get("/v1/model")
            if reply.is_success and reply.json()["version"] == wanted:
                print(f"  the service answers with {wanted}")
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"the service does not answer with {wanted}")


if __name__ == "__main__":
    os.chdir(PRODUCT)
    main()
