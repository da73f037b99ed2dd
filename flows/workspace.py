"""A workspace as the flows use it: its git, its commands, and its lock."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smearline import dataset, plain_json
from smearline.errors import SmearlineError

PRODUCT = Path(__file__).resolve().parents[1]
STATE = Path(".smearline")


class FlowError(SmearlineError):
    """A flow cannot go on: what is missing, and which command mends it."""


class BehindVersion(FlowError):
    """The data here are older than their pointers."""


class Busy(FlowError):
    """Another flow is running in the workspace."""


@dataclass(frozen=True)
class Workspace:
    """A git clone of the product with data of its own."""

    folder: Path

    @property
    def service(self) -> Path:
        """Where the service that answers for this workspace keeps its state."""
        return self.folder / (os.environ.get("SMEARLINE_HOME") or STATE / "service")

    def git(self, *arguments: str) -> str:
        """Raises FlowError with git's own message."""
        return self.quiet("git", *arguments)

    def commit(self, message: str, *paths: str | Path) -> None:
        """Commit these files, as far as they are there, and no others; nothing where none has changed. Waits for another
        git command to end."""
        paths = tuple(path for path in paths if (self.folder / path).exists())
        if not paths:  # to git no paths are all of them
            return
        for attempt in range(20):
            try:
                self.git("add", "--", *map(str, paths))
                if self.git("status", "--porcelain", "--", *map(str, paths)):
                    self.git("commit", "-q", "-m", message, "--only", "--", *map(str, paths))
                return
            except FlowError as error:
                if "index.lock" not in str(error) or attempt == 19:
                    raise
                time.sleep(0.5)

    def add_data(self, data: Path) -> list[Path]:
        """`dvc add` of what the data set at `data`, relative to the workspace, holds. Returns what to commit: the pointers and
        the file that hides the bytes from git."""
        there = [data / name for name in dataset.VERSIONED if (self.folder / data / name).exists()]
        self.run("dvc", "add", "-q", *map(str, there))
        self.data_changed(data)  # notes which version the data are
        return [data / ".gitignore", *(Path(f"{path}.dvc") for path in there)]

    def data_changed(self, data: Path) -> bool:
        """Whether what lies there is no version yet.

        Raises:
            BehindVersion: what lies there is older than its pointer, as after `git pull`; a version made now would bring it back.
        """
        there = {f"{data}/{name}" for name in dataset.VERSIONED if (self.folder / data / name).exists()}
        pointers = {f"{data}/{name}": self.folder / data / f"{name}.dvc" for name in dataset.VERSIONED}
        now = {
            name: yaml.safe_load(path.read_text())["outs"][0]["md5"] for name, path in pointers.items() if path.exists()
        }
        found = {name: what for name, what in self.differing().items() if name in now}
        kept = self.folder / STATE / "data-version.json"
        noted = plain_json.read(kept) if kept.exists() else {}
        here = noted | {name: now[name] for name in now.keys() - found.keys()}
        if here != noted:
            kept.parent.mkdir(exist_ok=True)
            plain_json.write(kept, here)
        if there <= now.keys() and set(found.values()) <= {"deleted"}:
            return bool(self.git("status", "--porcelain", "--", *map(str, pointers.values())))  # not committed yet
        older = [name for name in found if (noted[name] != now[name] if name in noted else self._was_a_version(name))]
        if older:
            raise BehindVersion(
                f"{', '.join(older)}: older than the pointers (git pull?), so nothing was made a version: "
                f"dvc checkout {data}/*.dvc (dvc pull), then run this again"
            )
        return True

    def _was_a_version(self, name: str) -> bool:
        """Whether a pointer in git's history was of the data that lie at `name` now."""
        from dvc.repo import Repo

        with Repo(str(self.folder)) as repo:
            (out,) = repo.find_outs_by_path(str(self.folder / name))
            return out.exists and bool(
                self.git("log", "--all", "-1", "--format=%h", f"-S{out.get_hash().value}", "--", f"{name}.dvc")
            )

    def differing(self) -> dict[str, str]:
        """The data (no stage's outs) that are not what their pointers say, by path: 'deleted', 'modified' or 'new'.

        The bytes here are compared: of a pointer that `git pull` brought `dvc status` says 'not in cache', whatever lies here.
        """
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with Repo(str(self.folder)) as repo:
                outs = [out for stage in repo.index.stages if not stage.cmd for out in stage.outs]
                told = {os.path.relpath(out.fspath, repo.root_dir): out.workspace_status() for out in outs}
        except DvcException as error:
            raise FlowError(f"what lies in {self.folder} cannot be compared with its pointers: {error}") from error
        return {name: next(iter(what.values())) for name, what in told.items() if what}

    def status(self, *targets: str) -> dict[str, Any]:
        """What differs from its pointer or from what dvc.lock holds, as DVC says it; waits for who holds DVC's lock."""
        said = self.quiet(sys.executable, "-m", "dvc", "--wait-for-lock", "status", "--json", *targets)
        found: dict[str, Any] = json.loads(said)
        return found

    def refuse_unversioned(self, data: Path) -> None:
        """Raises FlowError where the data, or others that DVC holds, are no version yet, or older than their pointers."""
        if self.data_changed(data):
            raise FlowError(
                f"what lies in {data} is no version yet. Run the flow ingest, or: dvc add {data}/… && git commit"
            )
        if found := self.differing():
            told = ", ".join(f"{name} ({what})" for name, what in found.items())
            raise FlowError(
                f"not what their pointers say: {told}. What is gone comes back by dvc checkout (dvc pull); what is new or modified "
                "becomes a version by dvc add and git commit"
            )

    def quiet(self, *command: str) -> str:
        """A command in the workspace; what it prints. Raises FlowError with its own message where it fails."""
        done = subprocess.run(command, cwd=self.folder, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise FlowError(f"'{' '.join(command)}' failed in {self.folder}: {done.stderr.strip()}")
        return done.stdout.strip()

    def call(self, *command: str, **variables: str) -> None:
        """`python -m ...` in the workspace, on this terminal, progress and all. Raises FlowError where it fails."""
        print(f"$ python -m {' '.join(command)}", flush=True)
        env = {**environment(), **variables}
        if code := subprocess.run([sys.executable, "-m", *command], cwd=self.folder, env=env).returncode:
            raise FlowError(
                f"'{' '.join(command)}' failed in {self.folder} (exit code {code}); its message stands above. "
                "Mend it and run the same command again: what is done is not done twice."
            )

    def listed_anew(self) -> dict[str, str]:
        """Variables for `dvc push` and `dvc pull`: DVC makes its list of what is to go anew, and looks at the remote itself.

        A push that is killed while it makes its list leaves a part of it (dvc-data 3.18, index/collect.py), by which the next push
        passes over files, says that it went well, and puts up the listing of a folder of which files are missing.
        """
        folder = self.folder / STATE / "dvc-lists"
        shutil.rmtree(folder, ignore_errors=True)
        return {"DVC_SITE_CACHE_DIR": str(folder)}

    def run(self, *command: str, private: bool = False, variables: Mapping[str, str] | None = None) -> list[str]:
        """`python -m ...` in the workspace, with the workspace's own code, shown as it goes; its lines. DVC waits for
        another command that holds its lock; while a stage runs DVC holds none, and says what is busy.

        Args:
            private: what it says may name a patient, and is not shown: Prefect keeps what a flow prints.

        Raises:
            FlowError: it failed; the message holds its last lines, or how to read them.
        """
        given = ["dvc", "--wait-for-lock", *command[1:]] if command[0] == "dvc" else command
        with subprocess.Popen(
            [sys.executable, "-m", *given],
            cwd=self.folder,
            env=environment() | dict(variables or {}),
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            lines = []
            try:
                for line in process.stdout:
                    if line.strip():
                        lines.append(line.rstrip())
                        if not private:
                            print(lines[-1])
            except BaseException:  # a run that is cancelled takes its stage with it, and all that the stage started
                os.killpg(process.pid, signal.SIGTERM)
                raise
        if process.returncode:
            said = "\n".join(lines[-15:])
            if private:
                what = "refused what it was given" if process.returncode == 2 else "broke off"
                said = f"it {what}; why may name a patient. To read it, type there: python -m {' '.join(command)}"
            raise FlowError(f"'{' '.join(command)}' failed in {self.folder} (exit code {process.returncode}):\n{said}")
        return lines

    @contextlib.contextmanager
    def lock(self, holder: str, what: str = "flow") -> Iterator[None]:
        """One at a time. The lock goes with its process, however that ends. Raises Busy, which names the holder."""
        path = self.folder / STATE / f"{what}.lock"
        path.parent.mkdir(exist_ok=True)
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"one run at a time: {path.read_text() or 'another flow'} is running here") from None
            file.truncate(0)
            file.write(f"'{holder}' (process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')})")
            file.flush()
            yield


def environment() -> dict[str, str]:
    """Of every child: this interpreter is `python`, one thread, nothing calls home. What a workspace has no code for is
    taken from the product."""
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "BENTOML_DO_NOT_TRACK": "True",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(PRODUCT)])),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
