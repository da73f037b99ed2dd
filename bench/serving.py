"""The service, really started, against bare decoding and ONNX Runtime in one process on the same images, in the same run.

    python -m bench.serving WORKSPACE        (a workspace with a bento, such as .work/demo)

Clients, service and the rest of the machine share the cores: read the ratios, not the figures.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]

from bench import results
from smearline import dataset
from smearline.recognition import RecognitionModel, scale_of

CHECKOUT = Path(__file__).resolve().parents[1]
CELLS, CHUNK = 200, 64


def take(data: Path) -> tuple[str, float, list[bytes]]:
    """The site, the scale and the bytes of its first CELLS images."""
    index = dataset.index(data)
    site = str(index["site"].iloc[0])
    wanted = set(index.loc[index["site"] == site, "sha256"].head(CELLS))
    blocks = dataset.iter_rows(data, ["sha256", "image"])
    images = [i for b in blocks for s, i in zip(b["sha256"], b["image"], strict=True) if s in wanted]
    return site, scale_of(site, None)[0], images


def bare(model: RecognitionModel, images: list[bytes], scale: float, pool: ThreadPoolExecutor) -> None:
    """What cannot be left out: decode, crop, run."""
    for start in range(0, len(images), CHUNK):
        crops = np.stack(list(pool.map(lambda d: model.prepare(d, scale), images[start : start + CHUNK])))
        model.run(crops, "type_probabilities", "characteristic_probabilities", "embedding")


def timed(work: Callable[[], object], clients: int, number: int) -> dict[str, float]:
    """Call `work` `number` times from so many threads: calls a second, and how long one takes."""

    def call(_: int) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        taken = list(pool.map(call, range(number)))
    seconds = time.perf_counter() - begun
    p50, p99 = np.quantile(taken, (0.5, 0.99)) * 1000
    return {
        "requests": number,
        "per_second": round(number / seconds, 3),
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
    }


def start(workspace: Path, home: Path, environment: Path) -> tuple[subprocess.Popen[str], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "serving.run",
        "--workspace",
        str(workspace),
        "--port",
        str(port),
        "--venv",
        str(environment),
    ]
    process = subprocess.Popen(
        command, cwd=CHECKOUT, env={**os.environ, "SMEARLINE_HOME": str(home)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if " answers at " in line:
            return process, f"http://127.0.0.1:{port}"
    raise SystemExit(f"the service did not start; see {home / 'service.log'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--venv", type=Path, default=CHECKOUT / ".venv-serve")
    given = parser.parse_args()
    workspace = given.workspace.resolve()
    site, scale, images = take(workspace / "data")
    home = Path(tempfile.mkdtemp(prefix="bench-", dir=workspace / ".smearline"))
    if not given.venv.exists():  # made before the clock runs
        process, _ = start(workspace, home, given.venv)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    begun = time.perf_counter()
    process, url = start(workspace, home, given.venv)
    client = httpx.Client(base_url=url, timeout=300)
    client.headers["Authorization"] = f"Bearer {(home / 'token').read_text().strip()}"

    def asked(path: str, data: dict[str, str], pictures: list[bytes]) -> Callable[[], object]:
        # Encoded once: what a client spends on its multipart body is none of the service's.
        files: list[tuple[str, Any]] = [("images", ("x", picture)) for picture in pictures]
        request = client.build_request("POST", path, data=data, files=files)
        content, headers = request.read(), {"Content-Type": request.headers["content-type"]}

        def ask() -> None:
            reply = client.post(path, content=content, headers=headers)
            if reply.is_error:
                raise SystemExit(f"{path}: {reply.status_code} {reply.text[:500]}")

        return ask

    one = asked("/v1/recognise", {"site": site}, images[:1])
    smear = asked("/v1/diagnose", {"request": json.dumps({"site": site, "smear": "bench"})}, images)
    try:
        one()
        first = time.perf_counter() - begun
        smear()
        model = RecognitionModel(workspace / "package" / "recogniser", threads=os.cpu_count() or 1)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found: dict[str, Any] = {"one_cell": {}, "smear": {}}
            for name, pictures, ask, numbers in (
                ("one_cell", images[:1], one, (200, 400, 400)),
                ("smear", images, smear, (10, 12, 32)),
            ):
                for clients, number in zip((1, 4, 16), numbers, strict=True):
                    measured = timed(ask, clients, number)
                    # Between two measurements of the service, so that both see the same machine.
                    alone = timed(lambda p=pictures: bare(model, p, scale, pool), 1, max(10, number // 4))  # type: ignore[misc]
                    ratio = measured["per_second"] / alone["per_second"]
                    found[name][f"{clients}_clients"] = measured | {"bare": alone, "ratio_to_bare": round(ratio, 3)}
        workers = psutil.Process(process.pid).children(recursive=True)
        memory = [w.memory_full_info() for w in workers]
        stored = sum(p.stat().st_size for p in [*home.glob("cases.sqlite*"), *home.glob("incoming/**/*.parquet")])
        total = sum(p.stat().st_size for p in given.venv.rglob("*") if p.is_file() and not p.is_symlink())
        content = {
            "what": f"{site}, images of about {len(images[0])} bytes, network at {model.card.size_px} px; a smear is {CELLS} cells",
            **found,
            "seconds_to_first_answer": round(first, 1),
            "memory_mb": {"pss": round(sum(m.pss for m in memory) / 1e6), "rss": [round(m.rss / 1e6) for m in memory]},
            "environment_mb": round(total / 1e6),
            "stored_mb": round(stored / 1e6, 1),
        }
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(home, ignore_errors=True)
    results.write("serving", content, workspace / "data")


if __name__ == "__main__":
    main()
