"""`make serve`: the bento that is in production, in an environment of its own, and curl lines that work.

    python -m serving.run --workspace .work/demo [--port 3000] [--venv .venv-serve]

Follows WORKSPACE/.smearline/production: when promote or rollback name another version there, that one is started in
place of the running one; where it does not start, the one before serves on. Only the standard library is imported until
the environment is there.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path

QUIET = {"BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
READY_SECONDS, STOP_SECONDS = 180, 30


def wanted(workspace: Path, bentos: Path) -> str:
    """The version to serve: the one named in .smearline/production, else the newest bento."""
    pointer = workspace / ".smearline" / "production"
    if pointer.exists():
        return pointer.read_text(encoding="utf-8").strip()
    built = sorted(bentos.glob("*/bento.yaml"), key=lambda p: p.stat().st_mtime)
    if not built:
        raise SystemExit(f"no bento in {bentos}: make one with the pipeline (dvc repro), or of a package that was pulled "
                         "(python -m serving.bento)")  # fmt: skip
    return built[-1].parent.name


def environment(folder: Path, requirements: Path) -> Path:
    """The interpreter of an environment with these requirements, made or brought up to date."""
    python, stamp, text = folder / "bin" / "python", folder / ".requirements", requirements.read_text(encoding="utf-8")
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != text:
        print(f"installing what the bento needs into {folder} (a minute or two, once)", flush=True)
        venv.create(folder, with_pip=True)
        pip = ["pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "-r", str(requirements)]
        if subprocess.run([str(python), "-m", *pip]).returncode:
            raise SystemExit("pip failed; its message stands above")
        stamp.write_text(text, encoding="utf-8")
    return python


def answers(url: str) -> bool:
    """Whether a service is ready there."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/readyz", timeout=2):
        return True
    return False


class Service:
    """`bentoml serve` of one version as a child process."""

    def __init__(self, version: str, port: int, log: Path) -> None:
        self.version, self._url, self._log = version, f"http://127.0.0.1:{port}", log
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise SystemExit(f"port {port} cannot be had ({error.strerror}); take another: PORT=...") from error
        serve = ["bentoml", "serve", f"smearline:{version}", "--host", "127.0.0.1", "--port", str(port)]
        command = [sys.executable, "-m", *serve]
        self._start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            # Not from the workspace: its code would stand before the bento's.
            self.process = subprocess.Popen(command, cwd=log.parent, stdout=out, stderr=out, start_new_session=True)

    def ready(self) -> bool:
        """Wait until it answers; False where it cannot start."""
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until and self.process.poll() is None and "startup failed" not in self.said():
            if answers(self._url):
                return True
            time.sleep(0.1)
        return False

    def said(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def stop(self) -> None:
        """End it and its workers, who would keep the port."""
        import psutil  # type: ignore[import-untyped]

        if self.process.poll() is not None:
            return
        workers = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        _, left = psutil.wait_procs(workers, timeout=STOP_SECONDS / 10)
        for worker in [*left, *([self.process] if self.process.poll() is None else [])]:
            worker.kill()


def supervise(workspace: Path, bentos: Path, port: int, home: Path) -> int:
    from serving import examples
    from smearline import tokens
    from smearline.errors import SmearlineError

    started: list[Service] = []

    def start(version: str) -> Service | None:
        service = Service(version, port, home / "service.log")
        started.append(service)
        if service.ready():
            print(f"smearline:{version} answers at http://127.0.0.1:{port} (log: {home / 'service.log'})", flush=True)
            return service
        service.stop()
        print(f"smearline:{version} does not start:\n" + "\n".join(service.said().splitlines()[-12:]), flush=True)
        return None

    def stop(*_: object) -> None:
        # Once: make and a terminal say it again to the whole group, and that would cut the ending short.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    token_file = home / "token"
    if not (home / "tokens.yaml").exists():
        token = tokens.create(home / "tokens.yaml", "local", tokens.ROLES)
        with os.fdopen(os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(token + "\n")
        print(f"a first token, for all roles: {token}\nkept for you alone in {token_file}", flush=True)
    pointer, asked = workspace / ".smearline" / "production", wanted(workspace, bentos)
    try:
        service = start(asked)
        if service is None:
            return 1
        try:
            site, case_id = examples.write(workspace, home / "examples")
            shown = f"$(cat {os.path.relpath(token_file)})" if token_file.exists() else "$SMEARLINE_TOKEN"
            print(examples.lines(f"http://127.0.0.1:{port}", home / "examples", site, case_id, shown), flush=True)
        except SmearlineError as error:
            print(f"no example to send: {error}", flush=True)
        while service.process.poll() is None:
            time.sleep(0.5)
            version = wanted(workspace, bentos) if pointer.exists() else asked
            if version == asked:
                continue
            asked = version
            if not (bentos / version / "bento.yaml").exists():
                print(f"smearline:{version} does not start: there is no such bento in {bentos}", flush=True)
            elif version != service.version:
                service.stop()
                if (now := start(version) or start(service.version)) is None:
                    return 1
                service = now
        print(f"the service ended by itself with exit code {service.process.returncode}; see {home / 'service.log'}")
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for one in started:
            one.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workspace", type=Path, default=Path())
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--venv", type=Path, help="make and use this environment; default: this interpreter's own")
    given = parser.parse_args()
    workspace = given.workspace.resolve()
    store = Path(os.environ.get("BENTOML_HOME") or workspace / ".smearline" / "bentoml").absolute()
    home = Path(os.environ.get("SMEARLINE_HOME") or workspace / ".smearline" / "service").absolute()
    bentos = store / "bentos" / "smearline"
    os.environ |= {**QUIET, "BENTOML_HOME": str(store), "SMEARLINE_HOME": str(home)}
    os.environ.setdefault("SMEARLINE_SITES", str(workspace / "sites"))
    if given.venv and Path(sys.prefix) != given.venv.absolute():
        requirements = bentos / wanted(workspace, bentos) / "env" / "python" / "requirements.txt"
        python = str(environment(given.venv.absolute(), requirements))
        os.execv(python, [python, "-m", "serving.run", *sys.argv[1:]])
    raise SystemExit(supervise(workspace, bentos, given.port, home))


if __name__ == "__main__":
    main()
