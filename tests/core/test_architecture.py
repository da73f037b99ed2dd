"""The bones: who may import whom, what installs together, and that the documents name what exists."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from conftest import CHECKOUT

FORBIDDEN = {
    "smearline": {
        "prefect",
        "ray",
        "dvc",
        "optuna",
        "bentoml",
        "evidently",
        "pipelines",
        "serving",
        "monitoring",
        "flows",
    },
    "pipelines": {"serving", "monitoring", "flows"},
    "serving": {"pipelines", "monitoring", "flows"},
    "monitoring": {"pipelines", "serving", "flows"},
    "flows": {"torch", "ray"},
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_folder_imports_what_it_must_not(folder: str):
    for path in (CHECKOUT / folder).rglob("*.py"):
        if path.relative_to(CHECKOUT) != Path("smearline/cli.py"):  # which may load the others, lazily
            assert not imported(path) & FORBIDDEN[folder], path


@pytest.mark.parametrize(
    "library", ["prefect", "dvc.api", "torch", "ray.train", "optuna", "evidently", "sklearn", "bentoml", "pandas"]
)
def test_the_nine_libraries_import_together(library: str):
    importlib.import_module(library)


def test_the_command_starts_without_heavy_imports():
    import subprocess
    import sys

    code = (
        "import sys, smearline.cli; print([m for m in ('torch', 'ray', 'pandas', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_recognition_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, smearline.evaluation, smearline.differential; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_the_documents_name_commands_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in [CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md")]:
        named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", path.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, f"{path.name} names {named - targets}"


def test_every_stage_of_the_pipeline_depends_on_files_that_exist():
    import yaml

    made = {"data/cells", "data/labels", "data/cbc"}
    stages = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for stage in stages.values():
        for kind in ("outs", "metrics", "plots"):
            made |= {o if isinstance(o, str) else next(iter(o)) for o in stage.get(kind, [])}
    for name, stage in stages.items():
        for dependency in stage["deps"]:
            assert dependency in made or (CHECKOUT / dependency).exists(), f"{name}: {dependency}"


def test_git_ignores_what_dvc_keeps_and_nothing_else_that_a_stage_makes():
    import subprocess

    import yaml

    stages = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for stage in stages.values():
        for out in [o for kind in ("outs", "metrics", "plots") for o in stage.get(kind, [])]:
            path, options = (out, {}) if isinstance(out, str) else next(iter(out.items()))
            ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=CHECKOUT).returncode == 0
            assert ignored == options.get("cache", True), path
