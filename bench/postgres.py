"""The case store's tests on a PostgreSQL server that this starts and ends (`make proof-postgres`).

Takes the server's programs from the machine, or from Debian's package where there are none; as root the server runs as
the user `postgres`, since it refuses root.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import results


def programs() -> Path:
    """The folder of initdb and pg_ctl."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found and not (elsewhere := shutil.which("initdb")):
        subprocess.run(["apt-get", "install", "-y", "-q", "postgresql"], check=True)
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else Path(str(elsewhere)).parent


def main() -> None:
    folder, binaries = Path(tempfile.mkdtemp(prefix="smearline-postgres-")), programs()
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def server(program: str, *arguments: str) -> None:
        subprocess.run([binaries / program, "-D", str(folder / "data"), *arguments], check=True, user=user, cwd=folder)

    try:
        server("initdb", "-U", "smearline", "-A", "trust", "-E", "UTF8", "--locale=C")
        server("pg_ctl", "-w", "-l", str(folder / "log"), "-o", f"-p {port} -k {folder} -h 127.0.0.1", "start")
        env = {**os.environ, "SMEARLINE_TEST_POSTGRES": f"postgresql+psycopg://smearline@127.0.0.1:{port}"}
        tests = [sys.executable, "-m", "pytest", "-q", "tests/serving/test_cases.py", "-k", "postgresql"]
        done = subprocess.run(tests, env=env, text=True, capture_output=True)
        print(done.stdout[-2000:], done.stderr[-2000:])
        said = subprocess.run([binaries / "postgres", "--version"], text=True, capture_output=True, check=True).stdout
        counted = re.search(r"ran: (\d+) of", done.stdout)
        if done.returncode or not counted:
            raise SystemExit("the case store's tests fail on PostgreSQL")
        results.write("postgres", {"server": said.strip(), "tests_passed": int(counted[1])})
    finally:
        server("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
