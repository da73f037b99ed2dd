"""A workspace takes the product's last commit and its recipe, and leaves the product alone."""

import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import CHECKOUT

from flows import lines
from flows.workspace import FlowError


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """A clone of the checkout that stands for the product."""
    folder = tmp_path / "product"
    subprocess.run(["git", "clone", "-q", str(CHECKOUT), str(folder)], check=True)
    for key, value in (("user.name", "test"), ("user.email", "test@localhost")):
        subprocess.run(["git", "config", key, value], cwd=folder, check=True)
    return folder


def test_a_workspace_is_made_once_and_brought_up_to_date(product: Path):
    space = lines.prepare("w", "demo", product)
    params = yaml.safe_load((space.folder / "params.yaml").read_text(encoding="utf-8"))
    assert params["image"]["size_px"] == 64, "the recipe lies over the parameters"
    (space.folder / "of-the-laboratory.txt").write_text("kept")
    space.commit("the laboratory's own", "of-the-laboratory.txt")
    (space.folder / "splits.json").write_text(
        "{}"
    )  # as the first stage leaves it that is cut off, before there is a dvc.lock
    (product / "CHANGELOG.md").write_text("new code")
    subprocess.run(["git", "commit", "-qam", "new code"], cwd=product, check=True)
    again = lines.prepare("w", "demo", product)
    assert (again.folder / "CHANGELOG.md").read_text() == "new code"
    assert (again.folder / "of-the-laboratory.txt").exists() and (again.folder / "splits.json").exists()
    status = subprocess.run(["git", "status", "--porcelain"], cwd=product, capture_output=True, text=True, check=True)
    assert status.stdout == "", "the product's repository stays clean"


def test_a_folder_without_the_sets_is_refused(tmp_path: Path):
    with pytest.raises(FlowError, match=r"has no folder pbc.*docs/data\.md"):
        lines.real(tmp_path)
