"""Results of measurements: JSON in bench/results/, each with its date, commit, command, data and machine."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smearline import dataset

RESULTS = Path(__file__).parent / "results"


def provenance(data: Path | None, command: str | None = None) -> dict[str, Any]:
    """What stands behind a figure. Of the command, folders of this machine are called DATA_SET."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    typed = ["DATA_SET" if Path(word).is_absolute() else word for word in sys.argv[1:]]
    main = getattr(sys.modules["__main__"], "__spec__", None)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "command": command or shlex.join(["python", "-m", main.name if main else Path(sys.argv[0]).name, *typed]),
        "data_digest": dataset.digest(dataset.index(data, ["sha256"])) if data else None,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "ray", "timm", "onnxruntime", "numpy")},
    }


def write(name: str, content: dict[str, Any], data: Path | None = None) -> None:
    """Write bench/results/NAME.json and print it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**content, "provenance": provenance(data)}, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    print(text)
