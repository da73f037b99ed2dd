"""The bento of a package: the models, this code, the site files and pinned requirements, under `smearline:VERSION`.

    python -m serving.bento [--package package] [--store .smearline/bentoml]

Building again what is there does nothing, so a clone that pulled `package/` from DVC's cache can build it as well.
"""

import argparse
import os
import shutil
import tempfile
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from smearline import plain_json

NAME = "smearline"
CHECKOUT = Path(__file__).resolve().parents[1]


def requirements() -> list[str]:
    """What the service needs and what that needs in turn, pinned as in constraints.txt: the dependencies of pyproject.toml
    and of its extra [serve], and no torch."""
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(Requirement(line).name): line for line in lines if line[:1] not in ("", "#")}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    waiting = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    while waiting:
        one = Requirement(waiting.pop())
        if str(one) in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        name = canonicalize_name(one.name)
        found[str(one)] = pinned.get(name, one.name)
        for text in requires(name) or []:
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in ("", *one.extras)):
                further.marker = None
                waiting.append(str(further))
    return sorted(set(found.values()))


def build(package: Path, store: Path | None = None) -> str:
    """Build the bento of `package` into the BentoML home `store` (None: $BENTOML_HOME, or .smearline/bentoml here), where it
    is not there yet. Returns its tag."""
    store = store or Path(os.environ.get("BENTOML_HOME") or ".smearline/bentoml")
    version = plain_json.read(package / "lineage.json")["version"]
    tag = f"{NAME}:{version}"
    if (store / "bentos" / NAME / version / "bento.yaml").exists():
        return tag
    store.mkdir(parents=True, exist_ok=True)
    os.environ |= {"BENTOML_HOME": str(store.absolute()), "BENTOML_DO_NOT_TRACK": "True"}  # read when it is imported
    import bentoml

    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        code = {name: CHECKOUT / name for name in ("serving", "smearline", "sites")}
        for name, source in {"package": package, **code}.items():
            # The stage `package` belongs to training: it imports torch.
            shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__", "package.py"))
        bentoml.build(
            "serving.service:Smearline",
            name=NAME,
            version=version,
            build_ctx=str(context),
            include=["*"],
            python={"packages": requirements(), "lock_packages": False},
            docker={"python_version": "3.11"},
            description="Smearline: recogniser and diagnostic assistant. Research use only.",
        )
    return tag


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--package", type=Path, default=Path("package"))
    parser.add_argument("--store", type=Path)
    given = parser.parse_args()
    print(build(given.package, given.store))


if __name__ == "__main__":
    main()
