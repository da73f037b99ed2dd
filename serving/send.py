"""Send smears that lie in a folder to a running service: `python -m serving.send FOLDER --site SITE`.

The folder is laid out as the source 'folder' (docs/sources.md): labels.csv with file, patient, smear and acquired_at, and,
where there are blood counts, an analyser's export xn.csv. Each smear is one request with its own idempotency key, so a
second call sends nothing twice; a service that is busy is asked again.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd

from smearline.errors import ImportSourceError, SmearlineError

_ATTEMPTS = 5


def smears(folder: Path) -> Iterator[tuple[dict[str, str], list[Path], bytes | None]]:
    """(patient, smear and acquired_at; images; the export's lines of this smear) of each smear in the folder.

    Raises:
        ImportSourceError: labels.csv is missing or names no smear.
    """
    table = folder / "labels.csv"
    if not table.is_file():
        raise ImportSourceError(f"{folder} has no labels.csv; it needs the columns file and smear")
    labels = pd.read_csv(table, dtype=str, keep_default_na=False).apply(lambda column: column.str.strip())
    if not {"file", "smear"} <= set(labels):
        raise ImportSourceError(f"{table} lacks the column file or smear; it has {', '.join(labels)}")
    export = folder / "xn.csv"
    lines = list(csv.reader(export.read_text(encoding="utf-8-sig").splitlines())) if export.is_file() else []
    if lines and "Sample No." not in lines[0]:
        raise ImportSourceError(
            f"{export} has no column 'Sample No.'; it must be an analyser's export, separated by commas"
        )
    sample = lines[0].index("Sample No.") if lines else 0
    lines = [line for line in lines if len(line) > sample]  # not the blank ones
    if alone := sorted({line[sample].strip() for line in lines[1:]} - set(labels["smear"])):
        print(f"send: {len(alone)} samples of {export.name} are of no smear here, first {alone[0]}", file=sys.stderr)
    for smear, part in labels[labels["smear"] != ""].groupby("smear", sort=True):
        first = part.iloc[0]
        request = {k: first[k] for k in ("patient", "acquired_at") if first.get(k)} | {"smear": str(smear)}
        mine = [row for row in lines[1:] if row[sample].strip() == smear]
        text = io.StringIO()
        csv.writer(text).writerows([lines[0], *mine] if mine else [])
        yield request, [folder / f for f in part["file"]], text.getvalue().encode() if mine else None


def send(
    client: httpx.Client, site: str, request: dict[str, str], images: list[Path], counts: bytes | None, again: str = ""
) -> dict[str, Any]:
    """One smear to POST /v1/diagnose; the answer. What was sent before gets its old answer, unless `again` is another text.

    Raises:
        SmearlineError: the service refuses it; the message is the service's own.
    """
    # No file name of ours leaves this machine.
    files: list[tuple[str, Any]] = [("images", (f"{i}", path.read_bytes())) for i, path in enumerate(images)]
    body = json.dumps({"site": site, **request}, sort_keys=True)
    digest = hashlib.sha256(again.encode() + body.encode() + (counts or b"") + b"".join(f[1][1] for f in files))
    if counts:
        files.append(("cbc", ("cbc.csv", counts, "text/csv")))
    headers = {"Idempotency-Key": digest.hexdigest()[:32]}
    for attempt in range(_ATTEMPTS):
        reply = client.post("/v1/diagnose", data={"request": body}, files=files, headers=headers)
        if reply.status_code != 503 or attempt == _ATTEMPTS - 1:
            break
        time.sleep(float(reply.headers.get("Retry-After", 2**attempt)))
    if reply.is_error:
        raise SmearlineError(f"smear {request['smear']} was refused ({reply.status_code}): {reply.text[:500]}")
    return reply.json()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--site", required=True)
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    given = parser.parse_args()
    if not (token := os.environ.get("SMEARLINE_TOKEN", "")):
        raise SmearlineError("put a token with the role diagnose into SMEARLINE_TOKEN")
    with httpx.Client(base_url=given.url, headers={"Authorization": f"Bearer {token}"}, timeout=300) as client:
        for request, images, counts in smears(given.folder):
            answer = send(client, given.site, request, images, counts)
            said = answer.get("diagnosis") or {}
            print(
                f"{request['smear']}: {len(images)} images, {said.get('group') or said.get('status')}, answer {answer['answer_id']}"
            )


if __name__ == "__main__":
    try:
        main()
    except (SmearlineError, OSError, httpx.HTTPError) as error:
        print(f"send: {error}", file=sys.stderr)
        raise SystemExit(2) from None
